"""The texts of a conversion, in tokens: what it trains on and what it is scored on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from regla.data.selection import read_sources, split_validation
from regla.data.sources import Encoded, Source, encode_source
from regla.data.tokenizer import end_of_text_id, first_id
from regla.eval.perplexity import Score, score
from regla.linearize.config import CALIBRATION_LENGTH, LinearizeConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Texts:
    """Shape legend: N tokens."""

    train_N: np.ndarray
    valid: list[Encoded]
    first: int
    """The id that stands before a text."""

    @property
    def train_hash(self) -> str:
        return hashlib.sha256(self.train_N.data).hexdigest()

    @property
    def hash(self) -> str:
        """Of all tokens, and of the names of the validation texts."""
        found = hashlib.sha256(self.train_hash.encode())
        for text in self.valid:
            found.update(f"{text.name} {len(text.ids)} ".encode())
            found.update(np.ascontiguousarray(text.ids).data)
        return found.hexdigest()

    def scores(self, model: PreTrainedModel, config: LinearizeConfig) -> list[Score]:
        """Of every validation text."""
        return [
            score(
                model,
                text,
                first=self.first,
                seq_len=config.seq_len,
                batch_size=config.batch_size,
                dtype=config.dtype,
            )
            for text in self.valid
        ]

    def windows(self, count: int, length: int) -> Tensor:
        """About `count` sequences of validation text [B, T] with T at most `length`, spread over all of it."""
        ids_N = np.concatenate([text.ids for text in self.valid])
        T = min(length, len(ids_N))
        B = min(count, len(ids_N) // T)
        starts = np.linspace(0, len(ids_N) - T, B).astype(int)
        return torch.from_numpy(np.stack([ids_N[start : start + T] for start in starts]).astype(np.int64))


def read_texts(config: LinearizeConfig) -> tuple[list[Source], list[Source]]:
    """Sources to train and to validate on.

    Raises:
        ValueError: a file that is not there or not readable.
    """
    return split_validation(read_sources(config.data, config.text_field), config.valid, config.text_field)


def encode_texts(
    config: LinearizeConfig, sources: tuple[Sequence[Source], Sequence[Source]], tokenizer: PreTrainedTokenizerBase
) -> Texts:
    """The sources in tokens.

    Raises:
        ValueError: a tokenizer without an end-of-text token; too little text; an empty validation text.
    """
    end_of_text_id(tokenizer)  # says what is wrong with a tokenizer that has none
    train, valid = sources
    train_N = np.concatenate([source.tokens(tokenizer) for source in train])
    length = max(config.seq_len, CALIBRATION_LENGTH)
    if len(train_N) <= length:
        raise ValueError(
            f"The training text has {len(train_N)} tokens, expected more than one sequence of {length}; give more text."
        )
    starts = [encode_source(source, tokenizer).start(config.valid_tokens, tokenizer) for source in valid]
    return Texts(train_N, starts, first_id(tokenizer))
