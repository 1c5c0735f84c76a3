"""Records with a text field: .jsonl and .parquet files, and data sets of Hugging Face."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from regla.data.bad import BadRecords
from regla.data.text import Piece, Text, trimmed, trimmed_pieces
from regla.runtime.errors import OptionError
from regla.runtime.install import require
from regla.runtime.reading import check_text, parse_json

TEXT_FIELD = "text"
"""Name of the text in a record of a .jsonl or .parquet file or a data set."""


class UnusableRecordError(OptionError):
    """A record without the text that was asked for."""


def jsonl_pieces(path: Path, text_field: str, bad: BadRecords) -> Iterator[Piece]:
    """A JSON object on each line, whose `text_field` is one document."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    record = parse_json(line, f"Line {number} of {path}")
                    document = _document(record, f"line {number} of {path}", text_field)
                except ValueError as error:
                    bad.add(error)
                else:
                    yield from trimmed_pieces([document])


def parquet_pieces(path: Path, text_field: str, bad: BadRecords) -> Iterator[Piece]:
    """A table with a column `text_field` of documents; read a few rows at a time, that column alone."""
    require("pyarrow", f"{path} needs")
    import pyarrow
    import pyarrow.parquet

    def values() -> Iterator[Any]:
        try:
            with pyarrow.parquet.ParquetFile(path) as table:
                names = table.schema_arrow.names
                if text_field not in names:
                    raise _no_field(str(path), names, text_field)
                for batch in table.iter_batches(batch_size=_ROWS, columns=[text_field]):
                    yield from batch.column(0)
        except UnusableRecordError:
            raise
        except (pyarrow.ArrowException, OSError, ValueError, TypeError) as error:  # among them names not in UTF-8
            raise ValueError(f"{path} is no readable Parquet file ({error}); give another.") from error

    for number, value in enumerate(values(), 1):
        where = f"row {number} of {path}"
        try:
            document = _document({text_field: _of_arrow(value, where, text_field)}, where, text_field)
        except UnusableRecordError as error:
            bad.add(error)
        else:
            yield from trimmed_pieces([document])


_ROWS = 1024  # of a table at a time


def _of_arrow(value: Any, where: str, text_field: str) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        raise UnusableRecordError(
            "Field {field!r} in {where} is not UTF-8 text (byte {byte}); convert it to UTF-8.",
            field=text_field,
            where=where,
            byte=error.start,
        ) from error


def read_dataset(
    name: str, text_field: str = TEXT_FIELD, *, characters: int | None = None, bad: BadRecords | None = None
) -> Text:
    """The split `train` of a Hugging Face data set, streamed until its documents have `characters`.

    name: NAME or NAME:CONFIG on the hub, or a folder of data files. Only as much as asked for is downloaded and kept.
    """
    require("datasets", "A data set needs")
    import datasets

    path, _, config = (name, "", "") if Path(name).exists() else name.partition(":")
    bad = bad or BadRecords()

    def documents() -> Iterator[str]:
        size = 0
        stream = iter(datasets.load_dataset(path, config or None, split="train", streaming=True))
        for number, record in enumerate(stream, 1):
            try:
                document = _document(record, f"record {number} of {name}", text_field)
            except UnusableRecordError as error:
                bad.add(error)
                continue
            yield document
            size += len(document)
            if characters is not None and size >= characters:
                break

    try:
        found = trimmed(documents())
    except OptionError:
        raise
    except Exception as error:  # whatever the hub, the network and the readers of many formats raise
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(
            f"The data set {name} cannot be read ({type(error).__name__}: {reason}); check its name and the network."
        ) from error
    if not found:
        raise UnusableRecordError("{name} holds no text; give one with text in it.", name=name)
    return Text(name, found)


def _document(record: Any, where: str, text_field: str) -> str:
    """The text of a record. Raises UnusableRecordError where it has none."""
    if not isinstance(record, dict) or text_field not in record:
        names = list(record) if isinstance(record, dict) else []
        raise _no_field(where[0].upper() + where[1:], names, text_field)
    text = record[text_field]
    if not isinstance(text, str):
        raise UnusableRecordError(
            "Field {field!r} in {where} is of type {kind}, expected text; name another with {text_field}.",
            field=text_field,
            where=where,
            kind=type(text).__name__,
        )
    try:
        return check_text(text, f"Field {text_field!r} in {where}")
    except ValueError as error:
        raise UnusableRecordError("{found}", found=error) from error


def _no_field(where: str, names: Sequence[str], text_field: str) -> UnusableRecordError:
    known = f"it has {', '.join(names)}" if names else "it has no fields"
    return UnusableRecordError(
        "{where} has no field {field!r} ({known}); name the field of the text with {text_field}.",
        where=where,
        field=text_field,
        known=known,
    )
