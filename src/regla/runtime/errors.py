"""Errors about options: they name parameters in Python and flags on the command line."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from string import Formatter
from typing import Any

LARGEST_COUNT = 2**31 - 1
"""Of steps, sequences, layers: larger ones are typing errors, and overflow somewhere later."""
LARGEST_SEED = 2**63 - 1
"""The largest seed that PyTorch's and NumPy's generators both take."""


class NamesOptions(Exception):
    """An error whose sentence names options.

        raise OptionError("{batch_size} is {value}, expected a number above 0.", value=batch_size)

    says "batch_size is 0, ..." in Python and "--batch-size is 0, ..." on the command line.

    Args:
        message: one sentence. `{name}` stands for a value where `values` has that name, and for the option of that name
            elsewhere. It is a template, no f-string.
        values: what else the message holds.
    """

    def __init__(self, message: str, **values: object) -> None:
        self.message, self.values = message, values
        super().__init__(self.told(str))

    @property
    def option(self) -> str | None:
        """The first option that the message names."""
        fields = (field for _, field, _, _ in Formatter().parse(self.message) if field)
        return next((field for field in fields if field not in self.values), None)

    def told(self, call: Callable[[str], str]) -> str:
        """The sentence with each option called what `call` says."""
        return self.message.format_map(_Values(self.values, call))

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (type(self), self.message, self.values)


class OptionError(NamesOptions, ValueError):
    """A value of an option that does not fit."""


class OptionMemoryError(NamesOptions, MemoryError):
    """The memory of the device is too small for what the options ask for."""


class OtherProcessError(RuntimeError):
    """Another process of the run failed, and says why."""


class LostProcessError(RuntimeError):
    """Another process of the run ended while this one waited for it."""


class _Values(dict[str, object]):
    def __init__(self, values: Mapping[str, object], call: Callable[[str], str]) -> None:
        super().__init__(values)
        self._call = call

    def __missing__(self, name: str) -> str:
        return self._call(name)


def _again(kind: type[NamesOptions], message: str, values: dict[str, object]) -> NamesOptions:
    return kind(message, **values)


_FLAGS = {"overrides": "--config", "json_file": "--json", "prompts_file": "--prompts", "rows_file": "--rows"}


def flag(name: str) -> str:
    """The flag of the option that Python calls `name`."""
    return _FLAGS.get(name, "--" + name.replace("_", "-"))


def told_in_flags(error: BaseException) -> str:
    """What the command line says of an error, on one line: parsers of libraries say theirs on several."""
    told = error.told(flag) if isinstance(error, NamesOptions) else str(error)
    return " ".join(line.strip() for line in told.splitlines())


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether PyTorch says that the memory of the GPU or of the CPU is full."""
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def check_count(name: str, value: int | None, *, least: int = 1, most: int = LARGEST_COUNT) -> None:
    """Raise OptionError unless `value` is None or a whole number from `least` to `most`."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise OptionError(f"{{{name}}} is {{value!r}}, expected a whole number.", value=value)
    if value < least:
        expected = "a number above 0" if least == 1 else f"{least} or more"
        raise OptionError(f"{{{name}}} is {{value}}, expected {{expected}}.", value=value, expected=expected)
    if value > most:
        raise OptionError(f"{{{name}}} is {{value}}, expected at most {{most}}.", value=value, most=most)


def check_seed(value: int, name: str = "seed") -> None:
    """Raise OptionError unless every random number generator takes `value` for its seed."""
    check_count(name, value, least=0, most=LARGEST_SEED)


def check_number(name: str, value: float | None, *, zero: bool = False) -> None:
    """Raise OptionError unless `value` is None or a finite number above 0 (`zero`: or 0)."""
    if value is None:
        return
    expected = "0 or more" if zero else "a number above 0"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise OptionError(f"{{{name}}} is {{value!r}}, expected {{expected}}.", value=value, expected=expected)
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        raise OptionError(f"{{{name}}} is {{value}}, expected {{expected}}.", value=value, expected=expected)


def check_choice(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Raise OptionError unless `value` is one of `allowed`."""
    if value not in allowed:
        choices = ", ".join(map(str, allowed))
        raise OptionError(f"{{{name}}} is {{value!r}}, expected one of {{choices}}.", value=value, choices=choices)
