"""Trains the pretrained model that ships with the package, a small GPT-NeoX; see `regla.quickstart.pretrained`.

    python -m regla.quickstart.teacher --data books_00.txt books_01.txt --out DIR

It reads books, given as files, and the embedded text. The end of the embedded text is held out, and so is that of every
file. Tokenizer, loop and scores are those of `regla train`; the model is transformers' own class.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerBase

from regla.data.embedded import embedded_text
from regla.data.sources import HELD_OUT, Encoded, encode_source, read_text
from regla.data.text import Text
from regla.data.tokenizer import end_of_text_id, train_tokenizer, vocabulary_size
from regla.eval.perplexity import Score, mean_score, score, table
from regla.quickstart.teacher_card import teacher_card
from regla.runtime.device import float32_products, pick_device
from regla.runtime.errors import OptionError, check_choice, check_count, flag, told_in_flags
from regla.runtime.files import check_new, new_folder_alone, write_json, write_text
from regla.runtime.progress import Progress
from regla.runtime.versions import device_name, versions
from regla.train.config import DEVICES, DTYPES, LoopConfig
from regla.train.loop import optimise

SUMMARY = "training.json"
_HELD_OUT_OF_A_BOOK_FILE = 0.005
_HELD_OUT_OF_THE_EMBEDDED = 0.15  # more than HELD_OUT: other versions of Python cut at another place
_VALIDATIONS = 8
_BOOKS_FOR_THE_TOKENIZER = 4_000_000  # characters


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """One run of `train_teacher`; the defaults made the model in the package."""

    data: tuple[str, ...]
    """UTF-8 text files of books."""
    out: str
    """New folder for the model."""
    tokens: int = 150_000_000
    """To train on; text is repeated."""
    repeat: int = 2
    """How often the embedded text stands beside the books."""
    vocab_size: int = 2048
    seq_len: int = 512
    batch_size: int = 128
    lr: float = 3e-3
    seed: int = 0
    device: str = "auto"
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        for name in ("tokens", "repeat", "seq_len", "batch_size"):
            check_count(name, getattr(self, name))
        check_choice("device", self.device, DEVICES)
        check_choice("dtype", self.dtype, DTYPES)
        if not self.data:
            raise OptionError("{data} is missing; name text files of books.")


def teacher_model(tokenizer: PreTrainedTokenizerBase, *, context: int) -> GPTNeoXForCausalLM:
    """A new model of the architecture of Pythia: parallel residuals, RoPE on a quarter of each head, biases."""
    end_of_text = end_of_text_id(tokenizer)
    config = GPTNeoXConfig(
        vocab_size=vocabulary_size(tokenizer),
        hidden_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=context,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        pad_token_id=end_of_text,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
    )
    return GPTNeoXForCausalLM(config)


@float32_products()
def train_teacher(config: TeacherConfig) -> dict[str, Any]:
    """Train the model, save it in bfloat16 with its tokenizer, its card and its figures, and return the figures.

    The figures are of the weights as they are saved.

    Raises:
        ValueError: files that are not there or hold too little text; a folder that is not empty.
        FloatingPointError: the loss is no longer finite.
    """
    check_new(config.out)
    device = pick_device(config.device)
    books = [read_text(name).hold_out(_HELD_OUT_OF_A_BOOK_FILE) for name in config.data]
    embedded = embedded_text()
    seen, _ = embedded.hold_out(_HELD_OUT_OF_THE_EMBEDDED)
    _, unseen = embedded.hold_out(HELD_OUT)
    train_texts = [first for first, _ in books] + [seen] * config.repeat
    tokenizer = train_tokenizer(_sample(train_texts[: len(books)], train_texts[len(books) :]), config.vocab_size)
    train_N = np.concatenate([text.tokens(tokenizer) for text in train_texts])
    if len(train_N) <= config.seq_len:
        raise OptionError(
            "The training text has {tokens} tokens, expected more than {length}; give {data} more text.",
            tokens=len(train_N),
            length=config.seq_len,
        )
    valid = [encode_source(text, tokenizer) for text in (_joined([last for _, last in books]), unseen)]
    torch.manual_seed(config.seed)
    model = teacher_model(tokenizer, context=config.seq_len).to(device)
    loop = LoopConfig(
        tokens=config.tokens,
        seq_len=config.seq_len,
        batch_size=config.batch_size,
        lr=config.lr,
        seed=config.seed,
        dtype=config.dtype,
    )
    loop = replace(loop, eval_every=max(1, loop.total_steps // _VALIDATIONS))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters:,} parameters, {len(train_N):,} tokens of text, {loop.total_steps:,} steps on {device.type}")
    progress = Progress()
    with new_folder_alone(config.out, "run"):
        optimise(
            model,
            torch.from_numpy(train_N).to(device),
            loop,
            progress=progress,
            stop=lambda: False,
            evaluate=lambda: mean_score(_scores(model, valid, config, dtype=config.dtype)).loss,
            log=_show,
        )
        model.to(torch.bfloat16).save_pretrained(config.out)
        tokenizer.save_pretrained(config.out)
        scores = _scores(model.float(), valid, config, dtype="float32")
        print(table(scores))
        summary = {
            "arguments": asdict(config) | {"data": [Path(name).name for name in config.data], "out": "DIR"},
            "parameters": parameters,
            "text_tokens": len(train_N),
            "embedded_tokens": len(seen.tokens(tokenizer)),
            "tokens": loop.total_steps * loop.tokens_per_step,
            "seconds": progress.total_seconds,
            "validation": [asdict(row) for row in scores],
            "device": device_name(device),
            "versions": versions(),
        }
        write_json(Path(config.out) / SUMMARY, summary)
        write_text(Path(config.out) / "README.md", teacher_card(summary))
    return summary


def _sample(books: Sequence[Text], rest: Sequence[Text]) -> list[str]:
    """What the tokenizer is trained on: the beginning of each file of books, and all of the rest."""
    each = _BOOKS_FOR_THE_TOKENIZER // len(books)
    beginnings = ["\n\n".join(text.documents)[:each] for text in books]
    return beginnings + [document for text in rest for document in text.documents]


def _joined(texts: Sequence[Text]) -> Text:
    return Text("books", tuple(document for text in texts for document in text.documents))


def _scores(model: GPTNeoXForCausalLM, valid: Sequence[Encoded], config: TeacherConfig, *, dtype: str) -> list[Score]:
    return [
        score(
            model,
            text,
            first=model.config.bos_token_id,
            seq_len=config.seq_len,
            batch_size=config.batch_size,
            dtype=dtype,
        )
        for text in valid
    ]


def _show(record: dict[str, Any]) -> None:
    if "validation_loss" in record:
        print(
            f"step {record['step']:,}: loss {record['loss'] or math.nan:.4f}, "
            f"validation loss {record['validation_loss']:.4f}, "
            f"{record['seconds']:.0f} s",
            flush=True,
        )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m regla.quickstart.teacher", description="Train the pretrained model that ships with regla."
    )
    parser.add_argument("--data", nargs="+", required=True, metavar="FILE.txt", help="books, in UTF-8")
    parser.add_argument("--out", required=True, metavar="DIR", help="new folder for the model")
    defaults = {field.name: field.default for field in fields(TeacherConfig)}
    for name, text in (
        ("tokens", "to train on; the text is repeated"),
        ("repeat", "how often the embedded text stands beside the books"),
        ("batch_size", "sequences of a step"),
    ):
        parser.add_argument(flag(name), type=int, default=defaults[name], metavar="N", help=f"{text} (%(default)s)")
    parser.add_argument("--device", choices=DEVICES, default=defaults["device"], help="default: %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, default=defaults["dtype"], help="default: %(default)s")
    options = vars(parser.parse_args(argv))
    try:
        train_teacher(TeacherConfig(**options | {"data": tuple(options["data"])}))
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"regla.quickstart.teacher: error: {told_in_flags(error)}", file=sys.stderr)
        return 1 if isinstance(error, FloatingPointError) else 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
