"""The log of a run: one JSON object per line in OUT/log.jsonl and, if asked for, TensorBoard."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from regla.runtime.files import write_text

FILE = "log.jsonl"
TENSORBOARD = "tensorboard"


class TrainingLog:
    """Appends records `{"step": ..., ...}` of figures to `out`; lines behind step `after` are dropped first.

    So a run that goes on from a checkpoint has every step once. Raises ValueError where `tensorboard` asks for a
    package that is not installed.
    """

    def __init__(self, out: str | Path, *, after: int = 0, tensorboard: bool = False) -> None:
        self._tensorboard = _tensorboard_writer(Path(out) / TENSORBOARD, after) if tensorboard else None
        file = Path(out) / FILE
        kept = [line for line in _whole_lines(file) if _step(line) <= after]
        write_text(file, "".join(kept))
        self._file = file.open("a", encoding="utf-8")

    def __call__(self, record: dict[str, Any]) -> None:
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()  # a reader, and a run that is killed, find whole lines
        except OSError as error:
            raise OSError(f"The log {self._file.name} cannot be written ({error.strerror}).") from error
        if self._tensorboard is not None:
            for name, value in _scalars({key: value for key, value in record.items() if key != "step"}):
                self._tensorboard.add_scalar(name, value, record["step"])

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError) if error is not None else nullcontext():  # the first error is the one to tell
            self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()


def read_log(out: str | Path) -> list[dict[str, Any]]:
    """The records in `out`, oldest first."""
    return [json.loads(line) for line in _whole_lines(Path(out) / FILE)]


def check_tensorboard() -> None:
    """Raise ValueError unless the package `tensorboard` is installed."""
    if find_spec("tensorboard") is None:
        raise ValueError(
            "--tensorboard needs the package tensorboard, which is not installed; "
            "run `pip install tensorboard` or leave it out, log.jsonl holds the same figures."
        )


def _tensorboard_writer(folder: Path, after: int) -> Any:
    check_tensorboard()
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=after + 1 if after else None)


def _scalars(record: dict[str, Any], before: str = "") -> Iterator[tuple[str, float]]:
    """The figures of a record and of those within it, with `/` between their names, and the lengths of its lists."""
    for name, value in record.items():
        if isinstance(value, dict):
            yield from _scalars(value, f"{before}{name}/")
        elif isinstance(value, list):
            yield f"{before}{name}", len(value)
        elif isinstance(value, int | float):  # not the name of a stage
            yield f"{before}{name}", value


def _whole_lines(file: Path) -> list[str]:
    """The lines of the log but a last one that was cut short."""
    if not file.is_file():
        return []
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    return [line for line in lines if line.endswith("\n")]


def _step(line: str) -> float:
    """Of a record; beyond every other where the line is no record."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
