"""Sources of tokens: text, records with a text field, token files and data sets; all with the same operations.

A source is anything with the members of `Source`. A new kind of file needs one reader in `READERS`.
Shape legend: N tokens of one source.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from regla.data.records import TEXT_FIELD, read_jsonl, read_parquet
from regla.data.text import read_text
from regla.data.tokenizer import end_of_text_id
from regla.data.tokens import SUFFIX, read_tokens
from regla.runtime.errors import OptionError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HELD_OUT = 0.1
"""Share of a source that is kept for validation where no other text is given for it."""


class Source(Protocol):
    """What training and evaluation need to know of a file."""

    @property
    def name(self) -> str: ...

    @property
    def bytes(self) -> int | None:
        """UTF-8 length of the text, None where only its tokens are known."""

    @property
    def words(self) -> int | None:
        """Runs of characters between white space, likewise."""

    def hold_out(self, fraction: float) -> tuple[Source, Source]:
        """The source without its last `fraction`, and that last part."""

    def tokens(self, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
        """Token ids, int32 [N]; every document ends with the tokenizer's end-of-text token."""


@dataclass(frozen=True)
class Encoded:
    """A source in tokens, and the size of its text. ids: int32 [N], N > 0."""

    name: str
    ids: np.ndarray
    bytes: int | None
    words: int | None = None

    def start(self, tokens: int, tokenizer: PreTrainedTokenizerBase) -> Encoded:
        """The first `tokens` tokens, or all where it has no more."""
        if len(self.ids) <= tokens:
            return self
        return Encoded(self.name, self.ids[:tokens], *text_size(self.ids[:tokens], tokenizer))


def encode_source(source: Source, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """Raises ValueError where the source is empty."""
    ids_N = source.tokens(tokenizer)
    if not len(ids_N):
        raise OptionError(
            "{name} is too short to hold out a part of it; give more text, or {valid} another file.", name=source.name
        )
    if source.bytes is None:
        return Encoded(source.name, ids_N, *text_size(ids_N, tokenizer))
    return Encoded(source.name, ids_N, source.bytes, source.words)


def text_size(ids_N: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """UTF-8 bytes and words of the documents that token ids stand for, without special tokens. ids_N: int [N]."""
    ends = np.flatnonzero(ids_N == end_of_text_id(tokenizer)) + 1
    size = words = 0
    for ids in np.split(ids_N, ends):
        text = tokenizer.decode(ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        size += len(text.encode(errors="replace"))
        words += len(text.split())
    return size, words


READERS: dict[str, Callable[[Path, str], Source]] = {
    ".txt": lambda path, _: read_text(path),
    SUFFIX: lambda path, _: read_tokens(path),
    ".jsonl": read_jsonl,
    ".parquet": read_parquet,
}


def read_source(path: str | Path, text_field: str = TEXT_FIELD) -> Source:
    """The source in one file, by its suffix; `text_field` is that of the text in .jsonl and .parquet files."""
    path = Path(path)
    try:
        if not path.is_file():
            raise ValueError(f"There is no file {path}; give the path of a text or token file.")
        reader = READERS.get(path.suffix.lower())
        if reader is None:
            raise ValueError(
                f"{path} is of an unknown kind {path.suffix!r}; "
                "give .txt (UTF-8 text), .jsonl, .parquet or .bin (tokens from `regla tokenize`)."
            )
        return reader(path, text_field)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); give a file that you may read.") from error
