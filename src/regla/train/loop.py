"""The training loop: any loss over random crops of one row of tokens, cross-entropy unless another is given.

Shape legend: N tokens in all, B sequences, L = T + 1 tokens of a crop, T predicted ones, V vocabulary.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from tqdm import tqdm

from regla.layers.positions import ShortConvolution
from regla.models.packing import document_logits
from regla.ops.checks import numbers_unchecked
from regla.runtime.checkpoint import Checkpoints, check_finite
from regla.runtime.device import TF32_IN_TRAINING, autocast, float32_products
from regla.runtime.progress import READ_EVERY, Progress
from regla.train.config import LoopConfig
from regla.train.guards import Guards, figures, first_not_finite, in_forward_order
from regla.train.parallel import Parallel
from regla.train.regions import compiled_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from regla.train.carry import CarriedStates

_LAST_LR = 0.1  # of the peak
_MAX_GRADIENT_NORM = 1.0


Loss = Callable[[nn.Module, Tensor], Tensor]
"""(model, crop_BL int64) to the mean loss, a scalar with a gradient. Input are the crop's tokens but its last one."""


DECAYING = (nn.Linear, nn.Embedding, nn.EmbeddingBag, _ConvNd, ShortConvolution)
"""Modules whose `weight` decays: linear maps, embeddings, convolutions."""


Batches = Callable[[int], Tensor]
"""The number of a batch, from 0 on and through all of a run, to what the loss takes; it depends on nothing else, so
that a run can go on from any step."""


Count = Callable[[Tensor], "Tensor | int"]
"""A batch, or a part of one, to the number of its tokens that the loss is the mean of."""


class Group(TypedDict):
    """Parameters that share a learning rate: `lr_scale` times that of the run."""

    params: Iterable[nn.Parameter]
    lr_scale: float


def crops(tokens_N: Tensor, *, seed: int, batch: int, batch_size: int, length: int) -> Tensor:
    """Random crops [B, L], int64, on the device of `tokens_N`.

    They depend on the seed and the number of the batch alone: a run repeats exactly, and can go on from any step
    without replaying those before.
    """
    starts_B = crop_starts(len(tokens_N), seed=seed, batch=batch, batch_size=batch_size, length=length)
    index_BL = torch.from_numpy(starts_B).to(tokens_N.device, non_blocking=True)[:, None] + torch.arange(
        length, device=tokens_N.device
    )
    return tokens_N[index_BL].long()


def crop_starts(tokens: int, *, seed: int, batch: int, batch_size: int, length: int) -> np.ndarray:
    """Where the crops of a batch begin in `tokens` tokens, int64 [B]."""
    return np.random.default_rng([seed, batch]).integers(0, tokens - length + 1, size=batch_size)


def random_crops(tokens_N: Tensor, config: LoopConfig) -> Batches:
    """Crops of `config.seq_len + 1` tokens, `config.batch_size` of them in each batch."""
    return lambda batch: crops(
        tokens_N, seed=config.seed, batch=batch, batch_size=config.batch_size, length=config.seq_len + 1
    )


def next_token_loss(model: nn.Module, crop_BL: Tensor) -> Tensor:
    """Mean cross-entropy in nats of each token given those before it in its crop."""
    logits_BTV = model(input_ids=crop_BL[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits_BTV.float().flatten(0, 1), crop_BL[:, 1:].flatten())


def document_loss(end_of_text: int, *, together: bool) -> Loss:
    """`next_token_loss`, but of each token given those of its document in the crop; see `regla.models.packing`."""

    def loss(model: nn.Module, crop_BL: Tensor) -> Tensor:
        logits_BTV = document_logits(model, crop_BL[:, :-1], end_of_text, together=together)
        return F.cross_entropy(logits_BTV.float().flatten(0, 1), crop_BL[:, 1:].flatten())

    return loss


def predicted_tokens(crop_BL: Tensor) -> int:
    """How many tokens `next_token_loss` is the mean of."""
    return crop_BL.shape[0] * (crop_BL.shape[1] - 1)


def learning_rate(step: int, *, steps: int, warmup: int, peak: float) -> float:
    """Linear from `peak / warmup` to `peak` in `warmup` steps, then half a cosine to a tenth of it in the last step."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - 1 - warmup)
    return peak * (_LAST_LR + (1 - _LAST_LR) * 0.5 * (1 + math.cos(math.pi * done)))


def make_optimizer(
    model: nn.Module, *, weight_decay: float, device: torch.device, groups: Sequence[Group] | None = None
) -> torch.optim.AdamW:
    """AdamW over `groups`, by default all parameters of `model` that need a gradient, at one learning rate.

    Every group is split by role: what `decaying` names decays, and nothing else does. The groups of the optimiser say
    so under `role`, `decays` or `constant`.

    Raises:
        ValueError: `groups` have a parameter twice, or one that is not the model's.
    """
    weights = decaying(model)
    known = {id(parameter) for parameter in model.parameters()}
    seen: set[int] = set()
    split = []
    for group in groups or [Group(params=model.parameters(), lr_scale=1.0)]:
        parameters = [parameter for parameter in group["params"] if parameter.requires_grad]
        for parameter in parameters:
            if id(parameter) in seen or id(parameter) not in known:
                raise ValueError(
                    f"A parameter of shape {tuple(parameter.shape)} "
                    + ("is in two groups" if id(parameter) in seen else "is none of the model's")
                    + "; give each parameter of the model at most once."
                )
            seen.add(id(parameter))
        for role, decay in (("decays", weight_decay), ("constant", 0.0)):
            chosen = [parameter for parameter in parameters if (id(parameter) in weights) == (role == "decays")]
            if chosen:
                split.append({"params": chosen, "role": role, "weight_decay": decay, "lr_scale": group["lr_scale"]})
    return torch.optim.AdamW(split, betas=(0.9, 0.95), fused=device.type == "cuda")


def decaying(model: nn.Module) -> set[int]:
    """The ids of the parameters that decay: weights of linear maps, embeddings and convolutions.

    The module that owns a parameter decides, not its shape: norms, biases, temperatures, means and scales do not decay,
    and neither do parameters of modules whose role is unknown. A tied weight decays where one of its roles does.
    """
    return {id(module.weight) for module in model.modules() if isinstance(module, DECAYING)}


def token_bar(total: int, done: int, *, shown: bool = True) -> tqdm:
    """The progress of a training in tokens, with the time that is left."""
    every = 0.5 if sys.stderr.isatty() else 10.0  # seconds; a log file wants few lines
    return tqdm(
        total=total, initial=done, unit="tok", unit_scale=True, desc="train", mininterval=every, disable=not shown
    )


def finite_step(optimizer: torch.optim.Optimizer, numbers: Tensor) -> bool:
    """Whether to make the step of a loss and a gradient's norm, `numbers`; keeps those that are not finite from the
    weights.

    On a GPU the answer would wait for the device. There the fused kernel is told, as torch.amp.GradScaler tells it, and
    changes nothing where one of them is not finite.
    """
    finite = torch.isfinite(numbers).all()
    if all(group["fused"] for group in optimizer.param_groups):
        optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
        return True
    return bool(finite)


def _is_due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0


def optimise(
    model: PreTrainedModel,
    tokens: Tensor | Batches,
    config: LoopConfig,
    *,
    progress: Progress,
    stop: Callable[[], bool],
    loss: Loss = next_token_loss,
    count: Count = predicted_tokens,
    groups: Sequence[Group] | None = None,
    checkpoints: Checkpoints | None = None,
    evaluate: Callable[[], float] | None = None,
    inspect: Callable[[], dict[str, Any]] | None = None,
    log: Callable[[dict[str, Any]], None] | None = None,
    parallel: Parallel | None = None,
    carry: CarriedStates | None = None,
    bar: tqdm | None = None,
) -> None:
    """Train `model` in place until the last step, or `stop()` after any step.

    `tokens` are int32 [N] on its device, of which batches are random crops of `config.seq_len + 1` tokens, int64; or a
    function of the batch's number. `loss(model, batch)` is minimised, the mean over
    `count(batch)` tokens; of a step, the mean over those of all its batches. It runs under the
    autocast of `config.dtype`, and is compiled where `config.compile` says so,
    the blocks of `model` and what is around them as regions of their own, see `regla.train.regions`.
    `groups`, each `{"params": parameters, "lr_scale": factor}`, are what is trained and how fast in relation to
    `config.lr`; other parameters stay as they are. None: all of `model` at `config.lr`.

    `checkpoints` are what the run goes on from and what it saves every `config.save_steps` steps and where `stop()`
    ends it. `evaluate()` is called every `config.eval_every` steps and returns a validation loss;
    `inspect()` every `config.inspect_every` steps, or with `evaluate`, and returns what the log has under `"layers"`.
    `log` receives
    `{"step", "tokens", "loss", "lr", "gradient_norm", "tokens_per_second", "seconds"}` and, where there is
    one, `"validation_loss"`, each time the losses are read: after every step on a CPU, every tenth elsewhere; `loss`
    and `tokens_per_second` are the means since the record before. `"skipped"` and `"spikes"` are there where a step
    was one, see `regla.train.guards`; a loss or norm that is not finite is None.

    `bar` shows the progress of a longer whole, of which this run is a part; it moves by the tokens of each step. None:
    that of this run alone.

    `parallel` shares the work with other processes, each of which calls this with the same arguments; `log` is the
    first one's. `carry` takes states on from batch to batch, whose order then is that of `tokens`, a function.

    A step whose loss or gradient is not finite is skipped: its batch is passed over, and weights and the optimiser's
    state stay as they are. No weights that are not finite are saved.

    Raises:
        FloatingPointError: more than `config.most_skipped` of the last 100 steps were skipped, or a weight is no
            longer finite. It is raised at the latest ten steps after it happened, and before anything of it is saved.
        OSError: a checkpoint cannot be written.
    """
    device = model.device
    parallel = parallel or Parallel()
    called = parallel.prepare(model, config)
    batch_of = random_crops(tokens, config) if isinstance(tokens, Tensor) else tokens
    optimizer = make_optimizer(model, weight_decay=config.weight_decay, device=device, groups=groups)
    names, trained = in_forward_order(
        model, [parameter for group in optimizer.param_groups for parameter in group["params"]]
    )
    guards = Guards(names, progress, config.most_skipped)
    if checkpoints is not None:
        checkpoints.restore(model, optimizer, progress)
        if carry is not None:
            carry.load(checkpoints.carried)
    if config.activation_checkpointing:
        # Newer transformers warn about the second name, older ones lack the first.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
    model.train()
    steps = config.total_steps
    unread: list[Tensor] = []
    read_at = started = time.perf_counter()
    total = steps * config.tokens_per_step
    first = progress.steps
    done = first * config.tokens_per_step
    with (
        compiled_blocks(model) if config.compile else nullcontext(),
        numbers_unchecked(),  # a step that is not finite is skipped
        nullcontext(bar) if bar is not None else token_bar(total, done, shown=parallel.processes.is_first) as bar,
    ):
        loss_of = torch.compile(loss, dynamic=False) if config.compile else loss

        def batches_of(step: int) -> list[Tensor]:
            return [batch_of(step * config.accumulate + micro) for micro in range(config.accumulate)]

        def layer_of(step: int) -> str | None:
            """The first layer whose output is not finite in the batches of a step, with the weights as they are."""

            def forward() -> None:
                for batch in batches_of(step):
                    part = parallel.part(batch)
                    with parallel.batch(last=False), autocast(device, config.dtype):
                        loss(called, part)

            return first_not_finite(model, forward, parallel.processes)

        for step in range(first, steps):
            rate = learning_rate(step, steps=steps, warmup=config.warmup_steps, peak=config.lr)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["lr_scale"]
            step_loss = torch.zeros((), device=device)
            with float32_products(tf32=config.dtype in TF32_IN_TRAINING):
                batches = batches_of(step)
                tokens_of_step = sum(count(batch) for batch in batches)
                for micro, batch in enumerate(batches):
                    part = parallel.part(batch)
                    carried = nullcontext() if carry is None else carry.open(micro, part)
                    with parallel.batch(last=micro + 1 == config.accumulate), carried:
                        with autocast(device, config.dtype):
                            part_loss = loss_of(called, part)
                        # Times the number of processes, as gradients and losses are their mean.
                        part_loss = part_loss * (count(part) * parallel.processes.count / tokens_of_step)
                        part_loss.backward()
                    step_loss += part_loss.detach()
            step_loss = parallel.processes.mean(step_loss)
            parallel.reduce(trained)
            norm, norms_P = parallel.clip(trained, _MAX_GRADIENT_NORM)
            if finite_step(optimizer, torch.stack([step_loss, norm])):
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            progress.steps = step + 1
            unread.append(figures(step_loss, norm, norms_P))
            complete = progress.steps == steps
            last = complete or stop()
            due = checkpoints is not None and (not complete or checkpoints.completed)
            save = due and (last or progress.steps % config.save_steps == 0)
            score = evaluate is not None and _is_due(config.eval_every, progress.steps)
            look = inspect is not None and _is_due(config.inspect_every or config.eval_every, progress.steps)
            if last or save or score or look or device.type == "cpu" or progress.steps % READ_EVERY == 0:
                found = guards.read(unread)
                progress.note_time(len(unread), started)
                broken = [one for one in found.get("skipped", ()) if one["loss"] is None]
                if broken:
                    broken[0]["layer"] = layer_of(broken[0]["step"] - 1)
                now = time.perf_counter()
                record = {
                    "step": progress.steps,
                    "tokens": progress.steps * config.tokens_per_step,
                    "lr": rate,
                    "tokens_per_second": len(unread) * config.tokens_per_step / (now - read_at),
                    "seconds": progress.total_seconds,
                } | found
                unread.clear()
                if progress.losses:
                    bar.set_postfix_str(f"loss {progress.losses[-1]:.3f}", refresh=False)
                try:
                    if save or last:
                        check_finite(model, optimizer, progress.steps, parallel.processes)
                    guards.check(record)
                except FloatingPointError as error:  # of figures that all processes have: each of them meets it
                    if log is not None:
                        log(record)
                    raise parallel.processes.shared(error) from error
                if score or look:
                    with torch.compiler.set_stance("force_eager"):  # its shapes are others, each a compilation
                        if score and evaluate is not None:
                            record["validation_loss"] = evaluate()
                        if look and inspect is not None:
                            record["layers"] = inspect()
                    model.train()
                if log is not None:
                    log(record)
                if save and checkpoints is not None:
                    checkpoints.save(model, optimizer, progress, None if carry is None else carry.whole())
                read_at = time.perf_counter()
                progress.seconds_aside += read_at - now
            bar.update(config.tokens_per_step)
            if last:
                break
