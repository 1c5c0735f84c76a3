"""Studies of associative recall: how many answers are right by pairs, by gap and by distance.

Every variant is shown at its best learning rate. A cell is the mean over seeds of the share of right answers, and the
standard error of that mean over sequences: sqrt(sum of squared errors of the seeds) / seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from regla.layers.feature_maps import num_features
from regla.report.plots import plot_shares
from regla.report.studies import row_name, variant_scores
from regla.report.tables import markdown, ran_on

Row = dict[str, Any]
Shares = dict[int, tuple[float, float]]
"""Share of right answers and its standard error, by pairs, gap or first distance of a bin."""


def recall(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows that were scored so, by variant, at its best learning rate; empty where none was."""
    found = {}
    for score in variant_scores(rows):
        own = [row for row in rows if row_name(row) == score.name and row["lr"] == score.best_lr and "recall" in row]
        if own:
            found[score.name] = own
    return found


def by_pairs(rows: Sequence[Row]) -> Shares:
    """At the smallest gap."""
    gap = min(cell["gap"] for cell in rows[0]["recall"])
    return _by("pairs", [[cell for cell in row["recall"] if cell["gap"] == gap] for row in rows])


def by_gap(rows: Sequence[Row]) -> Shares:
    """Of the smallest number of pairs, which has room for all gaps."""
    pairs = min(cell["pairs"] for cell in rows[0]["recall"])
    return _by("gap", [[cell for cell in row["recall"] if cell["pairs"] == pairs] for row in rows])


def by_distance(rows: Sequence[Row]) -> Shares:
    """All cells together, by the first distance of each bin."""
    return _by("first", [[bin_ for cell in row["recall"] for bin_ in cell["by_distance"]] for row in rows])


def state_size(row: Row) -> int:
    """Numbers that a sequence's memory holds at its end, all layers together: states, or keys and values."""
    model, size = row["model"], 0
    kv_heads, K, V = model["num_key_value_heads"], model["head_dim"], model["value_head_dim"]
    F = num_features(model.get("feature_map", "identity"), K, V, model.get("feature_dim"))
    for kind in model["layer_types"]:
        kept = row["config"]["seq_len"]
        if kind == "sliding_attention":
            kept = min(kept, model["sliding_window"])
        size += kv_heads * (F * V if kind == "linear_attention" else 2 * K * kept)
    return size


def pairs_table(rows: Sequence[Row]) -> str:
    return _table(rows, by_pairs, lambda pairs: f"{pairs} pairs")


def gaps_table(rows: Sequence[Row]) -> str:
    return _table(rows, by_gap, lambda gap: f"gap {gap}")


def distances_table(rows: Sequence[Row]) -> str:
    return _table(rows, by_distance, lambda first: f"{first}-")


RECALL_TABLES: dict[str, Callable[[Sequence[Row]], str]] = {
    "pairs": pairs_table,
    "gaps": gaps_table,
    "distances": distances_table,
}


def plot_recall(rows: Sequence[Row], file: str | Path) -> None:
    """Three panels: by pairs, by gap and by distance; the dotted line is the window of models that have one."""
    found = recall(rows)
    windows = {of[0]["model"].get("sliding_window") for of in found.values()} - {None}
    panels = {
        title: {name: [(x, mean, se) for x, (mean, se) in sorted(shares(of).items())] for name, of in found.items()}
        for title, shares in (("by pairs", by_pairs), ("by gap", by_gap), ("by distance", by_distance))
    }
    lines = {f"window {window}": window for window in sorted(windows)}
    plot_shares(panels, file, title=rows[0]["title"], lines={"by gap": lines, "by distance": lines}, legend_beside=True)


def _by(axis: str, cells_of_seeds: Sequence[Sequence[dict[str, Any]]]) -> Shares:
    seeds: list[Shares] = []
    for cells in cells_of_seeds:
        seed: Shares = {}
        for x in sorted({cell[axis] for cell in cells}):
            seed[x] = _pooled(cell for cell in cells if cell[axis] == x)
        seeds.append(seed)
    return {
        x: (
            sum(seed[x][0] for seed in seeds) / len(seeds),
            math.sqrt(sum(seed[x][1] ** 2 for seed in seeds)) / len(seeds),
        )
        for x in seeds[0]
        if all(x in seed for seed in seeds)
    }


def _pooled(cells: Iterable[dict[str, Any]]) -> tuple[float, float]:
    """Of independent sequences; a bin of one sequence has no error of its own, and counts as none."""
    cells = list(cells)
    n = sum(cell["n"] for cell in cells)
    error = sum((cell["n"] * (cell["generation_se"] or 0.0)) ** 2 for cell in cells)
    return sum(cell["n"] * cell["generation"] for cell in cells) / n, math.sqrt(error) / n


def _table(rows: Sequence[Row], shares: Callable[[Sequence[Row]], Shares], name: Callable[[int], str]) -> str:
    found = {variant: (of, shares(of)) for variant, of in recall(rows).items()}
    if not found:
        raise ValueError(f"No row of {rows[0]['study']} is of a task of recall; give its base a `task`.")
    columns = sorted({x for _, cells in found.values() for x in cells})
    body = []
    for variant, (of, cells) in found.items():
        shown = [f"{cells[x][0]:.3f} ± {cells[x][1]:.3f}" if x in cells else "-" for x in columns]
        body.append([variant, f"{state_size(of[0]):,}", *shown])
    return markdown(["variant", "state", *map(name, columns)], body, numbers_from=1) + "\n\n" + ran_on(rows)
