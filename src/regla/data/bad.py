"""Records that cannot be used: counted and named, and an error only where there are too many."""

from __future__ import annotations

from regla.runtime.errors import OptionError, check_count, told_in_flags

MAX_BAD_RECORDS = 100
"""Of a training or a tokenization, unless another number is given."""
_SHOWN = 5


class BadRecords:
    """What was left out. most: how many records may be; with 0 the first is an error of its own."""

    def __init__(self, most: int = 0) -> None:
        check_count("max_bad_records", most, least=0)
        self.most = most
        self.told: list[str] = []
        """A sentence for each: its file, its place there, what is wrong."""

    def __len__(self) -> int:
        return len(self.told)

    def __bool__(self) -> bool:
        return True  # also without any: one may be given to be filled

    def add(self, error: ValueError) -> None:
        """Count a record that is left out; `error` says which and why.

        Raises:
            ValueError: there are too many.
        """
        if not self.most:
            raise error
        if len(self) == self.most:
            raise OptionError(
                "More than {max_bad_records} {most} records cannot be used. The first: {first} The last: {last}",
                most=self.most,
                first=self.told[0],
                last=told_in_flags(error),
            ) from error
        self.told.append(told_in_flags(error))

    def report(self) -> str:
        """Lines with the first of them; empty without any."""
        if not self.told:
            return ""
        more = [f"  and {len(self) - _SHOWN} more"] if len(self) > _SHOWN else []
        shown = [f"  {why}" for why in self.told[:_SHOWN]]
        return "\n".join([f"{counted(len(self))} left out:", *shown, *more])


def counted(number: int) -> str:
    """As "3 bad records"."""
    return f"{number:,} bad record{'' if number == 1 else 's'}"
