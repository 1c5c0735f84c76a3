"""The training stages of a conversion, each with checkpoints of its own, all through the one training loop."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from regla.linearize.config import LONG, LONG_LR, ORIGINAL_LR, TRANSFER, LinearizeConfig
from regla.linearize.losses import distillation_loss, transfer_loss
from regla.linearize.resume import settings, stage_folder
from regla.linearize.summary import write_summary
from regla.models.student import linear_attention
from regla.runtime.checkpoint import FOLDER as CHECKPOINTS
from regla.runtime.checkpoint import Checkpoints, found_in
from regla.runtime.log import TrainingLog, read_log
from regla.runtime.progress import Progress
from regla.runtime.signals import Signals
from regla.train.config import LoopConfig
from regla.train.loop import Group, Loss, next_token_loss, optimise, token_bar
from regla.train.regions import compiled_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Stage:
    """One stage: how it trains, and where it goes on."""

    name: str
    config: LoopConfig
    checkpoints: Checkpoints
    complete: bool
    """A later stage has checkpoints, which hold what this one has left."""

    @property
    def steps_before(self) -> int:
        """Steps of this stage that need not be made again."""
        return self.config.total_steps if self.complete else self.checkpoints.step


def plan_stages(config: LinearizeConfig, data_hash: str) -> list[Stage]:
    """The stages that have any steps, in order.

    Raises:
        ValueError: the checkpoint to resume from is damaged, or of other settings or data.
    """
    assert config.out is not None
    weights_depend_on = settings(config, asdict(config)) | {"--data (SHA-256 of its tokens)": data_hash}
    stages: list[Stage] = []
    for number, plan in reversed(list(enumerate(config.stages, 1))):
        folder = stage_folder(config.out, number)
        complete = any(stage.complete or found_in(stage.checkpoints.folder) for stage in stages)
        resume = None if complete else config.resume
        if resume == "previous" and not found_in(folder / CHECKPOINTS):
            resume = "latest"  # there is none yet; the one that is damaged is of the stage before
        run = LoopConfig(
            steps=plan.steps,
            seq_len=plan.seq_len,
            batch_size=plan.batch_size,
            lr=config.lr * (LONG_LR if plan.name == LONG else 1.0),
            weight_decay=0.0,
            seed=config.seed + number,  # other crops than calibration and the stage before
            dtype=config.dtype,
            compile=config.compile and plan.name != TRANSFER,  # hooks do not survive compilation
            save_every=config.save_every,
        )
        checkpoints = Checkpoints(folder, weights_depend_on, resume=resume, completed=True)
        stages.insert(0, Stage(plan.name, run, checkpoints, config.resume is not None and complete))
    return stages


def resumed(stages: Sequence[Stage]) -> bool:
    """Whether the weights come from a checkpoint."""
    return any(stage.checkpoints.resumed for stage in stages)


def run_stages(
    original: PreTrainedModel,
    model: PreTrainedModel,
    new: Sequence[int],
    tokens_N: Tensor,
    stages: Sequence[Stage],
    *,
    config: LinearizeConfig,
    summary: dict[str, Any],
    after_transfer: Callable[[], None],
) -> int | None:
    """Train `model` in place; the figures of each stage go to `summary` and to the folder.

    Args:
        original: the teacher.
        model: the student.
        new: the layers that learn in attention transfer; empty: all linear ones.
        tokens_N: text, int32 [N].
        stages: see `plan_stages`.
        config: the arguments of the conversion.
        summary: gets the figures.
        after_transfer: called behind attention transfer, also where it was done before.

    Returns:
        The signal that ended the training early, or None.

    Raises:
        FloatingPointError: a loss or gradient that is no longer finite; names the last checkpoint.
        OSError: a checkpoint cannot be written.
    """
    assert config.out is not None
    out = Path(config.out)
    before = 0
    done = 0
    total = sum(stage.config.total_steps * stage.config.tokens_per_step for stage in stages)
    after = sum(stage.steps_before for stage in stages)
    with Signals() as signals, TrainingLog(out, after=after) as log:
        for number, stage in enumerate(stages, 1):
            if stage.complete:
                print(f"Stage {number}, {stage.name}: done before")
            else:
                print(_announcement(number, stage, len(tokens_N)))
                first = done + stage.steps_before * stage.config.tokens_per_step
                progress = Progress()
                loss, groups = _recipe(stage, original, model, new, config)
                try:
                    with (
                        compiled_blocks(original) if stage.config.compile else nullcontext(),
                        token_bar(total, first) as bar,
                    ):
                        optimise(
                            model,
                            tokens_N,
                            stage.config,
                            progress=progress,
                            stop=lambda: signals.received is not None,
                            checkpoints=stage.checkpoints,
                            loss=loss,
                            groups=groups,
                            log=_log_of(log, stage.name, before),
                            bar=bar,
                        )
                except FloatingPointError as error:
                    raise FloatingPointError(f"{error} {stage.checkpoints.kept}") from error
                summary["stages"][stage.name] = figures = _figures(stage, progress, out)
                print(
                    f"{stage.name}: loss {figures['first_loss']:.3f} at first, {figures['last_loss']:.3f} over the "
                    "last steps"
                )
                write_summary(out, summary)
                if signals.received is not None:
                    break
            before += stage.config.total_steps
            done += stage.config.total_steps * stage.config.tokens_per_step
            if stage.name == TRANSFER:
                after_transfer()
                if signals.received is not None:
                    break
    return signals.received


def remove_checkpoints(stages: Sequence[Stage]) -> None:
    """Of a conversion that is finished."""
    for stage in stages:
        shutil.rmtree(stage.checkpoints.folder.parent, ignore_errors=True)


def _recipe(
    stage: Stage, original: PreTrainedModel, model: PreTrainedModel, new: Sequence[int], config: LinearizeConfig
) -> tuple[Loss, list[Group]]:
    """What a stage minimises, and what learns how fast."""
    layers = linear_attention(model)
    if stage.name == TRANSFER:
        learning = {number: layers[number] for number in new or layers}
        return transfer_loss(original, learning), [Group(params=_mixers(learning.values()), lr_scale=1.0)]
    mixers = _mixers(layers.values())
    own = set(mixers)
    rest = [parameter for parameter in model.parameters() if parameter not in own]
    scale = ORIGINAL_LR if config.original_lr is None else config.original_lr / config.lr
    loss = next_token_loss if config.preset == "paper" else distillation_loss(original)
    return loss, [Group(params=mixers, lr_scale=1.0), Group(params=rest, lr_scale=scale)]


def _mixers(layers: Any) -> list[nn.Parameter]:
    return [parameter for layer in layers for parameter in layer.parameters()]


def _announcement(number: int, stage: Stage, text: int) -> str:
    config, checkpoint = stage.config, stage.checkpoints.resumed
    tokens = config.total_steps * config.tokens_per_step
    return (
        f"Stage {number}, {stage.name}: {config.total_steps:,} steps of {config.batch_size} x {config.seq_len} tokens, "
        f"{tokens / text:.2g} epochs of the text" + (f"; goes on from {checkpoint}" if checkpoint is not None else "")
    )


def _log_of(log: TrainingLog, stage: str, before: int) -> Callable[[dict[str, Any]], None]:
    """Records with the number of the step in the whole conversion."""

    def write(record: dict[str, Any]) -> None:
        steps = {
            name: [event | {"step": before + event["step"]} for event in record[name]]
            for name in ("skipped", "spikes")
            if name in record
        }
        log(record | steps | {"step": before + record["step"], "stage": stage})

    return write


def _figures(stage: Stage, progress: Progress, out: Path) -> dict[str, Any]:
    records = [record for record in read_log(out) if record.get("stage") == stage.name]
    logged = [record["loss"] for record in records if record["loss"] is not None]
    first = (logged if stage.checkpoints.resumed is not None and logged else progress.losses)[0]
    return {
        "steps": progress.steps,
        "tokens": progress.steps * stage.config.tokens_per_step,
        "seconds": progress.total_seconds,
        "first_loss": first,
        "last_loss": progress.train_loss,
        "skipped_steps": progress.skipped,
        "loss_spikes": progress.spikes,
    }
