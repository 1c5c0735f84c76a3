"""Perplexity of any causal language model of Hugging Face, by source.

    loss = -1/N sum_i ln p(x_i | x_{i-1}, x_{i-2}, ... back to the start of its window)
    perplexity = exp(loss)          bits per byte = loss * N / (ln 2 * bytes)

Every one of a source's N tokens, end-of-text tokens included, is predicted exactly once: window w holds the tokens
wT .. wT+T-1 and takes the one before them as its first input (before the first token: the beginning-of-text token).
Shape legend: N tokens of a source, T predicted tokens of a window, B windows, V vocabulary.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from regla.models.folders import load_model, load_tokenizer
from regla.train.data import HELD_OUT, Encoded, encode_source, end_of_text_id, read_source
from regla.train.device import autocast, pick_device
from regla.train.embedded import embedded_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_LONGEST_DEFAULT = 1024


@dataclass(frozen=True)
class Score:
    """Loss of one source, or of several together."""

    name: str
    tokens: int
    bytes: int | None
    loss: float
    """Nats per token."""
    perplexity: float
    bits_per_byte: float | None
    """None where only the tokens are known, not the text."""


def score(model: PreTrainedModel, text: Encoded, *, first: int, seq_len: int, batch_size: int, dtype: str) -> Score:
    """Score one source in windows of `seq_len` tokens; `first` is the id that stands before its first token."""
    nats = total_nats(model, text.ids, first=first, seq_len=seq_len, batch_size=batch_size, dtype=dtype)
    loss = nats / len(text.ids)
    bits_per_byte = None if text.bytes is None else nats / math.log(2) / text.bytes
    return Score(text.name, len(text.ids), text.bytes, loss, _exp(loss), bits_per_byte)


def mean_score(scores: Sequence[Score]) -> Score:
    """Every source weighs the same: the mean of their losses and bits per byte, and the perplexity of the mean loss."""
    loss = sum(score.loss for score in scores) / len(scores)
    sizes = [score.bytes for score in scores if score.bytes is not None]
    bits = [score.bits_per_byte for score in scores if score.bits_per_byte is not None]
    known = len(bits) == len(scores)
    return Score(
        name="mean",
        tokens=sum(score.tokens for score in scores),
        bytes=sum(sizes) if known else None,
        loss=loss,
        perplexity=_exp(loss),
        bits_per_byte=sum(bits) / len(bits) if known else None,
    )


@torch.no_grad()
def total_nats(
    model: PreTrainedModel, ids_N: np.ndarray, *, first: int, seq_len: int, batch_size: int, dtype: str
) -> float:
    """-sum_i ln p(x_i): log-probabilities in float32, their sum in float64. The model is put into evaluation mode."""
    model.eval()
    device = model.device
    targets_N = torch.from_numpy(ids_N.astype(np.int64))
    inputs_N = torch.cat([torch.tensor([first]), targets_N[:-1]])
    whole = len(ids_N) // seq_len * seq_len
    windows = [
        slice(start, min(start + seq_len * batch_size, whole)) for start in range(0, whole, seq_len * batch_size)
    ]
    batches = [(inputs_N[part].view(-1, seq_len), targets_N[part].view(-1, seq_len)) for part in windows]
    if whole < len(ids_N):  # the last window is shorter
        batches.append((inputs_N[None, whole:], targets_N[None, whole:]))
    nats = torch.zeros((), dtype=torch.float64, device=device)
    for inputs_BT, targets_BT in batches:
        nats += _batch_nats(model, inputs_BT.to(device), targets_BT.to(device), dtype)
    return float(nats)


def _batch_nats(model: PreTrainedModel, inputs_BT: Tensor, targets_BT: Tensor, dtype: str) -> Tensor:
    with autocast(model.device, dtype):
        logits_BTV = model(input_ids=inputs_BT, use_cache=False).logits
    return F.cross_entropy(logits_BTV.float().flatten(0, 1), targets_BT.flatten(), reduction="none").double().sum()


def evaluate(
    folder: str | Path,
    *,
    data: Sequence[str | Path] = (),
    seq_len: int | None = None,
    batch_size: int = 16,
    device: str = "auto",
    dtype: str = "float32",
    json_file: str | Path | None = None,
) -> list[Score]:
    """Score the model in `folder` on each file of `data`, by default on the held-out tenth of the embedded text.

    Prints a table, and writes the same figures to `json_file`. `seq_len` None: the model's own length, at most 1024.
    """
    for name, value in (("--seq-len", seq_len), ("--batch-size", batch_size)):
        if value is not None and value <= 0:
            raise ValueError(f"{name} is {value}, expected a number above 0.")
    if json_file is not None and not Path(json_file).parent.is_dir():
        raise ValueError(f"There is no folder for {json_file}; give --json a file in a folder that exists.")
    where = pick_device(device)
    sources = [read_source(file) for file in data] or [embedded_text().hold_out(HELD_OUT)[1]]
    model, tokenizer = load_model(folder, where), load_tokenizer(folder)
    length = seq_len or min(getattr(model.config, "max_position_embeddings", _LONGEST_DEFAULT), _LONGEST_DEFAULT)
    texts = [encode_source(source, tokenizer) for source in sources]
    scores = [
        score(model, text, first=first_id(tokenizer), seq_len=length, batch_size=batch_size, dtype=dtype)
        for text in texts
    ]
    print(table(scores))
    if json_file is not None:
        result: dict[str, Any] = {
            "model": str(folder),
            "seq_len": length,
            "device": where.type,
            "dtype": dtype,
            "sources": [asdict(score) for score in scores],
            "mean": asdict(mean_score(scores)),
        }
        Path(json_file).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return scores


def first_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What stands before a text: the beginning-of-text token, or for want of one the end of the text before."""
    return end_of_text_id(tokenizer) if tokenizer.bos_token_id is None else int(tokenizer.bos_token_id)


def table(scores: Sequence[Score]) -> str:
    """One line per source and, for several, their mean."""
    rows = [*scores, mean_score(scores)] if len(scores) > 1 else list(scores)
    width = max(len("source"), *(len(row.name) for row in rows))
    lines = [f"{'source':<{width}}  {'tokens':>12}  {'loss':>8}  {'perplexity':>10}  {'bits/byte':>9}"]
    for row in rows:
        bits = "-" if row.bits_per_byte is None else f"{row.bits_per_byte:.4f}"
        lines.append(f"{row.name:<{width}}  {row.tokens:>12,}  {row.loss:>8.4f}  {row.perplexity:>10.2f}  {bits:>9}")
    return "\n".join(lines)


def _exp(loss: float) -> float:
    return float(np.exp(min(loss, 700.0)))  # beyond lies no float64
