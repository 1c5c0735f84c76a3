"""What `regla bench` measured: a line and a table of rows, and plots against the length."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from regla.report.plots import plot_lengths
from regla.report.students import students_cells
from regla.report.tables import markdown, ran_on

Row = dict[str, Any]

_WIDTHS = {
    "case": 24,
    "KL": 13,
    "operation": 38,
    "model": 36,
    "shape": 20,
    "p20 / p50 / p80, us": 24,
}  # in characters, of printed columns
_WIDTH = 11  # of the others
_DIRECTIONS = {"forward": "fwd", "forward+backward": "fwd+bwd", "step": "step"}
_NAMES = {
    "softmax": "softmax",
    "regla": "ReGLA",
    "hybrid": "hybrid",
    "identity": "identity for a mixer",
    "values": "values for outputs",
}

_GATES = {"regla_attention": "at initialisation", "regla_attention_fast_gates": "fast"}
_KERNELS = [f"{operation}/{axis}/triton" for operation in _GATES for axis in ("key", "value", "both")]


def benches_table(rows: Sequence[Row]) -> str:
    """Rows of one of `regla bench ops|decode|train`, in their order; of equal settings the last."""
    rows = latest(rows)
    shown = [cells(row) for row in rows]
    titles = list(dict.fromkeys(title for row in shown for title in row))
    body = [[row.get(title, "-") for title in titles] for row in shown]
    return markdown(titles, body, numbers_from=1) + "\n\n" + ran_on(rows)


def speed_table(rows: Sequence[Row]) -> str:
    """Training speed of ReGLA beside softmax attention by length: of each the last row without activation
    checkpointing."""
    rows = [
        row for row in latest(rows) if not row["activation_checkpointing"] and row["subject"] in ("softmax", "regla")
    ]
    last = {(row["subject"], row["setting"]["length"]): row for row in rows}
    body = []
    for length in sorted({length for _, length in last}):
        pair = [last.get((subject, length)) for subject in ("softmax", "regla")]
        rates = [row["tokens_per_second"] for row in pair if row is not None]
        if len(rates) == 2:
            body.append([f"{length:,}", *(f"{rate / 1e3:,.0f}k" for rate in rates), f"{rates[1] / rates[0]:.2f}x"])
    shown = list(last.values())
    return f"{markdown(['tokens of a sequence', 'softmax', 'ReGLA', 'ratio'], body)}\n\n{ran_on(shown)}"


def kernels_table(rows: Sequence[Row]) -> str:
    """The kernels beside softmax attention and fla: forward, and forward and backward, by shape, gates and axis."""
    rows = [row for row in latest(rows) if row["subject"] in _KERNELS and "p50_us" in row]
    rows = [row for row in rows if row["setting"]["dtype"] == "bfloat16"]
    groups: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        setting = row["setting"]
        shape = tuple(setting[name] for name in ("K", "T", "B", "H"))
        groups.setdefault((*shape, _KERNELS.index(row["subject"])), {})[setting["direction"]] = row
    body = []
    for (K, T, B, H, subject), directions in sorted(groups.items(), key=lambda group: group[0]):
        operation, axis, _ = _KERNELS[subject].split("/")
        line = [f"{B} x {T:,}", f"{H} x {K}", _GATES[operation], axis]
        for direction in ("forward", "forward+backward"):
            line += _beside(directions[direction]) if direction in directions else ["-", "-", "-"]
        body.append(line)
    beside = ["x softmax", "x fla"]
    titles = ["batch x tokens", "heads", "gates", "decay on"]
    return f"{markdown([*titles, 'fwd, us', *beside, 'fwd+bwd, us', *beside], body, numbers_from=4)}\n\n{ran_on(rows)}"


def _beside(row: Row) -> list[str]:
    return [f"{row['p50_us']:,.0f}", _ratio(row, "softmax_attention/none/sdpa"), _ratio(row, "chunk_gla/key/fla")]


def lines(row: Row) -> tuple[str, str]:
    """(titles, the row) as text in columns of the same width for every row of a benchmark."""
    if row["benchmark"] not in _CELLS:
        return "", json.dumps(row)
    shown = cells(row)
    widths = [_WIDTHS.get(title, max(len(title), _WIDTH)) for title in shown]
    titles, texts = (
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in (shown.keys(), shown.values())
    )
    return titles, texts


def cells(row: Row) -> dict[str, str]:
    """What a table shows of a row of `regla bench ops|decode|train`, by the column's title."""
    return _CELLS[row["benchmark"]](row)


def _ops_cells(row: Row) -> dict[str, str]:
    setting = row["setting"]
    shape = f"B{setting['B']} T{setting['T']} H{setting['H']} {setting['K']}x{setting['V']}"
    return {
        "operation": row["subject"],
        "shape": shape,
        "direction": _DIRECTIONS[setting["direction"]],
        "dtype": setting["dtype"],
        **_time(row, "us", 1.0),
        "GB/s": _number(row, "gb_per_s", ",.0f"),
        "of copy bandwidth": _number(row, "of_floor", ".0%"),
        "extra memory": _memory(row.get("peak_extra_bytes")),
        "x sdpa": _ratio(row, "softmax_attention/none/sdpa"),
        "x fla": _ratio(row, "chunk_kda/key/fla" if "delta" in row["subject"] else "chunk_gla/key/fla"),
    }


def _decode_cells(row: Row) -> dict[str, str]:
    setting = row["setting"]
    turns = {"x shortest": _number(row, "of_shortest", ".3f")} if "of_shortest" in row else {}
    return {
        "model": _name(row),
        "batch": str(setting["batch"]),
        "context": f"{setting['context']:,}",
        "tokens/s": _number(row, "tokens_per_second", ",.0f"),
        **_time(row, "ms", 1e-3),
        **turns,
        "of copy bandwidth": _number(row, "of_floor", ".0%"),
        "peak memory": _memory(row.get("peak_bytes")),
        "cache": _memory(row.get("cache_bytes")),
        "x softmax": _ratio(row, "softmax"),
    }


def _train_cells(row: Row) -> dict[str, str]:
    setting = row["setting"]
    return {
        "model": _name(row) + (", activation checkpointing" if row["activation_checkpointing"] else ""),
        "length": f"{setting['length']:,}",
        "batch": str(setting["batch"]),
        "tokens/s": _number(row, "tokens_per_second", ",.0f"),
        **_time(row, "ms", 1e-3),
        **({"FLOP utilisation": f"{row['utilisation']:.1%}"} if "utilisation" in row else {}),
        "peak memory": _memory(row.get("peak_bytes")),
        "x softmax": _ratio(row, "softmax"),
        "x values": _ratio(row, "values"),
        "x identity": _ratio(row, "identity"),
    }


def _eval_cells(row: Row) -> dict[str, str]:
    setting = row["setting"]
    return {
        "model": _NAMES[row["subject"]],
        "prefix": f"{setting['prefix']:,}",
        "dtype": setting["dtype"],
        "whole, s": _number(row, "seconds_whole", ".2f"),
        "shared, s": _number(row, "seconds_shared", ".2f"),
        "speed-up": _number(row, "speed_up", ".2f") + "x",
        "difference, nats": _number(row, "largest_difference", ".1e"),
    }


_CELLS = {
    "bench eval": _eval_cells,
    "bench ops": _ops_cells,
    "bench decode": _decode_cells,
    "bench train": _train_cells,
    "bench students": students_cells,
}


def latest(rows: Sequence[Row]) -> list[Row]:
    """Without those of which a later run has the same subject, setting, overrides and activation checkpointing."""

    def key(row: Row) -> str:
        kind = [row.get("activation_checkpointing"), row.get("overrides")]
        return json.dumps([row["subject"], row["setting"], *kind], sort_keys=True)

    return list({key(row): row for row in rows}.values())


def plot_bench(rows: Sequence[Row], file: str | Path) -> None:
    """Speed against length, from rows of one of `regla bench ops|decode|train`.

    ops: nanoseconds per token of the batch; of shapes with equal heads and tokens those that have the most lengths, and
    without the chunked form where the kernels ran. decode, train: tokens per second.
    """
    measured = [row for row in latest(rows) if "p50_us" in row]
    kind = rows[0]["benchmark"]
    if kind == "bench ops":
        panels, unit, along = _panels_of_ops(measured), "nanoseconds per token", "tokens of a sequence"
        title = "Time of the operations"
    elif kind == "bench decode":
        panels, unit, along = _panels(measured, "batch", "context"), "tokens per second", "tokens of context"
        title = "Decoding with `generate`"
    else:
        panels, unit, along = _panels(measured, None, "length"), "tokens per second", "tokens of a sequence"
        title = "Training, end to end, gates at initialisation"
    plot_lengths(panels, file, title=f"{title}, {rows[0]['device']}", along=along, unit=unit, least_ratio=2.0)


def _panels_of_ops(rows: Sequence[Row]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    families: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        setting = row["setting"]
        if setting["direction"] == "step" or "part" in setting:
            continue
        key = (setting["B"] * setting["T"], *(setting[name] for name in ("H", "K", "V", "dtype")))
        families.setdefault(key, []).append(row)
    family = max(families.values(), key=lambda some: len({row["setting"]["T"] for row in some}))
    if any(row["backend"] == "triton" for row in family):
        family = [row for row in family if row["backend"] != "chunked"]
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in sorted(family, key=lambda row: row["setting"]["T"]):
        setting = row["setting"]
        curve = panels.setdefault(setting["direction"], {}).setdefault(row["subject"], [])
        curve.append((setting["T"], row["p50_us"] * 1e3 / (setting["B"] * setting["T"])))
    return panels


def _panels(rows: Sequence[Row], across: str | None, along: str) -> dict[str, dict[str, list[tuple[float, float]]]]:
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in sorted(rows, key=lambda row: row["setting"][along]):
        title = "" if across is None else f"{across} {row['setting'][across]}"
        name = next(iter(cells(row).values()))
        curve = panels.setdefault(title, {}).setdefault(name, [])
        curve.append((row["setting"][along], row["tokens_per_second"]))
    return panels


def _name(row: Row) -> str:
    own = [f"{name} {value}" for name, value in row.get("overrides", {}).items()]
    turns = ["contexts in turns"] if row["setting"].get("in_turns") else []
    return ", ".join([_NAMES[row["subject"]], *own, *turns, *([] if row["setting"]["compiled"] else ["not compiled"])])


def _time(row: Row, unit: str, of_us: float) -> dict[str, str]:
    """Three quantiles, or one word where memory ran out."""
    if row.get("out_of_memory"):
        return {f"p20 / p50 / p80, {unit}": "out of memory"}
    digits = [row[f"p{quantile}_us"] * of_us for quantile in (20, 50, 80)]
    return {f"p20 / p50 / p80, {unit}": " / ".join(f"{x:,.0f}" if x >= 100 else f"{x:.2f}" for x in digits)}


def _number(row: Row, key: str, form: str) -> str:
    return f"{row[key]:{form}}" if key in row else "-"


def _memory(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:,.1f} MiB"


def _ratio(row: Row, subject: str) -> str:
    """How many times as fast as `subject`, in the same run."""
    ratio = row.get("against", {}).get(subject)
    return "-" if ratio is None else f"{ratio:.2f}"
