"""Sources of tokens: text, records with a text field, pre-tokenised files, data sets; all with the same operations.

A source is anything with `name`, `bytes`, `hold_out(fraction)` and `tokens(tokenizer)`. A new kind of file needs one
reader in `READERS`. Shape legend: N tokens of one source.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END_OF_TEXT = "<|endoftext|>"
"""Line between two documents of a text file, and the end-of-text token of tokenizers trained here."""

HELD_OUT = 0.1
"""Share of a source that is kept for validation where no other text is given for it."""

_SEPARATOR = re.compile(r"^<\|endoftext\|>\r?$", re.MULTILINE)
TEXT_FIELD = "text"
"""Name of the text in a record of a .jsonl or .parquet file or a data set."""

_ENCODE_CHARACTERS = 4_000_000  # per call of the tokenizer: bounds the Python lists of ids to some 100 MB
_CUT_SEARCH = 1_000  # characters before a held-out cut in which a line break is looked for


class Source(Protocol):
    """What training and evaluation need to know of a file."""

    @property
    def name(self) -> str: ...

    @property
    def bytes(self) -> int | None:
        """UTF-8 length of the text, None where only its tokens are known."""

    def hold_out(self, fraction: float) -> tuple[Source, Source]:
        """The source without its last `fraction`, and that last part."""

    def tokens(self, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
        """Token ids, int32 [N]; every document ends with the tokenizer's end-of-text token."""


@dataclass(frozen=True)
class Text:
    """Documents in plain text."""

    name: str
    documents: tuple[str, ...]

    @property
    def bytes(self) -> int:
        return sum(len(document.encode()) for document in self.documents)

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
                return Text(self.name, _documents(head)), Text(self.name, _documents(tail))
            cut -= len(document)
        return self, Text(self.name, ())

    def tokens(self, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
        return encode(tokenizer, self.documents)


@dataclass(frozen=True)
class Tokens:
    """Ids of a text tokenised before. ids: uint16 [N]."""

    name: str
    ids: np.ndarray

    @property
    def bytes(self) -> None:
        return None

    def hold_out(self, fraction: float) -> tuple[Tokens, Tokens]:
        cut = round((1 - fraction) * len(self.ids))
        return Tokens(self.name, self.ids[:cut]), Tokens(self.name, self.ids[cut:])

    def tokens(self, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
        if len(self.ids) and (largest := int(self.ids.max())) >= len(tokenizer):
            raise ValueError(
                f"{self.name} holds token id {largest}, but the tokenizer has only {len(tokenizer)} tokens; "
                "give the tokenizer that the file was made with."
            )
        return self.ids.astype(np.int32)


@dataclass(frozen=True)
class Encoded:
    """A source in tokens. ids: int32 [N], N > 0."""

    name: str
    ids: np.ndarray
    bytes: int | None


def encode_source(source: Source, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """Raises ValueError where the source is empty."""
    ids_N = source.tokens(tokenizer)
    if not len(ids_N):
        raise ValueError(
            f"{source.name} is too short to hold out a part of it; give more text, or --valid another file."
        )
    return Encoded(source.name, ids_N, source.bytes)


def _documents(texts: Iterable[str]) -> tuple[str, ...]:
    """Without the line breaks around each document, and without empty ones."""
    stripped = (text.strip("\r\n") for text in texts)
    return tuple(text for text in stripped if text.strip())


def _batches(documents: Sequence[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= _ENCODE_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


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


def end_of_text_id(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise ValueError("The tokenizer has no end-of-text (eos) token; set its eos_token and save it again.")
    return int(tokenizer.eos_token_id)


def read_text(path: Path) -> Text:
    """UTF-8 text; documents are separated by lines `<|endoftext|>`, if there are any."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}); convert it to UTF-8.") from error
    documents = _documents(_SEPARATOR.split(text))
    if not documents:
        raise ValueError(f"{path} holds no text; give a file with text in it.")
    return Text(str(path), documents)


def read_tokens(path: Path) -> Tokens:
    """Little-endian uint16 token ids, nothing else, as `regla tokenize` writes them."""
    size = path.stat().st_size
    if size == 0 or size % 2:
        raise ValueError(
            f"{path} has {size} bytes, expected two for each token (little-endian uint16); "
            "write it with `regla tokenize`."
        )
    return Tokens(str(path), np.fromfile(path, dtype="<u2"))


def read_jsonl(path: Path, text_field: str) -> Text:
    """A JSON object on each line, whose `text_field` is one document."""

    def records() -> Iterator[tuple[str, Any]]:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        yield f"line {number} of {path}", json.loads(line)
                    except ValueError as error:
                        raise ValueError(f"Line {number} of {path} is not JSON ({error}); correct it.") from error

    return _text_of_records(str(path), records(), text_field)


def read_parquet(path: Path, text_field: str) -> Text:
    """A table with a column `text_field` of documents; read a few rows at a time, that column alone."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(
            f"{path} needs the package pyarrow, which is not installed; run `pip install 'regla[data]'`."
        ) from error
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            names = table.schema_arrow.names
            if text_field not in names:
                raise ValueError(_no_field(str(path), names, text_field))
            rows = (row for batch in table.iter_batches(columns=[text_field]) for row in batch.to_pylist())
            return _text_of_records(
                str(path), ((f"row {number} of {path}", row) for number, row in enumerate(rows, 1)), text_field
            )
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is no readable Parquet file ({error}); give another.") from error


def read_dataset(name: str, text_field: str = TEXT_FIELD, *, characters: int | None = None) -> Text:
    """The split `train` of a Hugging Face data set, streamed until its documents have `characters`.

    name: NAME or NAME:CONFIG on the hub, or a folder of data files. Only as much as asked for is downloaded and kept.
    """
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            "--dataset needs the package datasets, which is not installed; run `pip install 'regla[data]'`."
        ) from error
    path, _, config = (name, "", "") if Path(name).exists() else name.partition(":")

    def records() -> Iterator[tuple[str, Any]]:
        size = 0
        stream = iter(datasets.load_dataset(path, config or None, split="train", streaming=True))
        for number, record in enumerate(stream, 1):
            yield f"record {number} of {name}", record
            size += len(record[text_field])
            if characters is not None and size >= characters:
                break

    try:
        return _text_of_records(name, records(), text_field)
    except UnusableRecordError:
        raise
    except Exception as error:  # whatever the hub, the network and the readers of many formats raise
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(
            f"The data set {name} cannot be read ({type(error).__name__}: {reason}); check its name and the network."
        ) from error


class UnusableRecordError(ValueError):
    """A record without the text that was asked for."""


def _text_of_records(name: str, records: Iterable[tuple[str, Any]], text_field: str) -> Text:
    """records: where each stands, and its fields."""

    def texts() -> Iterator[str]:
        for where, record in records:
            if not isinstance(record, dict) or text_field not in record:
                names = list(record) if isinstance(record, dict) else []
                raise UnusableRecordError(_no_field(where.capitalize(), names, text_field))
            if not isinstance(record[text_field], str):
                kind = type(record[text_field]).__name__
                raise UnusableRecordError(f"Field {text_field!r} in {where} is of type {kind}, expected text.")
            yield record[text_field]

    documents = _documents(texts())
    if not documents:
        raise UnusableRecordError(f"{name} holds no text; give one with text in it.")
    return Text(name, documents)


def _no_field(where: str, names: Sequence[str], text_field: str) -> str:
    known = f"it has {', '.join(names)}" if names else "it has no fields"
    return f"{where} has no field {text_field!r} ({known}); name the field of the text with --text-field."


READERS: dict[str, Callable[[Path, str], Source]] = {
    ".txt": lambda path, _: read_text(path),
    ".bin": lambda path, _: read_tokens(path),
    ".jsonl": read_jsonl,
    ".parquet": read_parquet,
}


def read_source(path: str | Path, text_field: str = TEXT_FIELD) -> Source:
    """The source in one file, by its suffix; `text_field` is that of the text in .jsonl and .parquet files."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no file {path}; give the path of a text or token file.")
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(
            f"{path} is of an unknown kind {path.suffix!r}; "
            "give .txt (UTF-8 text), .jsonl, .parquet or .bin (tokens from `regla tokenize`)."
        )
    return reader(path, text_field)
