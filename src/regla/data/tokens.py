"""Token ids that lie in parts, in memory or in files, as one source. Shape legend: N tokens of one source."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from regla.data.token_files import LARGEST_VOCABULARY, TokenFile, TokenWriter
from regla.data.tokenizer import vocabulary_digest, vocabulary_size
from regla.runtime.errors import OptionError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MOST_HELD_OUT = 1_000_000  # tokens of a source of token files


@dataclass(frozen=True)
class Part:
    """Ids of a file or an array, from `start` to before `stop`."""

    origin: TokenFile | np.ndarray
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def read(self, start: int, stop: int) -> np.ndarray:
        """Some of them, counted from the first of this part."""
        return self.origin[self.start + start : self.start + stop]

    def digest(self, *, verify: bool) -> str:
        """Names these ids: SHA-256 of the file and the place in it, or of the ids as int32."""
        if isinstance(self.origin, TokenFile):
            return f"{self.origin.content(verify=verify).sha256} {self.start} {self.stop}"
        return hashlib.sha256(np.ascontiguousarray(self.read(0, len(self)), dtype="<i4").data).hexdigest()

    def largest(self, *, verify: bool) -> int:
        """The largest id; of a file, that of all of it."""
        if isinstance(self.origin, TokenFile):
            return self.origin.content(verify=verify).largest_id
        return int(self.read(0, len(self)).max())


class Ids:
    """Parts in a row, which have a length and slices; `read` puts some of them into memory."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = tuple(part for part in parts if len(part))
        self._ends = np.cumsum([len(part) for part in self.parts], dtype=np.int64)

    @classmethod
    def of(cls, *origins: TokenFile | np.ndarray | Ids) -> Ids:
        """All ids of all of them."""
        parts: list[Part] = []
        for origin in origins:
            parts += origin.parts if isinstance(origin, Ids) else [Part(origin, 0, len(origin))]
        return cls(parts)

    def __len__(self) -> int:
        return int(self._ends[-1]) if self.parts else 0

    def __getitem__(self, part: slice) -> Ids:
        start, stop, _ = part.indices(len(self))
        return Ids([Part(one.origin, one.start + a, one.start + b) for one, a, b in self._within(start, stop)])

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """int32 [stop - start]."""
        stop = len(self) if stop is None else stop
        found = np.empty(stop - start, dtype=np.int32)
        at = 0
        for part, a, b in self._within(start, stop):
            found[at : at + b - a] = part.read(a, b)
            at += b - a
        return found

    def _within(self, start: int, stop: int) -> Iterator[tuple[Part, int, int]]:
        """The parts of start .. stop, and from where to where in each."""
        for number in range(int(np.searchsorted(self._ends, start, side="right")), len(self.parts)):
            part = self.parts[number]
            first = int(self._ends[number]) - len(part)
            if first >= stop:
                break
            yield part, max(start - first, 0), min(stop - first, len(part))

    def digest(self, *, verify: bool = True) -> str:
        """SHA-256 that names all ids: without files, that of the ids as int32."""
        if not any(isinstance(part.origin, TokenFile) for part in self.parts):
            found = hashlib.sha256()
            for part in self.parts:
                found.update(np.ascontiguousarray(part.read(0, len(part)), dtype="<i4").data)
            return found.hexdigest()
        return hashlib.sha256("\n".join(part.digest(verify=verify) for part in self.parts).encode()).hexdigest()

    def largest(self, *, verify: bool = True) -> int:
        return max(part.largest(verify=verify) for part in self.parts)


@dataclass(frozen=True)
class Tokens:
    """Ids of a text tokenised before."""

    name: str
    ids: Ids

    @property
    def bytes(self) -> None:
        return None

    @property
    def words(self) -> None:
        return None

    def hold_out(self, fraction: float) -> tuple[Tokens, Tokens]:
        """The held-out part is the last `fraction`, but at most a million tokens."""
        cut = max(round((1 - fraction) * len(self.ids)), len(self.ids) - _MOST_HELD_OUT)
        return Tokens(self.name, self.ids[:cut]), Tokens(self.name, self.ids[cut:])

    def tokens(self, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
        self.check(tokenizer)
        return self.ids.read()

    def check(self, tokenizer: PreTrainedTokenizerBase, *, verify: bool = True) -> None:
        """Raise ValueError where a file is damaged, or `tokenizer` is not the one that it was made with."""
        size = vocabulary_size(tokenizer)
        for part in self.ids.parts:
            file = part.origin if isinstance(part.origin, TokenFile) else None
            largest = part.largest(verify=verify)
            if largest >= size:
                raise ValueError(
                    f"{file.path if file else self.name} holds token id {largest}, but the largest id of the tokenizer "
                    f"is {size - 1}; give the tokenizer that the file was made with."
                )
            if file and file.recorded and file.recorded.vocabulary not in (None, vocabulary_digest(tokenizer, largest)):
                raise OptionError(
                    "{file} was made with another tokenizer; give {tokenizer} the folder of that one.", file=file.path
                )


def write_tokens(path: Path, ids_N: np.ndarray, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Write token ids, integers [N] below `LARGEST_VOCABULARY`, as a token file.

    Raises:
        ValueError: an id does not fit; nothing is written.
    """
    with TokenWriter(path, tokenizer) as writer:
        writer.write(ids_N, ends=False)


def check_fits(vocabulary: int) -> None:
    """Raise ValueError for a vocabulary whose ids a token file cannot hold."""
    if vocabulary > LARGEST_VOCABULARY:
        raise ValueError(
            f"A vocabulary of {vocabulary} does not fit token files of uint16, which hold {LARGEST_VOCABULARY} ids; "
            "use a smaller one, or train on the text files themselves."
        )
