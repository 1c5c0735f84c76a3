"""A whole training run: text to a Hugging Face folder with its tokenizer, scores and the arguments that made it."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import signal
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from regla.eval.inspection import layer_figures, linear_layers
from regla.eval.perplexity import mean_score
from regla.models.families import last_position
from regla.models.folders import load_model
from regla.models.modeling import ReGLAForCausalLM
from regla.models.packing import all_linear
from regla.models.student import Student
from regla.runtime.checkpoint import FOLDER as CHECKPOINTS
from regla.runtime.checkpoint import Checkpoints, found_in, is_finite, whole_weights
from regla.runtime.device import float32_products, out_of_memory, pick_device
from regla.runtime.distributed import Processes, is_lost, processes
from regla.runtime.errors import OptionError, OptionMemoryError
from regla.runtime.files import alone_in, check_new, content_of, new_folder_alone, remove_unfinished, write_json
from regla.runtime.log import FILE as LOG
from regla.runtime.log import TENSORBOARD, TrainingLog, check_tensorboard
from regla.runtime.options import by_flag, with_effect
from regla.runtime.progress import CALMER, Progress
from regla.runtime.signals import Interrupted, Signals
from regla.runtime.versions import commit, device_name, versions
from regla.train.carry import CarriedStates, check_carries
from regla.train.config import TrainConfig
from regla.train.loop import optimise
from regla.train.material import Material, material
from regla.train.model import match_softmax, model_config
from regla.train.parallel import parallel_of

SUMMARY = "training.json"
_OF_A_BEGINNING = (LOG, TENSORBOARD, CHECKPOINTS)  # what a run writes before its model
_LENGTH = ("--steps", "--tokens")  # what may differ where a finished run goes on


@float32_products()
def train(config: TrainConfig) -> dict[str, Any]:
    """Train a model as `config` says, save it to `config.out`, score it, and return what `training.json` there holds.

    Everything that can be wrong with the input is found before the first step. While it runs, `out` is held by this
    process alone, with the log (`log.jsonl`) and the last two checkpoints. Ctrl-C and SIGTERM end the run after the
    current step, save a checkpoint and the model as it is then, and raise Interrupted. Any other error behind the first
    step saves the model, too, unless the weights are spoilt (FloatingPointError) or the disk is full (OSError): those
    name the last checkpoint.

    Several processes, which torchrun has started, share every step as `config.parallel` says; the first writes and
    prints. What is wrong in one of them ends all, and only Ctrl-C and SIGTERM save a checkpoint then.

    On a CPU a resumed run ends in the same weights, bit for bit, as one that nothing disturbed. A finished run that is
    resumed with more steps goes on from its last checkpoint, with the learning rates of the longer run from there on.

    Raises:
        ValueError: whatever can be wrong with the input, or another process is at work in `out`.
        FloatingPointError: the loss, a gradient, a weight or the validation loss is not finite.
        MemoryError: that of the device is too small.
        OSError: the disk is full or refuses.
        OtherProcessError, LostProcessError: another of several processes failed, or is gone.
    """
    if config.tensorboard:
        check_tensorboard()
    with processes(pick_device(config.device)) as (found, device), ExitStack() as held:
        try:
            return _train(config, found, device, held)
        except BaseException as error:
            if not out_of_memory(error):
                raise
            raise OptionMemoryError(
                "The memory of the device is full; lower {batch_size} and raise {accumulate} to match, or take a "
                "smaller model."
            ) from error


def _train(config: TrainConfig, all_: Processes, device: torch.device, held: ExitStack) -> dict[str, Any]:
    out = Path(config.out)
    parallel = parallel_of(config, all_)
    with all_.together():
        goes_on = config.resume is not None and out.is_dir()
        if all_.is_first:
            if goes_on:
                held.enter_context(alone_in(out, "run"))
            _check_out(config)
        source = material(config)
        torch.manual_seed(config.seed)
        model, softmax_parameters = _model(config, source)
        source.check(model)
        if config.inspect_every is not None and not linear_layers(model):
            raise OptionError(
                "{inspect_every} is given, but the model has no linear layers to look into: leave it out."
            )
        if config.carry_state:
            if config.parallel == "sequence" and not all_.is_alone:
                raise OptionError(
                    "{carry_state} is given with {parallel} sequence, whose processes have other tokens of a sequence; "
                    "use {parallel} ddp or fsdp, or a longer {seq_len} without {carry_state}."
                )
            check_carries(model)
        parallel.check(model, config)
        if config.reset_at_documents and not all_linear(model) and config.batch_size % all_.count:
            raise OptionError(  # each process runs its sequences one by one, and all have to run as many
                "{batch_size} is {value}, but {reset_at_documents} with softmax layers needs a multiple of the {count} "
                "processes; change it.",
                value=config.batch_size,
                count=all_.count,
            )
        model.to(device)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        settings = _settings(config, model) | source.settings
    _check_alike(settings, all_)
    free = _LENGTH if _extends(config) else ()
    checkpoints = Checkpoints(out, settings, resume=config.resume, free=free, processes=all_)
    with all_.together():
        if all_.is_first and not goes_on:
            held.enter_context(new_folder_alone(out, "run"))
    against = f" ({parameters / softmax_parameters - 1:+.2%} against softmax)" if softmax_parameters else ""
    print(
        f"{config.init or config.mixer}: {parameters:,} parameters{against}, "
        f"MLP width {model.config.intermediate_size}, vocabulary {model.config.vocab_size:,}; "
        f"{source.described}; "
        f"{config.total_steps:,} steps of {config.tokens_per_step:,} tokens on {device.type}"
        + ("" if all_.is_alone else f", {all_.count} processes ({config.parallel})")
    )
    if config.resume is not None:
        print(f"Goes on from {checkpoints.resumed or 'the start: there is no checkpoint yet'}.")

    summary: dict[str, Any] = {
        "arguments": asdict(config),
        "parameters": parameters,
        "softmax_parameters": softmax_parameters,
        "intermediate_size": model.config.intermediate_size,
        "device": device_name(device) if device.type == "cuda" else "cpu",
        "processes": all_.count,
        "versions": versions(),
        "commit": commit(),
        **source.facts,
    }
    progress = Progress()
    carry = None
    if config.carry_state:
        carry = CarriedStates(model, end=source.end_of_text, rows=config.batch_size, processes=all_)

    def inspect() -> dict[str, Any]:
        return layer_figures(model, source.sample(), dtype=config.dtype)

    def save() -> None:
        weights = None if all_.is_alone else whole_weights(model, all_)
        with all_.together():
            if all_.is_first:
                write(weights)

    def write(weights: dict[str, Tensor] | None) -> None:
        try:
            remove_unfinished(out)
            model.save_pretrained(out, state_dict=weights)
            source.save(out)
            summary.update(
                steps=progress.steps,
                complete=progress.steps == config.total_steps,
                tokens=progress.steps * config.tokens_per_step,
                seconds=progress.total_seconds,
                tokens_per_second=progress.tokens_per_second(config.tokens_per_step),
                train_loss=progress.train_loss,
                skipped_steps=progress.skipped,
                loss_spikes=progress.spikes,
                **source.drawn(progress.steps),
            )
            write_json(out / SUMMARY, summary)
        except (OSError, SafetensorError) as error:
            raise OSError(f"The model cannot be written to {out} ({error}). {checkpoints.kept}") from error

    with Signals(patient=not all_.is_alone) as signals:
        try:
            with ExitStack() as logged:
                log = None
                if all_.is_first:
                    log = TrainingLog(out, after=checkpoints.step, tensorboard=config.tensorboard)
                    logged.enter_context(log)
                optimise(
                    model,
                    source.batches(device),
                    config,
                    progress=progress,
                    stop=lambda: all_.any(signals.received is not None),
                    checkpoints=checkpoints,
                    loss=source.loss,
                    count=source.count,
                    evaluate=lambda: source.validate(model),
                    inspect=inspect if linear_layers(model) else None,
                    log=log,
                    parallel=parallel,
                    carry=carry,
                )
        except (FloatingPointError, OSError) as error:
            if all_.is_first:
                _tidy(out)
            raise type(error)(f"{error} {checkpoints.kept}") from error
        except BaseException as error:
            if is_lost(error):
                raise all_.lost(checkpoints.kept) from error
            if not all_.is_alone:
                raise
            if progress.steps > checkpoints.step and is_finite(model):
                save()
                print(
                    f"Stopped by {type(error).__name__} in step {progress.steps + 1}; the model as it was is in {out}. "
                    f"{checkpoints.kept}"
                )
            _tidy(out)
            raise
        save()
    if progress.steps < config.total_steps:
        print(
            f"Interrupted after {progress.steps} of {config.total_steps} steps; the model as it is now is in {out}. "
            f"{checkpoints.kept}"
        )
        raise Interrupted(signals.received or signal.SIGTERM)

    if progress.skipped or progress.spikes:
        print(
            f"Steps skipped because a loss or gradient was not finite: {progress.skipped}. Loss spikes: "
            f"{progress.spikes}. {out / LOG} says which steps."
        )
    if len(summary.get("data", ())) > 1:
        drawn = (f"{one['name']} {one['share']:.1%}, {one['epochs']:.2f} epochs" for one in summary["data"])
        print(f"Trained on {'; '.join(drawn)}.")
    scores = source.scores(model, summary)
    mean = mean_score(scores)
    summary |= {
        "validation": [asdict(row) for row in scores],
        "validation_loss": mean.loss,
        "validation_perplexity": mean.perplexity,
    }
    with all_.together():
        if all_.is_first:
            write_json(out / SUMMARY, summary)
    if not math.isfinite(mean.loss):
        raise FloatingPointError(f"The validation loss of the model in {out} is not finite; {CALMER}.")
    print(f"Validation loss {mean.loss:.4f}, perplexity {mean.perplexity:.2f}. Saved to {out}.")
    return summary


def _check_out(config: TrainConfig) -> None:
    """Raise ValueError unless `config.out` is new, or is to be resumed and holds nothing but a run's beginning."""
    out = Path(config.out)
    found = found_in(out / CHECKPOINTS)
    if config.resume is None:
        if found:
            raise OptionError(
                "{folder} is not empty; give {out} a new folder, or {resume} to go on from its {newest}.",
                folder=out,
                newest=found[-1].name,
            )
        check_new(out)
    elif out.is_dir() and not found and any(entry.name not in _OF_A_BEGINNING for entry in content_of(out)):
        raise OptionError(
            "{folder} holds no checkpoint to resume from; give {out} the folder of a run, or a new one.", folder=out
        )


def _extends(config: TrainConfig) -> bool:
    """Whether the run resumed is finished, and is to be longer now."""
    try:
        summary = json.loads((Path(config.out) / SUMMARY).read_text(encoding="utf-8"))
        return config.resume is not None and summary["complete"] and config.total_steps > summary["steps"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _settings(config: TrainConfig, model: PreTrainedModel) -> dict[str, Any]:
    """What the weights of a run depend on but its text, by option."""
    options = by_flag(with_effect(config))
    if config.init is not None:
        digest = hashlib.sha256()
        for name, weight in model.state_dict().items():
            digest.update(name.encode() + weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        options["--init (SHA-256 of its weights)"] = digest.hexdigest()
    return options


def _check_alike(settings: dict[str, Any], all_: Processes) -> None:
    """Raise ValueError where a process has other options or another text than the first."""
    of_first = all_.value_of_first(settings)
    with all_.together():
        for name, value in of_first.items():
            if settings.get(name) != value:
                raise ValueError(
                    f"Process {all_.rank} has {name} {settings.get(name)}, but process 0 has {value}; give all of them "
                    "the same command and the same files."
                )


def _tidy(out: Path) -> None:
    """Empty the folder of a run that left nothing to use, so that the same command may run again."""
    remove_unfinished(out)
    if not found_in(out / CHECKPOINTS) and not (out / SUMMARY).exists():
        for entry in (path for name in _OF_A_BEGINNING if (path := out / name).exists()):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _model(config: TrainConfig, source: Material) -> tuple[PreTrainedModel, int | None]:
    """The model to train, and the parameters of the softmax model of its shape where it is a new one."""
    if config.init is None:
        planned = model_config(config, vocab_size=source.vocab_size, end_of_text=source.end_of_text)
        matched, softmax_parameters = match_softmax(planned)
        return ReGLAForCausalLM(matched), softmax_parameters
    model = load_model(config.init, torch.device("cpu"))
    if not isinstance(model, ReGLAForCausalLM | Student):
        raise OptionError(
            "{init} {folder} holds a model of type {kind}, expected one of regla; convert it with `regla linearize` "
            "first.",
            folder=config.init,
            kind=model.config.model_type,
        )
    limit = last_position(model.config)
    if limit is not None and config.seq_len > limit:
        raise OptionError(
            "{seq_len} is {value}, but the model in {init} {folder} has learnt positions for {limit} tokens; lower "
            "{seq_len}.",
            value=config.seq_len,
            folder=config.init,
            limit=limit,
        )
    longest = max(model.config.max_position_embeddings, config.seq_len)
    model.config.max_position_embeddings = longest
    return model, None
