"""Token files: little-endian uint16 ids, nothing else. Shape legend: N tokens of one source."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from regla.data.tokenizer import vocabulary_size
from regla.runtime.files import write_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SUFFIX = ".bin"
LARGEST_VOCABULARY = 2**16
"""Ids that a token file can tell apart."""


@dataclass(frozen=True)
class Tokens:
    """Ids of a text tokenised before. ids: uint16 [N]."""

    name: str
    ids: np.ndarray

    @property
    def bytes(self) -> None:
        return None

    @property
    def words(self) -> None:
        return None

    def hold_out(self, fraction: float) -> tuple[Tokens, Tokens]:
        cut = round((1 - fraction) * len(self.ids))
        return Tokens(self.name, self.ids[:cut]), Tokens(self.name, self.ids[cut:])

    def tokens(self, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
        size = vocabulary_size(tokenizer)
        if len(self.ids) and (largest := int(self.ids.max())) >= size:
            raise ValueError(
                f"{self.name} holds token id {largest}, but the largest id of the tokenizer is {size - 1}; "
                "give the tokenizer that the file was made with."
            )
        return self.ids.astype(np.int32)


def read_tokens(path: Path) -> Tokens:
    """Little-endian uint16 token ids, as `regla tokenize` writes them."""
    size = path.stat().st_size
    if size == 0 or size % 2:
        raise ValueError(
            f"{path} has {size} bytes, expected two for each token (little-endian uint16); "
            "write it with `regla tokenize`."
        )
    return Tokens(str(path), np.fromfile(path, dtype="<u2"))


def write_tokens(path: Path, ids_N: np.ndarray) -> None:
    """Write token ids, integers [N] below `LARGEST_VOCABULARY`, as a token file.

    Raises:
        ValueError: an id does not fit; nothing is written.
    """
    if len(ids_N) and not 0 <= int(ids_N.min()) <= int(ids_N.max()) < LARGEST_VOCABULARY:
        raise ValueError(f"The token ids {ids_N.min()} to {ids_N.max()} do not fit the 16 bits of {path}.")
    write_bytes(path, ids_N.astype("<u2").tobytes())


def check_fits(vocabulary: int) -> None:
    """Raise ValueError for a vocabulary whose ids a token file cannot hold."""
    if vocabulary > LARGEST_VOCABULARY:
        raise ValueError(
            f"A vocabulary of {vocabulary} does not fit token files of uint16, which hold {LARGEST_VOCABULARY} ids; "
            "use a smaller one, or train on the text files themselves."
        )
