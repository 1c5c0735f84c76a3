"""The rows of a study in a .jsonl file: read, repaired, appended one at a time."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from regla.runtime.files import write_bytes

_KEYS = ("id", "study", "title", "variant", "lr", "seed", "diverged", "config", "data_digest")


def read_study_rows(file: str | Path, study: str) -> list[dict[str, Any]]:
    """The rows of `study` in `file`; of several with one id the last. ValueError for a line that is no such row."""
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ValueError(f"{file} cannot be read ({reason}); give the .jsonl file of a study's rows.") from error
    rows: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not all(key in row for key in _KEYS):
            raise ValueError(f"Line {number} of {file} is no row of a study; remove it.")
        if row["study"] == study:
            rows[row["id"]] = row
    return list(rows.values())


def drop_unfinished_line(file: Path) -> None:
    """Remove a last line that was cut short, so that the next row starts a line of its own."""
    content = file.read_bytes() if file.is_file() else b""
    if content and not content.endswith(b"\n"):
        write_bytes(file, content[: content.rfind(b"\n") + 1])


def append_line(file: Path, line: str) -> None:
    """Append one line and sync it to the disk."""
    with file.open("a", encoding="utf-8") as stream:
        stream.write(line.rstrip("\n") + "\n")
        stream.flush()
        os.fsync(stream.fileno())
