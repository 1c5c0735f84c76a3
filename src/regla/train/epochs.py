"""Sequences of a source without repetition: all of them in random order, then all again in another.

Which comes at which place is computed, not stored: any place of a source of any size costs the same.
Shape legend: B sequences.
"""

from __future__ import annotations

import numpy as np

_ROUNDS = 6


class Epochs:
    """The order of a source's sequences.

    In an epoch the source is cut into sequences of T + 1 tokens, each of which begins with the last token of the one
    before: every token but a few is predicted once. The first cut is elsewhere in each epoch, so that the fewer than
    2 T tokens left out at the ends, too, are others.

    Args:
        tokens: how many the source has, more than T.
        seq_len: T.
        seed, number: of the run, and of the source in it.
    """

    def __init__(self, tokens: int, *, seq_len: int, seed: int, number: int = 0) -> None:
        self.seq_len, self._seed = seq_len, [seed, number]
        self._spare = min(seq_len, tokens - seq_len)  # places for the first cut
        self.sequences = max(1, (tokens - seq_len) // seq_len)
        """In an epoch."""

    def starts(self, first: int, count: int) -> np.ndarray:
        """Where the sequences at the places `first` .. `first + count - 1` begin, int64 [B]; places go on through all
        epochs."""
        place_B = np.arange(first, first + count)
        epoch_B = place_B // self.sequences
        start_B = np.empty(count, dtype=np.int64)
        for epoch in np.unique(epoch_B):
            rng = np.random.default_rng([*self._seed, int(epoch)])
            keys = rng.integers(0, 2**64, size=_ROUNDS, dtype=np.uint64)
            cut = rng.integers(0, self._spare)
            chosen = epoch_B == epoch
            order = permuted(place_B[chosen] % self.sequences, self.sequences, keys)
            start_B[chosen] = cut + order * self.seq_len
        return start_B


def permuted(index_B: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """Where a permutation of 0 .. size - 1 that `keys`, uint64, choose takes each index; int64 [B].

    A Feistel network over the next power of four, walked until it is back below `size`.
    """
    half = np.uint64(max(1, (size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << int(half)) - 1)
    found_B = index_B.astype(np.uint64)
    outside_B = np.ones(len(found_B), dtype=bool)
    while outside_B.any():
        left, right = found_B[outside_B] >> half, found_B[outside_B] & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right + key) & mask)
        found_B[outside_B] = left << half | right
        outside_B = found_B >= size
    return found_B.astype(np.int64)


def _mixed(x: np.ndarray) -> np.ndarray:
    """Every bit depends on every bit of x, uint64 (the finaliser of SplitMix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
