"""The training loop: cross-entropy over random crops of one row of tokens.

Shape legend: N tokens in all, B sequences, L = T + 1 tokens of a crop, T predicted ones, V vocabulary.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from regla.train.config import TrainConfig
from regla.train.device import autocast

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_READ_EVERY = 10  # steps between looks at the loss, each of which waits for the device
_FINAL_STEPS = 20  # steps whose mean is the final training loss
_LAST_LR = 0.1  # of the peak
_MAX_GRADIENT_NORM = 1.0
_CALMER = "lower --lr or lengthen --warmup"


@dataclass
class Progress:
    """What a run has done so far; right also after an error or an interrupt."""

    steps: int = 0
    losses: list[float] = field(default_factory=list)
    """Cross-entropy of each step in nats, before its update."""
    seconds: list[float] = field(default_factory=list)
    """From the start of the first step to the end of each (on a GPU: of each group of steps read together)."""

    def read(self, losses: list[Tensor], started: float) -> None:
        """Take over the losses of the latest steps; waits for the device to finish them."""
        self.losses.extend(torch.stack(losses).tolist())
        self.seconds.extend([time.perf_counter() - started] * len(losses))
        if not math.isfinite(sum(self.losses[-len(losses) :])):
            raise FloatingPointError(f"The loss is no longer finite (by step {len(self.losses)}); {_CALMER}.")

    @property
    def train_loss(self) -> float | None:
        """Mean of the last 20 steps."""
        last = self.losses[-_FINAL_STEPS:]
        return sum(last) / len(last) if last else None

    def tokens_per_second(self, tokens_per_step: int) -> float | None:
        """Without the first ten steps (compilation, cold caches) where there are more."""
        first = _READ_EVERY if len(self.losses) > _READ_EVERY else 0
        if not self.losses:
            return None
        seconds = self.seconds[-1] - (self.seconds[first - 1] if first else 0.0)
        return (len(self.losses) - first) * tokens_per_step / seconds


def crops(tokens_N: Tensor, *, seed: int, batch: int, batch_size: int, length: int) -> Tensor:
    """Random crops [B, L], int64, on the device of `tokens_N`.

    They depend on the seed and the number of the batch alone: a run repeats exactly, and can go on from any step
    without replaying those before.
    """
    starts_B = np.random.default_rng([seed, batch]).integers(0, len(tokens_N) - length + 1, size=batch_size)
    index_BL = torch.from_numpy(starts_B).to(tokens_N.device, non_blocking=True)[:, None] + torch.arange(
        length, device=tokens_N.device
    )
    return tokens_N[index_BL].long()


def next_token_loss(model: nn.Module, crop_BL: Tensor) -> Tensor:
    """Mean cross-entropy in nats of each token given those before it in its crop."""
    logits_BTV = model(input_ids=crop_BL[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits_BTV.float().flatten(0, 1), crop_BL[:, 1:].flatten())


def learning_rate(step: int, *, steps: int, warmup: int, peak: float) -> float:
    """Linear from `peak / warmup` to `peak` in `warmup` steps, then half a cosine to a tenth of it in the last step."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - 1 - warmup)
    return peak * (_LAST_LR + (1 - _LAST_LR) * 0.5 * (1 + math.cos(math.pi * done)))


def make_optimizer(model: nn.Module, *, weight_decay: float, device: torch.device) -> torch.optim.AdamW:
    """AdamW; weights decay, vectors (norm gains, biases) do not."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=device.type == "cuda")


def optimise(
    model: PreTrainedModel, tokens_N: Tensor, config: TrainConfig, *, progress: Progress, stop: Callable[[], bool]
) -> None:
    """Train `model` in place on `tokens_N` (int32, on its device) until the last step, or `stop()` after any step.

    Raises FloatingPointError if the loss or what leads to it is no longer finite, at the latest ten steps after it
    happened.
    """
    device = tokens_N.device
    optimizer = make_optimizer(model, weight_decay=config.weight_decay, device=device)
    loss_of = torch.compile(next_token_loss, dynamic=False) if config.compile else next_token_loss
    model.train()
    steps = config.total_steps
    unread: list[Tensor] = []
    started = time.perf_counter()
    shown_every = 0.5 if sys.stderr.isatty() else 10.0  # seconds; a log file wants few lines
    total = steps * config.tokens_per_step
    with tqdm(total=total, unit="tok", unit_scale=True, desc="train", mininterval=shown_every) as bar:
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps=steps, warmup=config.warmup_steps, peak=config.lr)
            step_loss = torch.zeros((), device=device)
            for micro in range(config.accumulate):
                crop_BL = crops(
                    tokens_N,
                    seed=config.seed,
                    batch=step * config.accumulate + micro,
                    batch_size=config.batch_size,
                    length=config.seq_len + 1,
                )
                try:
                    with autocast(device, config.dtype):
                        loss = loss_of(model, crop_BL) / config.accumulate
                except ValueError as error:
                    if step == 0:
                        raise
                    # Every step has the same shapes, so behind the first only the numbers can be at fault.
                    raise FloatingPointError(f"Step {step + 1} failed: {error}; {_CALMER}.") from error
                loss.backward()
                step_loss += loss.detach()
            nn.utils.clip_grad_norm_(model.parameters(), _MAX_GRADIENT_NORM)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            progress.steps = step + 1
            unread.append(step_loss)
            last = progress.steps == steps or stop()
            if last or device.type == "cpu" or progress.steps % _READ_EVERY == 0:
                progress.read(unread, started)
                unread.clear()
                bar.set_postfix_str(f"loss {progress.losses[-1]:.3f}", refresh=False)
            bar.update(config.tokens_per_step)
            if last:
                break
