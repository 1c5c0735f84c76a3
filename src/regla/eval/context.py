"""How much context a model uses: loss by position with its noise, and loss with the context cut.

Windows of T tokens of a text are W samples of one distribution at every position. With l[w, b] the mean loss of window
w at the positions of bin b (0-63, 64-127, 128-255, ...), the effective context is the first position of the first bin b
that no later bin beats by more than two standard errors:

    d[w, c] = l[w, b] - l[w, c]      mean_w d[., c] <= 2 sqrt(var_w d[., c] / W)      for every bin c > b

Differences are paired by window, which takes out what makes windows easy or hard. Where only the last bin is such, the
loss still falls at the end of the window, and the effective context is at least that.

Cut to n tokens, a token is predicted from exactly the n before it; the difference is to the loss of the same tokens
with all of their window before them.

Shape legend: W windows, T tokens of a window, N sampled tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from regla.data.sources import Encoded
from regla.eval.perplexity import bin_edges, token_nats
from regla.eval.probes.score import share
from regla.report.tables import markdown
from regla.runtime.device import precision
from regla.runtime.errors import OptionError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CUTS = (64, 256, 1024)
SAMPLES = 512
"""Tokens that are predicted with a cut context."""


@dataclass(frozen=True)
class Bin:
    """Positions first .. last of all windows, counted from 0. Losses in nats per token."""

    first: int
    last: int
    loss: float
    loss_se: float
    falls_by: float
    """How much lower the best later bin is; 0 for the last bin."""
    falls_by_se: float


@dataclass(frozen=True)
class Cut:
    """N tokens with `context` tokens before them, against all of their window."""

    context: int
    n: int
    loss: float
    loss_se: float
    more: float
    """Than with the whole window."""
    more_se: float


@dataclass(frozen=True)
class EffectiveContext:
    seq_len: int
    windows: int
    tokens: int
    """The effective context."""
    still_falling: bool
    """The loss falls up to the last bin: the effective context is at least `tokens`."""
    bins: tuple[Bin, ...]
    cuts: tuple[Cut, ...]


def effective_context(
    model: PreTrainedModel,
    texts: Sequence[Encoded],
    *,
    first: int,
    seq_len: int,
    batch_size: int,
    dtype: str,
    seed: int = 0,
    samples: int = SAMPLES,
) -> EffectiveContext:
    """Score the whole windows of `seq_len` tokens in all texts; `first` is the id that stands before a text.

    Raises:
        ValueError: less than two windows, or windows of a single bin.
    """
    whole = [text.ids[: len(text.ids) // seq_len * seq_len] for text in texts]
    windows = sum(map(len, whole)) // seq_len
    if windows < 2 or seq_len <= 64:
        raise OptionError(
            "{seq_len} is {length}, and the text has {windows} windows of that length; the effective context needs at "
            "least two, of more than 64 tokens.",
            length=seq_len,
            windows=windows,
        )
    options: dict[str, Any] = {"first": first, "seq_len": seq_len, "batch_size": batch_size, "dtype": dtype}
    nats_WT = torch.cat([token_nats(model, ids, **options) for ids in whole if len(ids)]).view(-1, seq_len)
    bins, index = find(nats_WT)
    ids_WT = torch.from_numpy(np.concatenate(whole).astype(np.int64)).view(-1, seq_len)
    cuts = cut_losses(model, ids_WT, nats_WT, batch_size=batch_size, dtype=dtype, seed=seed, samples=samples)
    return EffectiveContext(
        seq_len=seq_len,
        windows=len(nats_WT),
        tokens=bins[index].first,
        still_falling=index == len(bins) - 1,
        bins=bins,
        cuts=cuts,
    )


def find(nats_WT: Tensor) -> tuple[tuple[Bin, ...], int]:
    """The bins of losses [W, T], and the index of that where the effective context begins."""
    edges = bin_edges(nats_WT.shape[1])
    ranges = list(pairwise(edges))
    loss_WB = torch.stack([nats_WT[:, start:end].double().mean(1) for start, end in ranges], 1)
    W = len(loss_WB)
    bins, found = [], len(ranges) - 1
    for b, (start, end) in reversed(list(enumerate(ranges))):
        later_WC = loss_WB[:, b : b + 1] - loss_WB[:, b + 1 :]
        mean_C, se_C = later_WC.mean(0), later_WC.std(0) / math.sqrt(W)
        if bool((mean_C <= 2 * se_C).all()):
            found = b
        best = int(mean_C.argmax()) if mean_C.numel() else None
        bins.append(
            Bin(
                first=start,
                last=end - 1,
                loss=float(loss_WB[:, b].mean()),
                loss_se=float(loss_WB[:, b].std() / math.sqrt(W)),
                falls_by=0.0 if best is None else float(mean_C[best]),
                falls_by_se=0.0 if best is None else float(se_C[best]),
            )
        )
    return tuple(reversed(bins)), found


@torch.no_grad()
def cut_losses(
    model: PreTrainedModel,
    ids_WT: Tensor,
    nats_WT: Tensor,
    *,
    batch_size: int,
    dtype: str,
    seed: int,
    samples: int,
    cuts: Sequence[int] = CUTS,
) -> tuple[Cut, ...]:
    """Of tokens in the second half of windows, that have more tokens before them than any cut leaves."""
    W, T = ids_WT.shape
    cuts = [cut for cut in cuts if cut <= T // 2] or [cut for cut in cuts if cut < T]
    if not cuts:
        return ()
    earliest = max(T // 2, max(cuts))
    rng = np.random.default_rng(seed)
    flat_N = torch.from_numpy(rng.permutation(W * (T - earliest))[:samples].copy())
    row_N, at_N = flat_N // (T - earliest), earliest + flat_N % (T - earliest)
    whole_N = nats_WT[row_N, at_N]
    found = []
    for cut in cuts:
        inputs_NC = ids_WT[row_N[:, None], at_N[:, None] - cut + torch.arange(cut, device="cpu")]
        nats = []
        for inputs_BC, target_B in zip(inputs_NC.split(batch_size), ids_WT[row_N, at_N].split(batch_size), strict=True):
            with precision(model.device, dtype):
                logits_BV = model(input_ids=inputs_BC.to(model.device), use_cache=False).logits[:, -1]
            nats.append(torch.nn.functional.cross_entropy(logits_BV.float().cpu(), target_B, reduction="none"))
        nats_N = torch.cat(nats)
        loss, more = share(nats_N, row_N), share(nats_N - whole_N, row_N)
        found.append(Cut(cut, len(nats_N), loss.mean, loss.se, more.mean, more.se))
    return tuple(found)


def context_table(found: EffectiveContext) -> str:
    """Both tables, and the sentence."""
    by_bin = [
        [
            f"{bin_.first:,}-{bin_.last:,}",
            _with_error(bin_.loss, bin_.loss_se),
            _with_error(bin_.falls_by, bin_.falls_by_se) if bin_ is not found.bins[-1] else "-",
        ]
        for bin_ in found.bins
    ]
    by_cut = [
        [f"{cut.context:,}", f"{cut.n:,}", _with_error(cut.loss, cut.loss_se), _with_error(cut.more, cut.more_se, "+")]
        for cut in found.cuts
    ]
    least = "at least " if found.still_falling else ""
    sentence = (
        f"Effective context: {least}{found.tokens:,} tokens ({found.windows:,} windows of {found.seq_len:,}), behind "
        "which the loss falls by no more than two standard errors."
    )
    parts = [markdown(["positions", "loss", "best later bin is lower by"], by_bin), sentence]
    if by_cut:
        parts.append(markdown(["context cut to", "tokens", "loss", "more than with the whole window"], by_cut))
    return "\n\n".join(parts)


def _with_error(mean: float, se: float, sign: str = "") -> str:
    return f"{mean:{sign}.4f} ± {se:.4f}"
