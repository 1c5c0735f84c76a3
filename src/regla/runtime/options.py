"""Options of a run as fields of a dataclass, and which of them its result depends on."""

from __future__ import annotations

from dataclasses import MISSING, field, fields
from typing import Any

from regla.runtime.errors import flag

_EFFECT = "effect"
_ADDED = "added later"


def without_effect(default: Any = MISSING, **metadata: Any) -> Any:
    """A field that says where a run reads, writes or computes: its weights do not depend on it.

    Data and initial weights count by their content, whose digests stand beside the options.
    """
    return field(default=default, metadata={_EFFECT: False, **metadata})


def added_later(default: Any) -> Any:
    """A field that counts only where it differs from its default, so that checkpoints and rows from before there was
    such an option are still of the same run."""
    return field(default=default, metadata={_ADDED: True})


def with_effect(options: Any) -> dict[str, Any]:
    """The fields of a dataclass, or of its type, that the weights depend on: by name."""
    names = [
        entry.name
        for entry in fields(options)
        if entry.metadata.get(_EFFECT, True)
        and not (entry.metadata.get(_ADDED) and getattr(options, entry.name, None) == entry.default)
    ]
    return {name: getattr(options, name, None) for name in names}


def by_flag(options: dict[str, Any]) -> dict[str, Any]:
    """The same by the flags of the command line."""
    return {flag(name): value for name, value in options.items()}
