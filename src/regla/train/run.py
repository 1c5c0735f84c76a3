"""A whole training run: text to a Hugging Face folder with its tokenizer, scores and the arguments that made it."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from safetensors import SafetensorError

import regla
from regla.data.embedded import embedded_text
from regla.data.records import read_dataset
from regla.data.sources import HELD_OUT, Source, encode_source, read_source
from regla.data.text import Text
from regla.data.tokenizer import end_of_text_id, first_id, load_tokenizer, train_tokenizer, vocabulary_size
from regla.eval.perplexity import Score, beyond_the_model, mean_score, position_table, score, table
from regla.models.modeling import ReGLAForCausalLM
from regla.runtime.checkpoint import FOLDER as CHECKPOINTS
from regla.runtime.checkpoint import Checkpoints, found_in
from regla.runtime.device import pick_device
from regla.runtime.files import check_new, new_folder
from regla.runtime.log import FILE as LOG
from regla.runtime.log import TENSORBOARD, TrainingLog, check_tensorboard
from regla.runtime.progress import Progress
from regla.runtime.signals import Interrupted, Signals
from regla.train.config import DEFAULT_VOCAB_SIZE, TrainConfig
from regla.train.loop import optimise
from regla.train.model import count_parameters, match_softmax, model_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SUMMARY = "training.json"
_OF_A_BEGINNING = (LOG, TENSORBOARD, CHECKPOINTS)  # what a run writes before its model
_CHARACTERS_PER_TOKEN = 8  # of a data set: more than English text has in any tokenizer, so that crops repeat little
_WITHOUT_EFFECT = {  # options that do not change what a step computes; the data count by their tokens
    *("out", "data", "valid", "tokenizer", "device", "compile", "activation_checkpointing"),
    *("save_every", "resume", "eval_every", "eval_context", "tensorboard", "text_field", "dataset"),
}


def train(config: TrainConfig) -> dict[str, Any]:
    """Train a model as `config` says, save it to `config.out`, score it, and return what `training.json` there holds.

    Everything that can be wrong with the input is found before the first step. While it runs, `out` holds the log
    (`log.jsonl`) and the last two checkpoints. Ctrl-C and SIGTERM end the run after the current step, save a checkpoint
    and the model as it is then, and raise Interrupted. Any other error behind the first step saves the model, too,
    unless the weights are spoilt (FloatingPointError) or the disk is full (OSError): those name the last checkpoint.

    On a CPU a resumed run ends in the same weights, bit for bit, as one that nothing disturbed.
    """
    _check_out(config)
    if config.tensorboard:
        check_tensorboard()
    device = pick_device(config.device)
    train_sources, valid_sources = _sources(config)
    tokenizer = _tokenizer(config, train_sources, valid_sources)
    train_ids_N = np.concatenate([source.tokens(tokenizer) for source in train_sources])
    if len(train_ids_N) <= config.seq_len:
        raise ValueError(
            f"The training text has {len(train_ids_N)} tokens, expected more than --seq-len {config.seq_len}; "
            "give more text or a smaller --seq-len."
        )
    valid_texts = [encode_source(source, tokenizer) for source in valid_sources]
    for text in valid_texts:
        if config.eval_context is not None and len(text.ids) < config.eval_context:
            raise ValueError(
                f"The validation text {text.name} has {len(text.ids)} tokens, fewer than --eval-context "
                f"{config.eval_context}; give more text or a shorter context."
            )

    torch.manual_seed(config.seed)
    model_configuration, softmax_parameters = match_softmax(
        model_config(config, vocab_size=vocabulary_size(tokenizer), end_of_text=end_of_text_id(tokenizer))
    )
    model = ReGLAForCausalLM(model_configuration).to(device)
    parameters = count_parameters(model_configuration)
    checkpoints = Checkpoints(config.out, _settings(config, train_ids_N), resume=config.resume)
    out = Path(config.out) if config.resume is not None and Path(config.out).is_dir() else new_folder(config.out)
    print(
        f"{config.mixer}: {parameters:,} parameters ({parameters / softmax_parameters - 1:+.2%} against softmax), "
        f"MLP width {model_configuration.intermediate_size}, vocabulary {model_configuration.vocab_size:,}; "
        f"{len(train_ids_N):,} tokens of text; "
        f"{config.total_steps:,} steps of {config.tokens_per_step:,} tokens on {device.type}"
    )
    if config.resume is not None:
        print(f"Goes on from {checkpoints.resumed or 'the start: there is no checkpoint yet'}.")

    summary: dict[str, Any] = {
        "arguments": asdict(config),
        "parameters": parameters,
        "softmax_parameters": softmax_parameters,
        "intermediate_size": model_configuration.intermediate_size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "versions": {
            "regla": regla.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "text_tokens": len(train_ids_N),
    }
    progress = Progress()

    def save() -> None:
        try:
            model.save_pretrained(out)
            tokenizer.save_pretrained(out)
            summary.update(
                steps=progress.steps,
                complete=progress.steps == config.total_steps,
                tokens=progress.steps * config.tokens_per_step,
                seconds=progress.total_seconds,
                tokens_per_second=progress.tokens_per_second(config.tokens_per_step),
                train_loss=progress.train_loss,
            )
            _write(out, summary)
        except (OSError, SafetensorError) as error:
            raise OSError(f"The model cannot be written to {out} ({error}). {checkpoints.kept}") from error

    def validate(seq_len: int = config.seq_len, *, by_position: bool = False) -> list[Score]:
        return [
            score(
                model,
                text,
                first=first_id(tokenizer),
                seq_len=seq_len,
                batch_size=config.batch_size,
                dtype=config.dtype,
                by_position=by_position,
            )
            for text in valid_texts
        ]

    with Signals() as signals:
        try:
            with TrainingLog(out, after=checkpoints.step, tensorboard=config.tensorboard) as log:
                optimise(
                    model,
                    torch.from_numpy(train_ids_N).to(device),
                    config,
                    progress=progress,
                    stop=lambda: signals.received is not None,
                    checkpoints=checkpoints,
                    evaluate=lambda: mean_score(validate()).loss,
                    log=log,
                )
        except (FloatingPointError, OSError) as error:
            _tidy(out)
            raise type(error)(f"{error} {checkpoints.kept}") from error
        except BaseException as error:
            if progress.steps > checkpoints.step:
                save()
                print(
                    f"Stopped by {type(error).__name__} in step {progress.steps + 1}; the model as it was is in {out}. "
                    f"{checkpoints.kept}"
                )
            _tidy(out)
            if isinstance(error, torch.OutOfMemoryError):
                advice = "lower --batch-size and raise --accumulate to match"
                raise MemoryError(f"The memory of the GPU is full; {advice}.") from error
            raise
        save()
    if not summary["complete"] and signals.received is not None:
        print(
            f"Interrupted after {progress.steps} of {config.total_steps} steps; the model as it is now is in {out}. "
            f"{checkpoints.kept}"
        )
        raise Interrupted(signals.received)

    scores = validate()
    mean = mean_score(scores)
    summary |= {
        "validation": [asdict(row) for row in scores],
        "validation_loss": mean.loss,
        "validation_perplexity": mean.perplexity,
    }
    _write(out, summary)
    print(table(scores))
    if config.eval_context is not None:
        scores = validate(config.eval_context, by_position=True)
        summary["by_position"] = [asdict(bin_) for bin_ in mean_score(scores).positions]
        _write(out, summary)
        note = beyond_the_model(model, config.eval_context)
        print("\n" + position_table(scores) + (f"\n{note}" if note else "") + "\n")
    print(f"Validation loss {mean.loss:.4f}, perplexity {mean.perplexity:.2f}. Saved to {out}.")
    return summary


def _check_out(config: TrainConfig) -> None:
    """Raise ValueError unless `config.out` is new, or is to be resumed and holds nothing but a run's beginning."""
    out = Path(config.out)
    found = found_in(out / CHECKPOINTS)
    if config.resume is None:
        if found:
            raise ValueError(
                f"{out} is not empty; give --out a new folder, or --resume to go on from its {found[-1].name}."
            )
        check_new(out)
    elif out.is_dir() and not found and any(entry.name not in _OF_A_BEGINNING for entry in out.iterdir()):
        raise ValueError(f"{out} holds no checkpoint to resume from; give --out the folder of a run, or a new one.")


def _settings(config: TrainConfig, train_ids_N: np.ndarray) -> dict[str, Any]:
    """What the weights of a run depend on, by option."""
    options = {
        "--config" if name == "overrides" else "--" + name.replace("_", "-"): value
        for name, value in asdict(config).items()
        if name not in _WITHOUT_EFFECT
    }
    return options | {"--data (SHA-256 of its tokens)": hashlib.sha256(train_ids_N.data).hexdigest()}


def _tidy(out: Path) -> None:
    """Empty the folder of a run that left nothing to use, so that the same command may run again."""
    if not found_in(out / CHECKPOINTS) and not (out / SUMMARY).exists():
        for entry in (path for name in _OF_A_BEGINNING if (path := out / name).exists()):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _sources(config: TrainConfig) -> tuple[list[Source], list[Source]]:
    """What to train and to validate on."""
    data: list[Source] = [read_source(file, config.text_field) for file in config.data]
    if config.dataset is not None:
        needed = config.total_steps * config.tokens_per_step * _CHARACTERS_PER_TOKEN
        data.append(read_dataset(config.dataset, config.text_field, characters=needed))
    data = data or [embedded_text()]
    if config.valid:
        return data, [read_source(file, config.text_field) for file in config.valid]
    parts = [source.hold_out(HELD_OUT) for source in data]
    return [first for first, _ in parts], [last for _, last in parts]


def _tokenizer(config: TrainConfig, data: list[Source], valid: list[Source]) -> PreTrainedTokenizerBase:
    if config.tokenizer is not None:
        return load_tokenizer(config.tokenizer)
    for source in (*data, *valid):
        if not isinstance(source, Text):
            raise ValueError(f"{source.name} holds tokens; name the folder of their tokenizer with --tokenizer DIR.")
    documents = (document for source in data if isinstance(source, Text) for document in source.documents)
    return train_tokenizer(documents, config.vocab_size or DEFAULT_VOCAB_SIZE)


def _write(out: Path, summary: dict[str, Any]) -> None:
    (out / SUMMARY).write_text(json.dumps(summary, indent=2, default=str) + "\n", encoding="utf-8")
