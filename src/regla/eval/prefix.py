"""Log-likelihoods of continuations, with shared prefixes run once where that saves time.

    ll(c | x) = sum_i ln p(c_i | x, c_1 .. c_{i-1})        greedy: every c_i is the likeliest token of its place

The token sequences x, c form a tree. A prefix that several of them share is run once and its state is forked
(`fork_cache`): the question of a multiple-choice item for its answers, the examples of a prompt for all items that
have the same. No batch needs a mask: the prefixes of one batch are cut to the shortest of them, what is cut off comes
with the continuations, and these are padded on the right, where causal models do not look. So any causal model of
transformers will do, linear, softmax or hybrid.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from regla.models.cache import ReGLACacheLayer, fork_cache
from regla.runtime.device import precision

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache

Pair = tuple[Sequence[int], Sequence[int]]
"""Tokens of a context (one or more) and of its continuation (one or more)."""
Answer = tuple[float, bool]
"""Log-likelihood of the continuation in nats, and whether it is what greedy decoding gives."""

_LEAST_SAVED = 16  # tokens; repeating fewer costs less than one more row of a call of the model
_LEAST_SAVED_ON_GPUS = 256  # there a call takes as long as thousands of tokens
_LEAST_SHARED_MORE = 16  # tokens behind a prefix that its parts share; those with fewer part there
_LEAST_OF_A_BATCH = 0.75  # of its longest prefix's length: a shorter prefix starts the next batch
_LOGITS_OF_A_SLICE = 2**26  # as float32


@dataclass
class _Leaf:
    """One sequence of input tokens, the last token of the continuation left out, and who asks for it."""

    tokens: np.ndarray
    first: int
    """The earliest place whose logits somebody needs; a prefix ends before it."""
    asked: list[tuple[int, np.ndarray]] = field(default_factory=list)
    """(number of the pair, its continuation); pairs that differ in the last token alone share a leaf."""


@dataclass(frozen=True)
class _Group:
    """Leaves that share their tokens up to `end`, behind row `row` of the cache before them."""

    row: int
    end: int
    leaves: slice


class ContinuationScorer:
    """Scores pairs of a context and a continuation on one model.

    Args:
        model: any causal language model; it is put into evaluation mode.
        batch_size: sequences at a time.
        dtype: "float32", or "bfloat16" for matrix products under autocast; log-probabilities are float32.
        share: False runs every sequence whole.
    """

    def __init__(
        self, model: PreTrainedModel, *, batch_size: int = 16, dtype: str = "float32", share: bool = True
    ) -> None:
        if batch_size <= 0:
            raise ValueError(f"batch_size is {batch_size}, expected a number above 0.")
        self.model, self.batch_size, self.dtype = model.eval(), batch_size, dtype
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._least = _LEAST_SAVED_ON_GPUS if model.device.type == "cuda" else _LEAST_SAVED
        self.share = share and self._forks()
        """Whether prefixes are shared; models with other caches than transformers' for softmax or ours run whole."""

    def score(self, pairs: Sequence[Pair], done: Callable[[int, Answer], None] = lambda index, answer: None) -> None:
        """Call `done(index, answer)` for every pair, each once, as soon as it is known; longest sequences first."""
        self._done = done
        self._leaves = _leaves(pairs)
        self._shared = [_common(one.tokens, other.tokens) for one, other in pairwise(self._leaves)]
        self._descend([(0, slice(0, len(self._leaves)))], 0, None)

    @torch.no_grad()
    def _forks(self) -> bool:
        cache = self._call([[0, 0]], None, use_cache=True)[1]
        # Others' linear layers may take one token behind a state, but no second chunk.
        return hasattr(cache, "layers") and all(
            isinstance(layer, ReGLACacheLayer) or getattr(layer, "keys", None) is not None for layer in cache.layers
        )

    def _descend(self, rows: Sequence[tuple[int, slice]], seen: int, cache: Cache | None) -> None:
        """Score the leaves of all rows; `cache` holds the first `seen` tokens that the leaves of each row share."""
        groups: list[_Group] = []
        single: list[tuple[int, _Leaf]] = []
        for row, leaves in rows:
            for group in self._groups(row, leaves, seen):
                if group.leaves.stop - group.leaves.start > 1:
                    groups.append(group)
                else:
                    single.append((row, self._leaves[group.leaves.start]))
        single.sort(key=lambda pair: -len(pair[1].tokens))
        groups.sort(key=lambda group: -group.end)
        for batch in self._batches(groups, seen):
            end = batch[-1].end
            tokens = [self._leaves[group.leaves.start].tokens[seen:end] for group in batch]
            _, prefix = self._call(tokens, self._fork(cache, [group.row for group in batch]), use_cache=True)
            self._descend([(index, group.leaves) for index, group in enumerate(batch)], end, prefix)
        for start in range(0, len(single), self.batch_size):
            self._finish(single[start : start + self.batch_size], seen, cache)

    def _groups(self, row: int, leaves: slice, seen: int) -> Iterator[_Group]:
        """Neighbours in sorted order for which a prefix behind the first `seen` tokens is worth a row of a call, and
        leaves by themselves."""
        first, last = leaves.start, leaves.stop - 1
        if first == last or not self.share:
            for index in range(first, leaves.stop):
                yield _Group(row, self._leaves[index].first, slice(index, index + 1))
            return
        end = min(self._link(index) for index in range(first, last))
        shared = end - seen
        # Where little more than that is shared the group falls apart, behind its prefix or without one.
        least = end + max(_LEAST_SHARED_MORE, shared // 4)
        cuts = [first, *(index + 1 for index in range(first, last) if self._link(index) < least), leaves.stop]
        if shared > 0 and (len(cuts) - 2) * shared >= self._least:
            yield _Group(row, end, leaves)
            return
        for start, stop in pairwise(cuts):
            yield from self._groups(row, slice(start, stop), seen)

    def _link(self, index: int) -> int:
        """Tokens of a prefix that leaf `index` and the next one can have together."""
        return min(self._shared[index], self._leaves[index].first, self._leaves[index + 1].first)

    def _batches(self, groups: Sequence[_Group], seen: int) -> Iterator[list[_Group]]:
        """Groups, longest prefix first, in batches of similar lengths."""
        batch: list[_Group] = []
        for group in groups:
            if batch and (
                len(batch) == self.batch_size or group.end - seen < _LEAST_OF_A_BATCH * (batch[0].end - seen)
            ):
                yield batch
                batch = []
            batch.append(group)
        if batch:
            yield batch

    @torch.no_grad()
    def _finish(self, batch: Sequence[tuple[int, _Leaf]], seen: int, cache: Cache | None) -> None:
        """Run the rest of each leaf's tokens behind row `row` of the cache, and answer who asked."""
        longest = max(len(leaf.tokens) for _, leaf in batch)
        tokens = [np.pad(leaf.tokens[seen:], (0, longest - len(leaf.tokens))) for _, leaf in batch]
        first = min(leaf.first for _, leaf in batch)
        logits_BKV, _ = self._call(
            tokens, self._fork(cache, [row for row, _ in batch]), use_cache=cache is not None, keep=longest - first
        )
        asked = [
            (index, row, len(leaf.tokens) - len(continuation) - first, continuation)
            for row, (_, leaf) in enumerate(batch)
            for index, continuation in leaf.asked
        ]
        rows = np.concatenate([np.full(len(continuation), row) for _, row, _, continuation in asked])
        places = np.concatenate([start + np.arange(len(continuation)) for _, _, start, continuation in asked])
        targets = np.concatenate([continuation for *_, continuation in asked])
        logs, greedy = _log_probabilities(logits_BKV, rows, places, targets)
        start = 0
        for index, *_, continuation in asked:
            part = slice(start, start + len(continuation))
            self._done(index, (float(logs[part].sum()), bool(greedy[part].all())))
            start = part.stop

    def _call(
        self, tokens: Sequence[Sequence[int] | np.ndarray], cache: Cache | None, *, use_cache: bool, keep: int = 1
    ) -> tuple[Tensor, Cache]:
        """Logits of the last `keep` places, and the cache behind all."""
        ids_BT = torch.from_numpy(np.stack([np.asarray(row, np.int64) for row in tokens])).to(self.model.device)
        options = {"logits_to_keep": keep} if self._keeps else {}
        with torch.no_grad(), precision(self.model.device, self.dtype):
            out = self.model(input_ids=ids_BT, past_key_values=cache, use_cache=use_cache, **options)
        return out.logits[:, -keep:], getattr(out, "past_key_values", None)

    @staticmethod
    def _fork(cache: Cache | None, rows: Sequence[int]) -> Cache | None:
        return None if cache is None else fork_cache(cache, rows)


def _leaves(pairs: Sequence[Pair]) -> list[_Leaf]:
    """The different input sequences in lexicographic order."""
    leaves: dict[bytes, _Leaf] = {}
    for index, (context, continuation) in enumerate(pairs):
        tokens = np.array([*context, *continuation[:-1]], dtype=">u4")  # bytes of big-endian numbers sort as they do
        first = len(context) - 1
        leaf = leaves.setdefault(tokens.tobytes(), _Leaf(tokens.astype(np.int64), first))
        leaf.first = min(leaf.first, first)
        leaf.asked.append((index, np.array(continuation, dtype=np.int64)))
    return [leaves[key] for key in sorted(leaves)]


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """Tokens that two sequences begin with together."""
    length = min(len(one), len(other))
    differ = one[:length] != other[:length]
    return int(differ.argmax()) if differ.any() else length


def _log_probabilities(
    logits_BKV: Tensor, rows: np.ndarray, places: np.ndarray, targets: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """ln p of each target at its row and place (float64 [N], from float32), and whether it is the likeliest token."""
    slice_ = max(1, _LOGITS_OF_A_SLICE // logits_BKV.shape[-1])
    logs, greedy = [], []
    for start in range(0, len(rows), slice_):
        row_N, place_N, target_N = (
            torch.from_numpy(part[start : start + slice_]).to(logits_BKV.device) for part in (rows, places, targets)
        )
        logits_NV = logits_BKV[row_N, place_N].float()
        logs.append(logits_NV.log_softmax(-1).gather(-1, target_N[:, None])[:, 0])
        greedy.append(logits_NV.argmax(-1) == target_N)
    return torch.cat(logs).double().cpu().numpy(), torch.cat(greedy).cpu().numpy()
