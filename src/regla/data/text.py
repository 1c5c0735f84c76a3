"""Documents in plain text, and their tokens. Shape legend: N tokens of one source."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from regla.data.tokenizer import end_of_text_id
from regla.runtime.reading import check_text, read_utf8

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SEPARATOR = re.compile(r"^<\|endoftext\|>\r?$", re.MULTILINE)
_ENCODE_CHARACTERS = 4_000_000  # per call of the tokenizer: bounds the Python lists of ids to some 100 MB
_CUT_SEARCH = 1_000  # characters before a held-out cut in which a line break is looked for


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


def read_text(path: Path) -> Text:
    """UTF-8 text; documents are separated by lines `<|endoftext|>`, if there are any."""
    documents = trimmed(_SEPARATOR.split(read_utf8(path, "a text file")))
    if not documents:
        raise ValueError(f"{path} holds no text; give a file with text in it.")
    return Text(str(path), documents)


def encode(tokenizer: PreTrainedTokenizerBase, documents: Sequence[str]) -> np.ndarray:
    """Token ids of all documents in a row, each followed by the end-of-text token; int32 [N].

    A special token spelled out inside a document is read as the characters it consists of.
    """
    end = end_of_text_id(tokenizer)
    parts: list[np.ndarray] = []
    for batch in _batches(documents):
        rows = tokenizer(
            batch, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
        )["input_ids"]
        parts.extend(np.asarray([*row, end], dtype=np.int32) for row in rows)
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)


def _batches(documents: Sequence[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for number, document in enumerate(documents, 1):
        batch.append(check_text(document, f"Document {number}"))
        size += len(document)
        if size >= _ENCODE_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
