"""Sources of tokens: text, records with a text field, token files and data sets; all with the same operations.

A source is anything with the members of `Source`. A new kind of file needs one reader in `READERS`.
Shape legend: N tokens of one source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from regla.data.bad import BadRecords, counted
from regla.data.records import TEXT_FIELD, jsonl_pieces, parquet_pieces
from regla.data.text import Piece, Text, text_pieces, whole
from regla.data.token_files import SUFFIX, TokenFile
from regla.data.tokenizer import end_of_text_id
from regla.data.tokens import Ids, Tokens
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


READERS: dict[str, Callable[[Path, str, BadRecords], Iterator[Piece]]] = {
    ".txt": text_pieces,
    ".jsonl": jsonl_pieces,
    ".parquet": parquet_pieces,
}
"""By the suffix of a file: from its path, the name of the text field and what counts bad records, to its documents."""


def read_source(path: str | Path, text_field: str = TEXT_FIELD, bad: BadRecords | None = None) -> Source:
    """The source in a file, by its suffix, or in a folder: its files of one kind, in the order of their names.

    Text is read into memory; tokens stay in their files.

    Args:
        path: the file or folder.
        text_field: where .jsonl and .parquet files have the text.
        bad: counts records that are left out; None: the first is an error.
    """
    if holds_tokens(path):
        with _readable(path):
            return Tokens(str(path), Ids.of(*(TokenFile(file) for file in files_of(path))))
    return read_text(path, text_field, bad)


def read_text(path: str | Path, text_field: str = TEXT_FIELD, bad: BadRecords | None = None) -> Text:
    """`read_source` of text."""
    return Text(str(path), whole(document_pieces(path, text_field, bad)))


def document_pieces(path: str | Path, text_field: str = TEXT_FIELD, bad: BadRecords | None = None) -> Iterator[Piece]:
    """The documents of a text file, or of all in a folder, one after the other.

    Raises:
        ValueError: they cannot be read, or hold no text.
    """
    bad = bad or BadRecords()
    for file in files_of(path):
        known, empty = len(bad), True
        with _readable(file):
            for piece in READERS[file.suffix.lower()](file, text_field, bad):
                empty = False
                yield piece
        if empty:
            found = bad.told[known:]
            if not found:
                raise ValueError(f"{file} holds no text; give one with text in it.")
            raise OptionError(
                "{file} holds no text that can be used; {bad}, the first: {first}",
                file=file,
                bad=counted(len(found)),
                first=found[0],
            )


def holds_tokens(path: str | Path) -> bool:
    """Whether a file, or those in a folder, are token files."""
    return files_of(path)[0].suffix.lower() == SUFFIX


def files_of(path: str | Path) -> list[Path]:
    """The file itself; of a folder its text or its token files, by name."""
    path = Path(path)
    with _readable(path):
        if path.is_dir():
            return _files_in(path)
        if not path.is_file():
            raise ValueError(f"There is no file {path}; give the path of a text or token file.")
        if path.suffix.lower() not in (*READERS, SUFFIX):
            raise ValueError(
                f"{path} is of an unknown kind {path.suffix!r}; "
                "give .txt (UTF-8 text), .jsonl, .parquet or .bin (tokens from `regla tokenize`)."
            )
        return [path]


def _files_in(folder: Path) -> list[Path]:
    found = sorted(file for file in folder.iterdir() if file.suffix.lower() in (*READERS, SUFFIX) and file.is_file())
    kinds = sorted({file.suffix.lower() for file in found})
    if len(kinds) == 1:
        return found
    what = f"files of several kinds ({', '.join(kinds)})" if found else "no .txt, .jsonl, .parquet or .bin file"
    raise ValueError(f"The folder {folder} holds {what}; give one with files of one kind, or name the files.")


@contextmanager
def _readable(path: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); give a file that you may read.") from error
