"""What a command trains, validates and scores on: the files that are named, or the embedded text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from regla.data.bad import BadRecords
from regla.data.embedded import embedded_text
from regla.data.records import TEXT_FIELD
from regla.data.sources import HELD_OUT, Source, files_of, read_source
from regla.runtime.errors import OptionError


def read_sources(
    files: Sequence[str | Path], text_field: str = TEXT_FIELD, bad: BadRecords | None = None
) -> list[Source]:
    """One source for each file or folder; without any, the embedded text."""
    return [read_source(file, text_field, bad) for file in files] or [embedded_text()]


def split_validation(
    data: Sequence[Source],
    valid: Sequence[str | Path] = (),
    text_field: str = TEXT_FIELD,
    bad: BadRecords | None = None,
) -> tuple[list[Source], list[Source]]:
    """What to train on and what to validate on.

    Args:
        data: sources for training.
        valid: files for validation. Without files, the last tenth of every source is held out and not trained on.
        text_field: name of the text in a record of `valid`.
        bad: as for `read_source`.
    """
    if valid:
        return list(data), [read_source(file, text_field, bad) for file in valid]
    parts = [source.hold_out(HELD_OUT) for source in data]
    return [first for first, _ in parts], [last for _, last in parts]


def check_apart(data: Sequence[str | Path], valid: Sequence[str | Path]) -> None:
    """Raise ValueError where a folder of `data` holds a file of `valid`: it would be trained on unseen."""
    held_out = {file.resolve() for path in valid for file in files_of(path)}
    for folder in data:
        for file in files_of(folder) if Path(folder).is_dir() else ():
            if file.resolve() in held_out:
                raise OptionError(
                    "The folder {folder} of {data} holds {file}, which {valid} names; move it out, or name the files "
                    "of {data} one by one.",
                    folder=folder,
                    file=file.name,
                )
