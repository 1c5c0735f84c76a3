"""What watches the numbers of a run: steps that are not finite, and losses that jump.

A step whose loss or gradient is not finite is passed over: weights and the optimiser's state stay as they are, the next
step takes the next batch at its own learning rate. Too many of them end the run.

A loss is a spike where it is more than SPIKE robust standard deviations (1.4826 times the median distance from the
median) above the median of the WINDOW losses before it.

Shape legend: P trained parameters, in the order of the forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from regla.runtime.distributed import Processes
from regla.runtime.progress import CALMER, WINDOW, Progress

SPIKE = 6.0
_FEWEST = 20  # losses that a spike is measured against
_LEAST_SPREAD = 0.01  # of the median: losses that hardly differ make no small step a spike


class Guards:
    """Reads the figures of the steps and counts in `progress`, which checkpoints keep.

    Args:
        names: of the P parameters.
        progress: of the run.
        limit: how many of the last WINDOW steps may be skipped.
    """

    def __init__(self, names: Sequence[str], progress: Progress, limit: int) -> None:
        self.names, self.progress, self.limit = names, progress, limit

    def read(self, latest: Sequence[Tensor]) -> dict[str, Any]:
        """What the log says of the steps that `progress.steps` ends: mean loss, the last one's gradient norm, and which
        were skipped or spikes.

        Args:
            latest: of each step `figures`; reading them waits for the device.
        """
        progress = self.progress
        losses: list[float] = []
        skipped: list[dict[str, Any]] = []
        spikes: list[dict[str, Any]] = []
        norm = math.nan
        steps = torch.stack(list(latest)).tolist()
        for step, (loss, norm, *norms) in enumerate(steps, progress.steps - len(steps) + 1):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                skipped.append({"step": step, "loss": _number(loss)} | self._not_finite(norms))
                continue
            if (usual := _spike_above(progress.losses[-WINDOW:], loss)) is not None:
                spikes.append({"step": step, "loss": loss, "usual": usual, "gradient_norm": norm})
            losses.append(loss)
            progress.losses.append(loss)
        progress.spikes += len(spikes)
        progress.skipped += len(skipped)
        since = progress.steps - WINDOW
        progress.skipped_lately = [
            step for step in (*progress.skipped_lately, *(one["step"] for one in skipped)) if step > since
        ]
        record: dict[str, Any] = {"loss": sum(losses) / len(losses) if losses else None, "gradient_norm": _number(norm)}
        return record | ({"skipped": skipped} if skipped else {}) | ({"spikes": spikes} if spikes else {})

    def check(self, record: dict[str, Any]) -> None:
        """Raise FloatingPointError where the steps of `record` were too many to skip; it names the first of them."""
        lately = len(self.progress.skipped_lately)
        if not record.get("skipped") or lately <= self.limit:
            return
        found = record["skipped"][0]
        if found["loss"] is None:
            what, at = "loss", f", first in the output of {found['layer']}" if found.get("layer") else ""
        else:
            behind = f" to {found['last']}" if found["last"] != found["first"] else ""
            what, at = "gradient", f", in {found['first']}{behind}"
        raise FloatingPointError(
            f"The {what} of step {found['step']} is not finite{at}; with it {lately} of the last {WINDOW} steps are "
            f"skipped, and at most {self.limit} may be; {CALMER}."
        )

    def _not_finite(self, norms: Sequence[float]) -> dict[str, Any]:
        """The parameters whose gradient is not finite: the first, the last and how many."""
        bad = [number for number, norm in enumerate(norms) if not math.isfinite(norm)]
        if not bad:  # their sum alone is too large
            bad = [max(range(len(norms)), key=norms.__getitem__)]
        return {"first": self.names[bad[0]], "last": self.names[bad[-1]], "parameters": len(bad)}


def figures(loss: Tensor, norm: Tensor, norms_P: Tensor) -> Tensor:
    """What is kept of a step until it is read: its loss, the norm of its gradient, and that of each parameter."""
    return torch.cat([loss[None], norm[None], norms_P])


def in_forward_order(model: nn.Module, trained: Sequence[nn.Parameter]) -> tuple[list[str], list[nn.Parameter]]:
    """Names and parameters, of `trained`, as the forward pass meets their layers."""
    chosen = {id(parameter) for parameter in trained}
    found = [(name, parameter) for name, parameter in model.named_parameters() if id(parameter) in chosen]
    return [name for name, _ in found], [parameter for _, parameter in found]


@torch.no_grad()
def first_not_finite(model: nn.Module, forward: Callable[[], object], processes: Processes) -> str | None:
    """The first module whose output is not finite while `forward` runs the model, in any of the processes."""
    names = {module: name for name, module in model.named_modules()}
    called: list[str] = []
    bad: list[int] = []

    def look(module: nn.Module, args: Any, output: Any) -> None:
        parts = output if isinstance(output, tuple) else (output,)
        if any(isinstance(x, Tensor) and x.is_floating_point() and not x.isfinite().all() for x in parts):
            bad.append(len(called))
        called.append(names[module])

    handles = [module.register_forward_hook(look) for module in names]
    try:
        with torch.compiler.set_stance("force_eager"):
            forward()
    finally:
        for handle in handles:
            handle.remove()
    first = -processes.largest(-min(bad, default=len(called)))
    return called[first] if first < len(called) else None


def _spike_above(before: Sequence[float], loss: float) -> float | None:
    """The usual loss, where `loss` is a spike above it."""
    if len(before) < _FEWEST:
        return None
    usual = median(before)
    spread = 1.4826 * median(abs(one - usual) for one in before)
    return usual if loss > usual + SPIKE * max(spread, _LEAST_SPREAD * abs(usual)) else None


def _number(x: float) -> float | None:
    """For JSON, which knows no NaN."""
    return x if math.isfinite(x) else None
