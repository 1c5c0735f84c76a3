"""What models answered, kept in a file, so that nothing is scored twice."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FOLDER = "answers"
_FILES = ("*.safetensors", "*.bin", "*.json")


class Answers:
    """What a model answered, by request; in a file with one JSON object a line, if one is given.

    Args:
        file: read first, then appended to. A last line that was cut short is dropped.
    """

    def __init__(self, file: Path | None) -> None:
        self.known: dict[str, Any] = {}
        self._file = None
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            whole = file.read_bytes().rpartition(b"\n")[0] if file.is_file() else b""
            for line in whole.splitlines():
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    record = json.loads(line)
                    self.known[record["request"]] = record["answer"]
            self._file = file.open("r+b" if file.is_file() else "wb")
            self._file.truncate(len(whole) + 1 if whole else 0)
            self._file.seek(0, os.SEEK_END)

    def __setitem__(self, request: str, answer: Any) -> None:
        if request not in self.known:
            self.known[request] = answer
            if self._file is not None:
                self._file.write(json.dumps({"request": request, "answer": answer}).encode() + b"\n")
                self._file.flush()  # who kills the process now loses nothing

    def add_partial(self, kind: str, arguments: Sequence[Any], answer: Any) -> None:
        """What lm-eval's model classes call for each answer."""
        if not samples(arguments):
            self[request_key(kind, arguments)] = answer

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()


def request_key(kind: str, arguments: Sequence[Any]) -> str:
    """Names a request: its kind ("loglikelihood", ...) and lm-eval's arguments of it, strings for the most part."""
    return hashlib.sha256(json.dumps([kind, *arguments]).encode()).hexdigest()[:32]


def samples(arguments: Sequence[Any]) -> bool:
    """Whether a request draws at random, so that a second one may be answered otherwise."""
    return isinstance(arguments[-1], dict) and bool(arguments[-1].get("do_sample"))


def answers_file(out: str | Path, model: str, dtype: str, kind: str) -> Path:
    """Named by all that an answer depends on besides its request; a model that was trained again gets another file."""
    path = Path(model)
    files = [file for pattern in _FILES for file in sorted(path.glob(pattern))] if path.is_dir() else [path]
    states = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
    digest = hashlib.sha256(json.dumps([model, states, dtype, kind]).encode()).hexdigest()[:8]
    return Path(out) / FOLDER / f"{path.name or 'model'}-{digest}.jsonl"
