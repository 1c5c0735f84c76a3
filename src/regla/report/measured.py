"""What studies measure besides the loss: how saturated gates are, and what generation costs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from regla.report.plots import plot_histograms, plot_lengths
from regla.report.studies import row_name, variant_scores
from regla.report.tables import markdown, ran_on

Row = dict[str, Any]
_WHEN = ("start", "end")


def with_gates(rows: Sequence[Row]) -> list[Row]:
    """The rows whose gates were looked at: of each variant at its best learning rate, with the first seed."""
    return _of_best([row for row in rows if "gates" in row])


def with_generation(rows: Sequence[Row]) -> list[Row]:
    """The rows with the cost of generation, one of each variant."""
    return _of_best([row for row in rows if "generation" in row])


def _of_best(rows: Sequence[Row]) -> list[Row]:
    best = {score.name: score.best_lr for score in variant_scores(rows)} if rows else {}
    found: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: row["seed"]):
        if row["lr"] == best[row_name(row)]:
            found.setdefault(row_name(row), row)
    return [found[name] for name in best if name in found]


def gates_table(rows: Sequence[Row]) -> str:
    """Share of saturated gates and the slope of F, before and after training, the mean over layers."""
    body = []
    for row in with_gates(rows):
        cells = []
        for name, form in (("saturated_low", ".1%"), ("saturated_high", ".1%"), ("slopes", ".4f")):
            for when in _WHEN:
                values = [value for layer in row["gates"][when] for value in layer[name].values()]
                cells.append(f"{sum(values) / len(values):{form}}" if values else "-")
        body.append([row_name(row), *cells, f"{row['validation_loss']:.4f}"])
    titles = [f"{what}, {when}" for what in ("F < 0.01", "F > 0.99", "dF/da") for when in _WHEN]
    return f"{markdown(['variant', *titles, 'loss'], body, numbers_from=1)}\n\n{ran_on(with_gates(rows))}"


def plot_gates(rows: Sequence[Row], file: str | Path) -> None:
    """Histograms of the forget gates before and after training, the mean over layers, a panel for each variant."""
    panels = {}
    for row in with_gates(rows):
        curves = {}
        for when in _WHEN:
            histograms = [bins for layer in row["gates"][when] for bins in layer["histogram"].values()]
            if histograms:
                curves[when] = [sum(bins) / len(histograms) for bins in zip(*histograms, strict=True)]
        if curves:
            panels[row_name(row)] = curves
    plot_histograms(panels, file, title=rows[0]["title"], along="forget gate F", unit="share of gates")


def generation_table(rows: Sequence[Row]) -> str:
    """Seconds, peak memory and cache by the number of generated tokens."""
    body = [
        [
            row_name(row),
            f"{point['tokens']:,}",
            f"{point['seconds']:,.1f}",
            "-" if point["peak_bytes"] is None else f"{point['peak_bytes'] / 2**20:,.1f}",
            f"{point['cache_bytes'] / 2**20:,.2f}",
        ]
        for row in with_generation(rows)
        for point in row["generation"]
    ]
    titles = ["variant", "tokens", "seconds", "peak memory, MiB", "cache, MiB"]
    return f"{markdown(titles, body, numbers_from=1)}\n\n{ran_on(with_generation(rows))}"


def plot_generation(rows: Sequence[Row], file: str | Path) -> None:
    """Seconds, and memory, over the number of generated tokens; where the device tells no peak, the cache's memory."""
    seconds, memory = {}, {}
    has_peak = all(point["peak_bytes"] is not None for row in with_generation(rows) for point in row["generation"])
    which = "peak_bytes" if has_peak else "cache_bytes"
    for row in with_generation(rows):
        seconds[row_name(row)] = [(point["tokens"], point["seconds"]) for point in row["generation"]]
        memory[row_name(row)] = [(point["tokens"], point[which] / 2**20) for point in row["generation"]]
    plot_lengths(
        {"Time, seconds": seconds, f"{'Peak memory' if has_peak else 'Cache'}, MiB": memory},
        file,
        title=rows[0]["title"],
        along="generated tokens",
        unit="",
    )
