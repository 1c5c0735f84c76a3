"""What a command trains, validates and scores on: the files that are named, or the embedded text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from regla.data.embedded import embedded_text
from regla.data.records import TEXT_FIELD
from regla.data.sources import HELD_OUT, Source, read_source


def read_sources(files: Sequence[str | Path], text_field: str = TEXT_FIELD) -> list[Source]:
    """One source for each file; without files, the embedded text."""
    return [read_source(file, text_field) for file in files] or [embedded_text()]


def split_validation(
    data: Sequence[Source], valid: Sequence[str | Path] = (), text_field: str = TEXT_FIELD
) -> tuple[list[Source], list[Source]]:
    """What to train on and what to validate on.

    Args:
        data: sources for training.
        valid: files for validation. Without files, the last tenth of every source is held out and not trained on.
        text_field: name of the text in a record of `valid`.
    """
    if valid:
        return list(data), [read_source(file, text_field) for file in valid]
    parts = [source.hold_out(HELD_OUT) for source in data]
    return [first for first, _ in parts], [last for _, last in parts]
