"""A whole training run: text to a Hugging Face folder with its tokenizer, scores and the arguments that made it."""

from __future__ import annotations

import json
import platform
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers

import regla
from regla.eval.perplexity import first_id, mean_score, score, table
from regla.models.folders import check_new, load_tokenizer, new_folder
from regla.models.modeling import ReGLAForCausalLM
from regla.train.config import DEFAULT_VOCAB_SIZE, TrainConfig
from regla.train.data import HELD_OUT, Source, Text, encode_source, end_of_text_id, read_source
from regla.train.device import pick_device
from regla.train.embedded import embedded_text
from regla.train.loop import Progress, optimise
from regla.train.model import count_parameters, match_softmax, model_config
from regla.train.tokenizer import train_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SUMMARY = "training.json"


def train(config: TrainConfig) -> dict[str, Any]:
    """Train a model as `config` says, save it to `config.out`, score it, and return what `training.json` there holds.

    Everything that can be wrong with the input is found before the first step. Ctrl-C ends the run after the current
    step, saves the model as it is then and raises KeyboardInterrupt; any other error behind the first step saves it,
    too, unless the weights are spoilt (FloatingPointError).
    """
    check_new(config.out)
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

    torch.manual_seed(config.seed)
    model_configuration, softmax_parameters = match_softmax(
        model_config(config, vocab_size=len(tokenizer), end_of_text=end_of_text_id(tokenizer))
    )
    model = ReGLAForCausalLM(model_configuration).to(device)
    parameters = count_parameters(model_configuration)
    out = new_folder(config.out)
    print(
        f"{config.mixer}: {parameters:,} parameters ({parameters / softmax_parameters - 1:+.2%} against softmax), "
        f"MLP width {model_configuration.intermediate_size}, vocabulary {model_configuration.vocab_size:,}; "
        f"{len(train_ids_N):,} tokens of text; "
        f"{config.total_steps:,} steps of {config.tokens_per_step:,} tokens on {device.type}"
    )

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
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
        summary.update(
            steps=progress.steps,
            complete=progress.steps == config.total_steps,
            tokens=progress.steps * config.tokens_per_step,
            seconds=progress.seconds[-1] if progress.seconds else None,
            tokens_per_second=progress.tokens_per_second(config.tokens_per_step),
            train_loss=progress.train_loss,
        )
        _write(out, summary)

    with _interrupts() as interrupted:
        try:
            optimise(model, torch.from_numpy(train_ids_N).to(device), config, progress=progress, stop=interrupted)
        except FloatingPointError:
            raise
        except BaseException as error:
            if progress.steps:
                save()
                print(
                    f"Stopped by {type(error).__name__} in step {progress.steps + 1}; the model as it was is in {out}."
                )
            if isinstance(error, torch.OutOfMemoryError):
                advice = "lower --batch-size and raise --accumulate to match"
                raise MemoryError(f"The memory of the GPU is full; {advice}.") from error
            raise
        save()
    if not summary["complete"]:
        print(f"Interrupted after {progress.steps} of {config.total_steps} steps; the model as it is now is in {out}.")
        raise KeyboardInterrupt

    scores = [
        score(
            model,
            text,
            first=first_id(tokenizer),
            seq_len=config.seq_len,
            batch_size=config.batch_size,
            dtype=config.dtype,
        )
        for text in valid_texts
    ]
    mean = mean_score(scores)
    summary |= {
        "validation": [asdict(row) for row in scores],
        "validation_loss": mean.loss,
        "validation_perplexity": mean.perplexity,
    }
    _write(out, summary)
    print(table(scores))
    print(f"Validation loss {mean.loss:.4f}, perplexity {mean.perplexity:.2f}. Saved to {out}.")
    return summary


def _sources(config: TrainConfig) -> tuple[list[Source], list[Source]]:
    """What to train and to validate on."""
    data: list[Source] = [read_source(file) for file in config.data] or [embedded_text()]
    if config.valid:
        return data, [read_source(file) for file in config.valid]
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


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C only sets the flag that is yielded, so that no update is cut short; a second interrupts.

    Signals reach the main thread alone; in any other the flag stays False.
    """
    asked = False

    def on_interrupt(signum: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, previous)
