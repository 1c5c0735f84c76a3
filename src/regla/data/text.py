"""Documents in plain text, and their tokens. Shape legend: N tokens of one source.

Documents stream in pieces: however long one is, only a part of it is in memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

import numpy as np

from regla.data.bad import BadRecords
from regla.data.tokenizer import end_of_text_id
from regla.runtime.reading import check_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SEPARATOR = re.compile(r"(^<\|endoftext\|>\r?$)", re.MULTILINE)
_LONGEST_SEPARATOR = 14
_READ_CHARACTERS = 2**20
_ENCODE_CHARACTERS = 4_000_000  # per call of the tokenizer: bounds the Python lists of ids to some 100 MB
_PIECE_CHARACTERS = 1_000_000  # of a document, at most: a tokenizer takes several hundred bytes for each
_BETWEEN_LINES = re.compile(r"\S\r?\n(?=\S)")
_CUT_SEARCH = 1_000  # characters before a held-out cut in which a line break is looked for


class Piece(NamedTuple):
    """Text of a document, or a part of it."""

    text: str
    ends: bool = True
    """Whether the document ends here."""


@dataclass(frozen=True)
class Text:
    """Documents in plain text."""

    name: str
    documents: tuple[str, ...]

    @property
    def bytes(self) -> int:
        return sum(len(document.encode()) for document in self.documents)

    @property
    def words(self) -> int:
        """Runs of characters between white space."""
        return sum(len(document.split()) for document in self.documents)

    def hold_out(self, fraction: float) -> tuple[Text, Text]:
        """Split at `1 - fraction` of the characters, moved back to a line break if there is one just before.

        Cutting the text rather than its tokens keeps the held-out text the same for every tokenizer, and lets one be
        trained on the first part alone.
        """
        cut = round((1 - fraction) * sum(map(len, self.documents)))
        for index, document in enumerate(self.documents):
            if cut < len(document):
                at = document.rfind("\n", max(0, cut - _CUT_SEARCH), cut) + 1 or cut
                head = (*self.documents[:index], document[:at])
                tail = (document[at:], *self.documents[index + 1 :])
                return Text(self.name, trimmed(head)), Text(self.name, trimmed(tail))
            cut -= len(document)
        return self, Text(self.name, ())

    def tokens(self, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
        return encode(tokenizer, self.documents)


def trimmed(texts: Iterable[str]) -> tuple[str, ...]:
    """Without the line breaks around each document, and without empty ones."""
    stripped = (text.strip("\r\n") for text in texts)
    return tuple(text for text in stripped if text.strip())


def whole(pieces: Iterable[Piece]) -> tuple[str, ...]:
    """Documents from their pieces."""
    documents, parts = [], []
    for piece in pieces:
        parts.append(piece.text)
        if piece.ends:
            documents.append("".join(parts))
            parts.clear()
    return tuple(documents)


def trimmed_pieces(chunks: Iterable[str]) -> Iterator[Piece]:
    """A document that comes in chunks, as `trimmed` has it; nothing where it is empty."""
    held, begun = "", False
    for chunk in chunks:
        held += chunk
        if not begun:
            held = held.lstrip("\r\n")
        if len(held) > _PIECE_CHARACTERS:
            *done, held = _cut(held, len(held.rstrip("\r\n")))
            begun = begun or bool(done)
            yield from (Piece(text, ends=False) for text in done)
    held = held.rstrip("\r\n")
    if begun or held.strip():
        yield Piece(held)


def _cut(text: str, end: int) -> list[str]:
    """Pieces of `text` but the last no longer than `_PIECE_CHARACTERS`; `end` is where its last line ends.

    A cut is between two lines that no empty line parts, if there are any: there byte-level tokenizers cut, too.
    """
    parts, start = [], 0
    while end - start > _PIECE_CHARACTERS:
        window = text[start : start + _PIECE_CHARACTERS + 1]
        breaks = [found.end() for found in _BETWEEN_LINES.finditer(window)]
        at = breaks[-1] if breaks else window.rfind(" ", 1, _PIECE_CHARACTERS)
        at = at if at > 0 else _PIECE_CHARACTERS
        parts.append(window[:at])
        start += at
    return [*parts, text[start:]]


def text_pieces(path: Path, _: str, bad: BadRecords) -> Iterator[Piece]:
    """UTF-8 text; documents are separated by lines `<|endoftext|>`, if there are any."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        blocks = _blocks(file)
        position, number = 0, 0  # bytes before the next block, number of the document

        def chunks(first: str) -> Iterator[str]:
            """Of a document, to the next separator."""
            nonlocal position
            for block in chain([first], blocks):
                before, position = position, position + len(block.encode(errors="surrogateescape"))
                if isinstance(block, _Separator):
                    return
                if not block.isascii() and (escaped := re.search("[\udc80-\udcff]", block)):
                    byte = before + len(block[: escaped.start()].encode())
                    raise ValueError(
                        f"Document {number} of {path} is not UTF-8 text (byte {byte}); convert it to UTF-8."
                    )
                yield block

        for first in blocks:
            number += 1
            begun = False
            try:
                for piece in trimmed_pieces(chunks(first)):
                    begun = True
                    yield piece
            except ValueError as error:
                bad.add(error)
                for block in blocks:  # the rest of the document
                    position += len(block.encode(errors="surrogateescape"))
                    if isinstance(block, _Separator):
                        break
                if begun:
                    yield Piece("")


class _Separator(str):
    """A line between documents, without its line break."""


def _blocks(file: IO[str]) -> Iterator[str]:
    """The content of a file in blocks; separators are blocks of their own."""
    held, inside = "", False  # inside a line of which a part has gone
    while block := file.read(_READ_CHARACTERS):
        held += block
        if inside:
            end = held.find("\n") + 1
            inside = not end
            yield held[: end or None]
            held = held[end:] if end else ""
        end = held.rfind("\n") + 1
        if end:
            yield from _separated(held[:end])
            held = held[end:]
        if len(held) > _LONGEST_SEPARATOR:
            yield held
            held, inside = "", True
    if held:
        yield from [held] if inside else _separated(held)


def _separated(lines: str) -> Iterator[str]:
    for number, part in enumerate(_SEPARATOR.split(lines)):
        if part:
            yield _Separator(part) if number % 2 else part


def encode(tokenizer: PreTrainedTokenizerBase, documents: Iterable[str]) -> np.ndarray:
    """Token ids of all documents in a row, each followed by the end-of-text token; int32 [N]."""

    def pieces() -> Iterator[Piece]:
        for number, document in enumerate(documents, 1):
            *first, last = _cut(check_text(document, f"Document {number}"), len(document))
            yield from (Piece(text, ends=False) for text in first)
            yield Piece(last)

    parts = [ids for ids, _ in encode_pieces(tokenizer, pieces())]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)


def encode_pieces(tokenizer: PreTrainedTokenizerBase, pieces: Iterable[Piece]) -> Iterator[tuple[np.ndarray, bool]]:
    """Token ids of each piece, int32, and whether a document ends there, with the end-of-text token.

    A special token spelled out inside a document is read as the characters it consists of.
    """
    end = end_of_text_id(tokenizer)
    for batch in _batches(pieces):
        rows = tokenizer(
            [piece.text for piece in batch],
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            verbose=False,
        )["input_ids"]
        for row, piece in zip(rows, batch, strict=True):
            yield np.asarray([*row, end] if piece.ends else row, dtype=np.int32), piece.ends


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= _ENCODE_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
