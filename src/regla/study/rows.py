"""The rows of a study in a .jsonl file: read, repaired, appended one at a time."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from regla.runtime.files import write_bytes
from regla.runtime.reading import read_utf8

_KINDS = {
    **dict.fromkeys(("id", "study", "title", "data_digest"), str),
    **dict.fromkeys(("variant", "config", "model"), dict),
    "lr": float,
    "seed": int,
    "diverged": bool,
}


def read_study_rows(file: str | Path, study: str) -> list[dict[str, Any]]:
    """The rows of `study` in `file`; of several with one id the last. ValueError for a line that is no such row."""
    lines = read_utf8(file, "the .jsonl file of a study's rows").splitlines()
    rows: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or not all(isinstance(row.get(key), kind) for key, kind in _KINDS.items()):
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
