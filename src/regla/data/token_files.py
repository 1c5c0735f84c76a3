"""Token files: little-endian uint16 ids, nothing else, and beside each the record of what it holds, `NAME.bin.json`.

A file is read where it is asked for and never kept: training on one takes no memory, however long it is. Ids are read,
not mapped, so that a file which is cut short meanwhile is an error rather than the end of the process.
Shape legend: N tokens of a file or a part of it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING

import numpy as np

from regla.data.tokenizer import vocabulary_digest
from regla.runtime.files import sync_folder, unfinished_name, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SUFFIX = ".bin"
LARGEST_VOCABULARY = 2**16
"""Ids that a token file can tell apart."""
_RECORD = ".json"  # behind the name of the token file
_ID = np.dtype("<u2")
_BLOCK = 2**23  # tokens that are read at a time


@dataclass(frozen=True, kw_only=True)
class Content:
    """What a token file holds."""

    tokens: int
    largest_id: int
    sha256: str
    """Of the file."""
    documents: int | None = None
    """None where it is not known, as are the others."""
    longest_document: int | None = None
    """In tokens, its end-of-text token among them."""
    vocabulary: str | None = None
    """SHA-256 of the tokenizer's tokens up to `largest_id`."""
    left_out: Sequence[str] = ()
    """Bad records of the text, if no other file is of it."""


class TokenFile:
    """Ids that are read from a file, as an array of uint16 [N] that has a length and slices.

    Raises:
        ValueError: the file is empty, or its length is not the recorded one.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        size = self.path.stat().st_size
        self.recorded = _read_record(self.path)
        if self.recorded is not None and size != _ID.itemsize * self.recorded.tokens:
            raise ValueError(
                f"{self.path} is damaged: it has {size:,} bytes, expected {_ID.itemsize * self.recorded.tokens:,} "
                f"by {record_of(self.path).name}; write both again with `regla tokenize`."
            )
        if size == 0 or size % _ID.itemsize:
            raise ValueError(
                f"{self.path} has {size} bytes, expected two for each token (little-endian uint16); "
                "write it with `regla tokenize`."
            )
        self._tokens = size // _ID.itemsize
        self._content: Content | None = None

    def __len__(self) -> int:
        return self._tokens

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, _ = part.indices(self._tokens)
        count = max(0, stop - start)
        ids_N = np.fromfile(self.path, dtype=_ID, count=count, offset=start * _ID.itemsize)
        if len(ids_N) != count:
            raise ValueError(f"{self.path} has become shorter while it was read; leave it alone, and start again.")
        return ids_N

    def content(self, *, verify: bool = True) -> Content:
        """What the file holds; once, the whole file is compared with its record.

        Args:
            verify: without it the record is believed, where there is one.

        Raises:
            ValueError: the file is not what was recorded.
        """
        if self._content is None and not verify and self.recorded is not None:
            return self.recorded
        if self._content is None:
            digest, largest = hashlib.sha256(), 0
            for start in range(0, self._tokens, _BLOCK):
                ids_N = self[start : start + _BLOCK]
                digest.update(ids_N.data)
                largest = max(largest, int(ids_N.max()))
            found = Content(tokens=self._tokens, largest_id=largest, sha256=digest.hexdigest())
            if self.recorded is not None and found.sha256 != self.recorded.sha256:
                raise ValueError(
                    f"{self.path} is damaged: its content does not have the SHA-256 in {record_of(self.path).name}; "
                    "write both again with `regla tokenize`."
                )
            self._content = self.recorded or found
        return self._content


class TokenWriter:
    """Writes a token file in parts, and its record; whole or not at all, also after a loss of power."""

    def __init__(self, path: Path, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        self.path, self._tokenizer = path, tokenizer
        self.tokens = self.documents = 0
        self.left_out: Sequence[str] = ()
        self._longest = self._length = self._largest = 0
        self._digest = hashlib.sha256()
        self._file: IO[bytes] | None = None

    def write(self, ids_N: np.ndarray, *, ends: bool = True) -> None:
        """Append ids of a document, integers [N]; `ends`: its last ones. Without any, documents are not known.

        Raises:
            ValueError: an id does not fit.
        """
        if len(ids_N):
            if not 0 <= int(ids_N.min()) <= int(ids_N.max()) < LARGEST_VOCABULARY:
                raise ValueError(f"The token ids {ids_N.min()} to {ids_N.max()} do not fit the 16 bits of {self.path}.")
            self._largest = max(self._largest, int(ids_N.max()))
        content = ids_N.astype(_ID).tobytes()
        assert self._file is not None
        self._file.write(content)
        self._digest.update(content)
        self.tokens += len(ids_N)
        self._length += len(ids_N)
        if ends:
            self.documents += 1
            self._longest, self._length = max(self._longest, self._length), 0

    def __enter__(self) -> TokenWriter:
        self._file = unfinished_name(self.path).open("wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._file is not None
        unfinished = unfinished_name(self.path)
        try:
            if error is None:
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._file.close()
            if error is not None:
                unfinished.unlink(missing_ok=True)
        if error is None:
            # The record first: a file without it would count as whole, and be of an unknown tokenizer.
            write_json(record_of(self.path), asdict(self._content()))
            os.replace(unfinished, self.path)
            sync_folder(self.path.parent)

    def _content(self) -> Content:
        tokenizer = self._tokenizer
        return Content(
            tokens=self.tokens,
            largest_id=self._largest,
            sha256=self._digest.hexdigest(),
            documents=self.documents or None,
            longest_document=self._longest or None,
            vocabulary=None if tokenizer is None else vocabulary_digest(tokenizer, self._largest),
            left_out=list(self.left_out),
        )


def record_of(path: Path) -> Path:
    """The record beside a token file."""
    return path.with_name(path.name + _RECORD)


def _read_record(path: Path) -> Content | None:
    record = record_of(path)
    if not record.is_file():
        return None
    try:
        found = json.loads(record.read_bytes())
        content = Content(**{field.name: found[field.name] for field in fields(Content)})
        if type(content.tokens) is int and type(content.largest_id) is int and isinstance(content.sha256, str):
            return content
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise ValueError(
        f"{record} is damaged; write it and {path.name} again with `regla tokenize`, or remove it, if {path.name} is "
        "known to be good."
    )
