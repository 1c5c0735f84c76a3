"""Perplexity of any causal language model of Hugging Face, by source and by position.

    loss = -1/N sum_i ln p(x_i | x_{i-1}, x_{i-2}, ... back to the start of its window)
    perplexity = exp(loss)   bits per byte = loss * N / (ln 2 * bytes)   perplexity per word = exp(loss * N / words)

Every one of a source's N tokens, end-of-text tokens included, is predicted exactly once: window w holds the tokens
wT .. wT+T-1 and takes the one before them as its first input (before the first token: the beginning-of-text token).
Streaming is one window of N tokens, fed in chunks through the cache. Words are what stands between white space. Of
token files and of the first tokens of a text, bytes and words are those of the decoded tokens.
Shape legend: N tokens of a source, T predicted tokens of a window, B windows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from regla.data.sources import Encoded
from regla.eval.streaming import stream as stream_chunks
from regla.models.packing import all_linear, document_logits
from regla.report.tables import plain
from regla.runtime.device import precision

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FIRST_BIN = 64  # positions; every further bin ends at twice the one before
_LOGITS = 2**28  # at a time, unless one window has more
_LOGITS_OF_A_SLICE = 2**26  # as float32 and as what cross-entropy makes of them


Watch = Callable[[int], None]


@dataclass(frozen=True)
class PositionScore:
    """Tokens of all windows at the positions first .. last, counted from 0."""

    first: int
    last: int
    tokens: int
    loss: float
    """Nats per token."""
    perplexity: float


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
    """None where the text is not known, or empty."""
    words: int | None = None
    word_perplexity: float | None = None
    """None where the words are not known."""
    positions: tuple[PositionScore, ...] = ()
    """Empty unless asked for."""


def score(
    model: PreTrainedModel,
    text: Encoded,
    *,
    first: int,
    seq_len: int,
    batch_size: int,
    dtype: str,
    by_position: bool = False,
    reset_at: int | None = None,
) -> Score:
    """Score one source in windows of `seq_len` tokens; `first` is the id that stands before its first token."""
    nats_N = token_nats(
        model, text.ids, first=first, seq_len=seq_len, batch_size=batch_size, dtype=dtype, reset_at=reset_at
    )
    positions = position_scores(nats_N, seq_len) if by_position else ()
    return _score(text, nats_N, positions)


def score_stream(
    model: PreTrainedModel,
    text: Encoded,
    *,
    first: int,
    chunk: int,
    dtype: str,
    by_position: bool = False,
    watch: Watch | None = None,
) -> Score:
    """Score one source as one sequence, in chunks through the cache."""
    nats_N = stream_nats(model, text.ids, first=first, chunk=chunk, dtype=dtype, watch=watch)
    positions = position_scores(nats_N, len(nats_N)) if by_position else ()
    return _score(text, nats_N, positions)


def _score(text: Encoded, nats_N: Tensor, positions: tuple[PositionScore, ...]) -> Score:
    nats = float(nats_N.double().sum())
    loss = nats / len(nats_N)
    return Score(
        name=text.name,
        tokens=len(nats_N),
        bytes=text.bytes,
        loss=loss,
        perplexity=_exp(loss),
        bits_per_byte=nats / math.log(2) / text.bytes if text.bytes else None,
        words=text.words,
        word_perplexity=_exp(nats / text.words) if text.words else None,
        positions=positions,
    )


def position_scores(nats_N: Tensor, seq_len: int) -> tuple[PositionScore, ...]:
    """Mean loss at the positions 0-63, 64-127, 128-255, ... of windows of `seq_len` tokens. nats_N: float [N]."""
    position_N = torch.arange(len(nats_N), device=nats_N.device) % seq_len
    scores = []
    for start, end in pairwise(bin_edges(min(seq_len, len(nats_N)))):
        part = nats_N[(position_N >= start) & (position_N < end)].double()
        loss = float(part.mean())
        scores.append(PositionScore(start, end - 1, len(part), loss, _exp(loss)))
    return tuple(scores)


def bin_edges(longest: int) -> list[int]:
    """0, 64, 128, 256, ..., longest."""
    edges = [0]
    while edges[-1] < longest:
        edges.append(min(max(_FIRST_BIN, 2 * edges[-1]), longest))
    return edges


def mean_score(scores: Sequence[Score]) -> Score:
    """Every source weighs the same: the means of their losses and bits per byte, the perplexity of the mean loss.

    So it is at every bin of positions, if the sources have the same ones.
    """
    loss = sum(score.loss for score in scores) / len(scores)
    sizes = [score.bytes for score in scores if score.bytes is not None]
    bits = [score.bits_per_byte for score in scores if score.bits_per_byte is not None]
    known = len(bits) == len(scores)
    per_word = [math.log(score.word_perplexity) for score in scores if score.word_perplexity is not None]
    words_known = len(per_word) == len(scores)
    return Score(
        name="mean",
        tokens=sum(score.tokens for score in scores),
        bytes=sum(sizes) if known else None,
        loss=loss,
        perplexity=_exp(loss),
        bits_per_byte=sum(bits) / len(bits) if known else None,
        words=sum(score.words or 0 for score in scores) if words_known else None,
        word_perplexity=_exp(sum(per_word) / len(per_word)) if words_known else None,
        positions=_mean_positions([score.positions for score in scores]),
    )


def _mean_positions(sources: Sequence[tuple[PositionScore, ...]]) -> tuple[PositionScore, ...]:
    edges = [[(bin_.first, bin_.last) for bin_ in positions] for positions in sources]
    if any(other != edges[0] for other in edges):
        return ()
    means = []
    for bins in zip(*sources, strict=True):
        loss = sum(bin_.loss for bin_ in bins) / len(bins)
        tokens = sum(bin_.tokens for bin_ in bins)
        means.append(PositionScore(bins[0].first, bins[0].last, tokens, loss, _exp(loss)))
    return tuple(means)


@torch.no_grad()
def token_nats(
    model: PreTrainedModel,
    ids_N: np.ndarray,
    *,
    first: int,
    seq_len: int,
    batch_size: int,
    dtype: str,
    reset_at: int | None = None,
) -> Tensor:
    """-ln p(x_i) of every token, float32 [N] on the CPU. The model is put into evaluation mode.

    `batch_size` windows run at a time, or fewer where their logits would take too much memory. `reset_at` is the
    end-of-text id, where documents are to see nothing of those before them.
    """
    model.eval()
    batch_size = max(1, min(batch_size, _LOGITS // (seq_len * model.config.get_text_config().vocab_size)))
    device = model.device

    def logits_of(inputs_BT: Tensor) -> Tensor:
        if reset_at is None:
            return model(input_ids=inputs_BT, use_cache=False).logits
        return document_logits(model, inputs_BT, reset_at, together=all_linear(model))

    inputs_N, targets_N = _inputs_and_targets(ids_N, first)
    whole = len(ids_N) // seq_len * seq_len
    windows = [
        slice(start, min(start + seq_len * batch_size, whole)) for start in range(0, whole, seq_len * batch_size)
    ]
    batches = [(inputs_N[part].view(-1, seq_len), targets_N[part].view(-1, seq_len)) for part in windows]
    if whole < len(ids_N):  # the last window is shorter
        batches.append((inputs_N[None, whole:], targets_N[None, whole:]))
    nats = []
    for inputs_BT, targets_BT in batches:
        with precision(device, dtype):
            logits_BTV = logits_of(inputs_BT.to(device))
        nats.append(_nats(logits_BTV, targets_BT.to(device)))
    return torch.cat(nats).cpu()


@torch.no_grad()
def stream_nats(
    model: PreTrainedModel, ids_N: np.ndarray, *, first: int, chunk: int, dtype: str, watch: Watch | None = None
) -> Tensor:
    """`token_nats` of all tokens as one window, fed in chunks of `chunk` tokens through the cache.

    `watch(tokens)` is called behind every chunk with the number of tokens read.
    """
    inputs_N, targets_N = _inputs_and_targets(ids_N, first)
    nats_N = torch.empty(len(targets_N), device="cpu")
    start = 0
    for logits_1CV, _ in stream_chunks(model, inputs_N[None], chunk=chunk, dtype=dtype):
        end = start + logits_1CV.shape[1]
        nats_N[start:end] = _nats(logits_1CV, targets_N[None, start:end].to(model.device))
        start = end
        if watch is not None:
            watch(end)
    return nats_N


def _inputs_and_targets(ids_N: np.ndarray, first: int) -> tuple[Tensor, Tensor]:
    targets_N = torch.from_numpy(ids_N.astype(np.int64))
    return torch.cat([targets_N.new_tensor([first]), targets_N[:-1]]), targets_N


def _nats(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """-ln p of the targets, float32 [B T]; in slices, since float32 logits of a long window are large."""
    slice_ = max(1, _LOGITS_OF_A_SLICE // logits_BTV.shape[-1])
    parts = zip(logits_BTV.flatten(0, 1).split(slice_), targets_BT.flatten().split(slice_), strict=True)
    return torch.cat([F.cross_entropy(logits.float(), targets, reduction="none") for logits, targets in parts])


def beyond_the_model(model: PreTrainedModel, context: int) -> str | None:
    """A sentence where `context` tokens are more than the configuration names, of a model that has positions."""
    named = getattr(model.config, "max_position_embeddings", None)
    if named is None or context <= named or not getattr(model.config, "uses_rope", True):
        return None
    return f"{context:,} tokens of context are more than the model's max_position_embeddings, {named:,}."


def table(scores: Sequence[Score]) -> str:
    """One line per source and, for several, their mean."""
    rows = [*scores, mean_score(scores)] if len(scores) > 1 else list(scores)
    header = ["source", "tokens", "loss", "perplexity", "bits/byte"]
    body = [
        [
            row.name,
            f"{row.tokens:,}",
            f"{row.loss:.4f}",
            f"{row.perplexity:.2f}",
            "-" if row.bits_per_byte is None else f"{row.bits_per_byte:.4f}",
        ]
        for row in rows
    ]
    if any(row.word_perplexity is not None for row in rows):
        header.append("per word")
        for cells, row in zip(body, rows, strict=True):
            cells.append("-" if row.word_perplexity is None else f"{row.word_perplexity:.2f}")
    return plain(header, body)


def position_table(scores: Sequence[Score]) -> str:
    """Perplexity of every bin of positions, one column per source, and that of the mean loss if they share all bins.

    A shorter source's last bin ends where it does.
    """
    if len(scores) > 1 and (mean := mean_score(scores)).positions:
        scores = [*scores, mean]
    longest = max(scores, key=lambda score: len(score.positions))
    body = [
        [
            f"{bin_.first}-{bin_.last}",
            *(f"{score.positions[index].perplexity:.2f}" if index < len(score.positions) else "-" for score in scores),
        ]
        for index, bin_ in enumerate(longest.positions)
    ]
    return plain(["positions", *(score.name for score in scores)], body)


def _exp(loss: float) -> float:
    return float(np.exp(min(loss, 700.0)))  # beyond lies no float64
