"""Batches from several sources of tokens, each with its share, wherever the tokens are.

Which sequences are in a batch depends on the seed and the number of the batch alone: the number is the place in the
data that a run goes on from, in any number of processes.
Shape legend: S sources, B sequences, L = T + 1 tokens of a sequence, of which T are predicted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from regla.data.tokens import Ids
from regla.runtime.errors import OptionError
from regla.train.config import LoopConfig
from regla.train.epochs import Epochs
from regla.train.loop import crop_starts

_GOLDEN = (5**0.5 - 1) / 2
_BATCHES = 4096  # that are counted at a time


@dataclass(frozen=True)
class Stream:
    """A source to draw sequences from."""

    name: str
    ids: Ids


@dataclass(frozen=True)
class Drawn:
    """What was trained on of one source."""

    name: str
    tokens: int
    """In the source."""
    weight: float
    """Its share of the training tokens, as it should be."""
    drawn: int
    """Tokens that were predicted."""
    share: float
    epochs: float


class Mixture:
    """Sequences from streams: from random places, or each once before any comes again (see `regla.train.epochs`).

    Args:
        streams: what to draw from.
        weights: the share of each in the tokens trained on, in any unit: every batch has as many sequences of each
            stream. None: sequences are of all streams as one row of tokens, so that shares are in proportion to
            lengths.
        config: the seed, and how long and how many sequences are.
        once: each sequence once before any comes again.
    """

    def __init__(
        self, streams: Sequence[Stream], weights: Sequence[float] | None, config: LoopConfig, *, once: bool = False
    ) -> None:
        self.streams, self.config = list(streams), config
        self.lengths = np.array([len(stream.ids) for stream in streams], dtype=np.int64)
        self._ends = np.cumsum(self.lengths)
        shares = np.array(self.lengths if weights is None else weights, dtype=np.float64)
        self.shares, self.weighted = shares / shares.sum(), weights is not None
        self._bounds = np.cumsum(self.shares)[:-1]
        self.ids = Ids.of(*(stream.ids for stream in streams))
        self._length = config.seq_len + 1
        for length, text in zip(self.lengths, streams, strict=True) if self.weighted else [(self._ends[-1], None)]:
            if length < self._length:
                raise OptionError(
                    "{what} has {tokens} tokens, expected more than {seq_len} {length}; "
                    "give more text or a smaller {seq_len}.",
                    what=f"The training text {text.name}" if text else "The training text",
                    tokens=length,
                    length=config.seq_len,
                )

        rows = self.lengths if self.weighted else [len(self.ids)]
        self._epochs = None
        if once:
            self._epochs = [
                Epochs(int(tokens), seq_len=config.seq_len, seed=config.seed, number=number)
                for number, tokens in enumerate(rows)
            ]
        self._before = 0, np.zeros(len(streams), dtype=np.int64)  # batches, and sequences of each stream in them

    @property
    def is_one_row(self) -> bool:
        """Whether sequences are random crops of all tokens in a row."""
        return not self.weighted and self._epochs is None

    @property
    def in_memory(self) -> np.ndarray | None:
        """All tokens, int32, where they are drawn as one row and no file holds them."""
        parts = self.ids.parts
        if not self.is_one_row or not all(isinstance(part.origin, np.ndarray) for part in parts):
            return None
        return parts[0].read(0, len(parts[0])) if len(parts) == 1 else self.ids.read()

    def __call__(self, batch: int) -> Tensor:
        """Sequences [B, L], int64."""
        rows = [self.ids.read(int(start), int(start) + self._length) for start in self.starts(batch)]
        return torch.from_numpy(np.stack(rows)).long()

    def starts(self, batch: int) -> np.ndarray:
        """Where the sequences of a batch begin in the row of all tokens, [B]."""
        B, seed = self.config.batch_size, self.config.seed
        if not self.weighted:
            if self._epochs is not None:
                return self._epochs[0].starts(batch * B, B)
            return crop_starts(len(self.ids), seed=seed, batch=batch, batch_size=B, length=self._length)
        rng = np.random.default_rng([seed, batch])
        stream_B = rng.permutation(self._streams_of(np.array([batch])))
        if self._epochs is None:
            within_B = rng.integers(0, self.lengths[stream_B] - self._length + 1)
        else:
            within_B = np.empty(B, dtype=np.int64)
            before_S = self._sequences_before(batch)
            for number, epochs in enumerate(self._epochs):
                chosen = stream_B == number
                within_B[chosen] = epochs.starts(int(before_S[number]), int(chosen.sum()))
        return within_B + (self._ends - self.lengths)[stream_B]

    def _tokens_of(self, batch: int) -> np.ndarray:
        """How many predicted tokens of a batch are of each stream, [S]."""
        first_B = self.starts(batch)[:, None] + 1  # the first token of a sequence is not predicted
        overlap_BS = np.minimum(first_B + self.config.seq_len, self._ends) - np.maximum(
            first_B, self._ends - self.lengths
        )
        return overlap_BS.clip(min=0).sum(0)

    def _streams_of(self, batches: np.ndarray) -> np.ndarray:
        """The streams of the sequences of batches, batch by batch.

        Evenly spaced, and from batch to batch by the golden ratio: shares are met to about a sequence, not by chance.
        """
        B = self.config.batch_size
        at = (np.arange(B) + (batches * _GOLDEN % 1)[:, None]) / B
        return np.searchsorted(self._bounds, at.flatten(), side="right")

    def _sequences_before(self, batch: int) -> np.ndarray:
        """How many sequences of each stream are in the batches before this one, [S]."""
        done, counts_S = self._before if self._before[0] <= batch else (0, np.zeros_like(self.lengths))
        for start in range(done, batch, _BATCHES):
            batches = np.arange(start, min(start + _BATCHES, batch))
            counts_S = counts_S + np.bincount(self._streams_of(batches), minlength=len(self.streams))
        self._before = batch, counts_S
        return counts_S

    def drawn(self, steps: int) -> list[Drawn]:
        """What the first `steps` of a run trained on."""
        batches, T = steps * self.config.accumulate, self.config.seq_len
        if self.weighted or len(self.streams) == 1:
            counts_S = self._sequences_before(batches) * T
        else:
            counts_S = sum((self._tokens_of(batch) for batch in range(batches)), np.zeros_like(self.lengths))
        total = max(1, int(counts_S.sum()))
        return [
            Drawn(stream.name, int(length), float(share), int(count), int(count) / total, int(count) / int(length))
            for stream, length, share, count in zip(self.streams, self.lengths, self.shares, counts_S, strict=True)
        ]
