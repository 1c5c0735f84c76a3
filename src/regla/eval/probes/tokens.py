"""Probes in token ids, for any vocabulary: multi-query associative recall, induction, copying. All come from a seed.

    mqar        k1 v1 k2 v2 ... kP vP | gap | ... k2 ... k1 ...    asked: v2 after the second k2, v1 after the second k1
    induction   ... a b ............................. a            asked: b
    copy        x1 x2 ... xn x1 x2 ... x(n-1)                      asked: x2 ... xn, each after its predecessor

Multi-query associative recall is Zoology's (arXiv 2312.04927): keys are drawn without replacement from
the ids 1 .. V/2 - 1 and values from V/2 .. V - 1; behind the pairs each key stands once more, in a slot of two tokens
that is drawn without replacement with probability proportional to slot^(power - 1); all other tokens are noise from the
whole vocabulary. `gap` tokens of noise between pairs and slots are ours.

Shape legend: B sequences, T tokens, P pairs, C candidates, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

IGNORE = -100  # a target where nothing is asked, as in torch's cross-entropy
POWER = 0.01  # Zoology's: most queries come soon after the pairs; 1 spreads them evenly
INDUCTION_CANDIDATES = 8

Gaps = Sequence[int]


@dataclass(frozen=True)
class Asked:
    """Sequences with questions in them."""

    ids_BT: Tensor
    """int64."""
    targets_BT: Tensor
    """int64: the token that is to follow this position, IGNORE where nothing is asked."""
    candidates_BC: Tensor
    """int64: tokens of the sequence that an answer is chosen from, the right one among them."""
    distance_BT: Tensor
    """int64: tokens from the answer's first appearance to the question; 0 where nothing is asked."""

    @property
    def chance(self) -> float:
        """Of choosing right among the candidates without having read the sequence."""
        return 1 / self.candidates_BC.shape[1]


def mqar(
    rng: np.random.Generator, *, rows: int, length: int, vocab_size: int, cells: Sequence[tuple[int, int]]
) -> Asked:
    """Multi-query associative recall; every row is of one of `cells`, (pairs, gap), drawn evenly.

    Candidates are the values of the row; where rows differ in pairs, the first ones repeat.

    Raises:
        ValueError: a cell that does not fit into the length or the vocabulary.
    """
    for pairs, gap in cells:
        check_mqar(pairs, gap, length=length, vocab_size=vocab_size)
    table = np.asarray(cells)[rng.integers(len(cells), size=rows)]
    pairs_B, gap_B = table[:, 0], table[:, 1]
    P = int(pairs_B.max())
    used_BP = np.arange(P) < pairs_B[:, None]
    half = vocab_size // 2
    keys_BP = 1 + _without_replacement(rng, rows, half - 1, P)
    values_BP = half + _without_replacement(rng, rows, vocab_size - half, P)
    ids_BT = rng.integers(vocab_size, size=(rows, length))
    row_BP = np.broadcast_to(np.arange(rows)[:, None], (rows, P))
    pair_BP = np.broadcast_to(2 * np.arange(P), (rows, P))
    ids_BT[row_BP[used_BP], pair_BP[used_BP]] = keys_BP[used_BP]
    ids_BT[row_BP[used_BP], pair_BP[used_BP] + 1] = values_BP[used_BP]
    slot_BP = _slots(rng, (length - 2 * pairs_B - gap_B) // 2, P)
    query_BP = (2 * pairs_B + gap_B)[:, None] + 2 * slot_BP
    targets_BT = np.full((rows, length), IGNORE)
    distance_BT = np.zeros((rows, length), dtype=np.int64)
    ids_BT[row_BP[used_BP], query_BP[used_BP]] = keys_BP[used_BP]
    targets_BT[row_BP[used_BP], query_BP[used_BP]] = values_BP[used_BP]
    distance_BT[row_BP[used_BP], query_BP[used_BP]] = (query_BP - pair_BP - 1)[used_BP]
    candidates_BP = np.where(used_BP, values_BP, values_BP[:, :1])
    return _asked(ids_BT, targets_BT, candidates_BP, distance_BT)


def check_mqar(pairs: int, gap: int, *, length: int, vocab_size: int) -> None:
    """Raise a ValueError unless sequences of `length` tokens hold so many pairs, the gap and the queries."""
    if pairs < 1 or gap < 0:
        raise ValueError(
            f"mqar: {pairs} pairs with a gap of {gap} tokens; expected at least 1 pair and no less than 0."
        )
    if 4 * pairs + gap > length:
        raise ValueError(
            f"mqar: {pairs} pairs and a gap of {gap} tokens need {4 * pairs + gap} tokens, two for each pair and two "
            f"for each query, but the length is {length}; take fewer pairs, a shorter gap or a longer sequence."
        )
    if pairs > vocab_size // 2 - 1:
        raise ValueError(
            f"mqar: {pairs} pairs need {pairs} keys, but a vocabulary of {vocab_size} has "
            f"{max(0, vocab_size // 2 - 1)}; take fewer pairs or a larger vocabulary."
        )


def induction(
    rng: np.random.Generator, *, rows: int, length: int, vocab_size: int, depths: Sequence[float] = (0.0, 1.0)
) -> Asked:
    """One question in each row, at its end: what followed the last token where it stood before.

    Tokens of a row are different but the last one. `depths`: least and largest place of the pair, 0 at the beginning
    of the row and 1 right before the question.
    """
    _check_room("induction", length, least=4, tokens=length - 1, vocab_size=vocab_size)
    ids_BT = np.concatenate([_without_replacement(rng, rows, vocab_size, length - 1), np.zeros((rows, 1), int)], axis=1)
    low, high = (round(depth * (length - 4)) for depth in (min(depths), max(depths)))
    at_B = rng.integers(low, high + 1, size=rows)
    row_B = np.arange(rows)
    ids_BT[:, -1] = ids_BT[row_B, at_B]
    targets_BT = np.full((rows, length), IGNORE)
    targets_BT[:, -1] = ids_BT[row_B, at_B + 1]
    distance_BT = np.zeros((rows, length), dtype=np.int64)
    distance_BT[:, -1] = length - 2 - at_B
    others_BC = (at_B + 1)[:, None] + 1 + _without_replacement(rng, rows, length - 2, _candidates(length) - 1)
    candidates_BC = np.concatenate(
        [targets_BT[:, -1:], np.take_along_axis(ids_BT, others_BC % (length - 1), axis=1)], axis=1
    )
    return _asked(ids_BT, targets_BT, candidates_BC, distance_BT)


def copy(rng: np.random.Generator, *, rows: int, length: int, vocab_size: int) -> Asked:
    """A segment of `length` // 2 different tokens, twice; asked is the second one but its first token."""
    n = length // 2
    _check_room("copy", length, least=4, tokens=n, vocab_size=vocab_size)
    segment_BN = _without_replacement(rng, rows, vocab_size, n)
    ids_BT = np.concatenate([segment_BN, segment_BN[:, :-1]], axis=1)
    targets_BT = np.full_like(ids_BT, IGNORE)
    targets_BT[:, n:] = segment_BN[:, 1:]
    distance_BT = np.zeros_like(ids_BT)
    distance_BT[:, n:] = n - 1
    return _asked(ids_BT, targets_BT, segment_BN, distance_BT)


def fitting_cells(pairs: Sequence[int], gaps: Gaps, *, length: int, vocab_size: int) -> list[tuple[int, int]]:
    """(pairs, gap) of the product that fit into the length.

    Raises:
        ValueError: numbers of pairs that fit with no gap.
    """
    cells = []
    for number in pairs:
        check_mqar(number, min(gaps), length=length, vocab_size=vocab_size)
        cells += [(number, gap) for gap in sorted(gaps) if 4 * number + gap <= length]
    return cells


Generator = Callable[[np.random.Generator, int], Asked]
"""(random numbers, rows) to as many sequences."""


def _candidates(length: int) -> int:
    return min(INDUCTION_CANDIDATES, length - 2)


def _check_room(name: str, length: int, *, least: int, tokens: int, vocab_size: int) -> None:
    if length < least:
        raise ValueError(f"{name}: the length is {length}, expected at least {least} tokens.")
    if tokens > vocab_size:
        raise ValueError(
            f"{name}: a length of {length} needs {tokens} different tokens, but the vocabulary has {vocab_size}; "
            "take a shorter sequence."
        )


def _without_replacement(rng: np.random.Generator, rows: int, population: int, size: int) -> np.ndarray:
    """[rows, size] different numbers of 0 .. population - 1 in each row, in random order."""
    score = rng.random((rows, population), dtype=np.float32)
    if size < population:
        chosen = score.argpartition(size, axis=1)[:, :size]
        return np.take_along_axis(chosen, np.take_along_axis(score, chosen, axis=1).argsort(axis=1), axis=1)
    return score.argsort(axis=1)


def _slots(rng: np.random.Generator, space_B: np.ndarray, P: int) -> np.ndarray:
    """[B, P] different slots of 0 .. space - 1 in each row, drawn in turn with p(slot) ~ (slot + 1)^(power - 1).

    Gumbel's trick: the P largest of log p + Gumbel noise are such a draw. What a row has no space for means nothing.
    """
    slots = np.arange(max(int(space_B.max()), P))
    score = (POWER - 1) * np.log1p(slots) + rng.gumbel(size=(len(space_B), len(slots)))
    score = np.where(slots < space_B[:, None], score, -np.inf)
    order = np.argsort(-score, axis=1, kind="stable")[:, :P]
    return order


def _asked(ids: np.ndarray, targets: np.ndarray, candidates: np.ndarray, distance: np.ndarray) -> Asked:
    return Asked(
        *(torch.from_numpy(np.ascontiguousarray(x, dtype=np.int64)) for x in (ids, targets, candidates, distance))
    )
