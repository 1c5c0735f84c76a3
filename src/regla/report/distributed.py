"""Tables of `regla bench distributed`: several processes beside one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from regla.report.tables import markdown, ran_on

Row = dict[str, Any]


def _table(measure: str, cells: Callable[[Row], dict[str, str]], rows: Sequence[Row]) -> str:
    """The rows of one measure, the last of equal settings."""
    last = {(row["subject"], row["device"], str(row["setting"])): row for row in rows}
    shown = [row for row in last.values() if row["setting"]["measure"] == measure]
    if not shown:
        return "Not measured yet."
    body = [cells(row) for row in shown]
    return markdown(list(body[0]), [list(row.values()) for row in body], numbers_from=1) + "\n\n" + ran_on(shown)


def _place(row: Row) -> dict[str, str]:
    where = f"{row['setting']['processes']} x {'GPU' if 'cuda' in row else 'CPU process'}"
    return {"`--parallel`": f"`{row['subject']}`", "on": where}


def _losses(row: Row) -> dict[str, str]:
    return {
        **_place(row),
        "parameters": f"{row['parameters'] / 1e6:,.1f}M",
        "steps": f"{row['setting']['steps']}",
        "largest difference of a loss": f"{row['largest_difference']:.1e}",
        "a process holds": _beside(row["state_bytes"], row["formula_state_bytes"]),
        "all send in a step": _beside(row["wire_bytes_of_a_step"], row["formula_wire_bytes_of_a_step"]),
    }


def _throughput(row: Row) -> dict[str, str]:
    return {
        **_place(row),
        "tokens/s": f"{row['tokens_per_second']:,.0f}",
        "of one": f"{row['tokens_per_second_of_one']:,.0f}",
        "ratio": f"{row['times_one']:.2f}",
        "peak memory": _memory(row["peak_bytes"]),
        "of one ": _memory(row["peak_bytes_of_one"]),
    }


def _length(row: Row) -> dict[str, str]:
    return {
        **_place(row),
        "tokens": f"{row['setting']['length']:,}",
        "step": f"{row['step_seconds']:.3f} s",
        "of one": f"{row['step_seconds_of_one']:.3f} s" if "step_seconds_of_one" in row else "out of memory",
        "peak memory": _memory(row["peak_bytes"]),
        "of one ": _memory(row.get("peak_bytes_of_one")),
        "a layer sends": _beside(row["sent_bytes_of_a_layer"], row["formula_bytes_of_a_layer"], 2**10, "KiB"),
    }


def _kill(row: Row) -> dict[str, str]:
    return {
        **_place(row),
        "ends after": f"{row['seconds_to_end']:.1f} s",
        "exit code": str(row["exit_code"]),
        "one process goes on from": row["resumed_from"],
        "largest difference of a loss": f"{row['largest_difference']:.1e}",
    }


def _beside(measured: float | None, formula: float, unit: float = 1e6, name: str = "MB") -> str:
    """What was measured, and what a formula says."""
    return f"{'-' if measured is None else f'{measured / unit:,.2f}'} / {formula / unit:,.2f} {name}"


def _memory(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**30:,.1f} GiB"


DISTRIBUTED_TABLES: dict[str, Callable[[Sequence[Row]], str]] = {
    f"distributed-{measure}": partial(_table, measure, cells)
    for measure, cells in (("losses", _losses), ("throughput", _throughput), ("length", _length), ("kill", _kill))
}
"""By the name of the table."""
