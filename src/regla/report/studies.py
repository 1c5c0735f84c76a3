"""Tables of studies from their rows: one line per variant, and all trials.

A variant's score is at the learning rate with the lowest mean validation loss over its seeds. Rates at which a seed
diverged are only chosen where every rate has such seeds. Losses are in nats per token; perplexity is exp(loss).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regla.report.plots import plot_lengths, plot_trials
from regla.report.tables import markdown, ran_on

Row = dict[str, Any]
EDGE = "⚠"


@dataclass(frozen=True)
class VariantScore:
    """What a study says of one variant."""

    name: str
    parameters: int | None
    """None where every trial diverged."""
    best_lr: float | None
    losses: tuple[float, ...]
    """At the best learning rate, one per seed that did not diverge."""
    at_edge: bool
    """The best rate is the lowest or highest tried, so that a better one may lie beyond."""
    trials: int
    diverged: int

    @property
    def mean(self) -> float:
        """Infinite where every trial diverged."""
        return sum(self.losses) / len(self.losses) if self.losses else math.inf


def row_name(row: Row) -> str:
    return "/".join(row["variant"].values())


def variant_scores(rows: Sequence[Row]) -> list[VariantScore]:
    """One per variant, best first. Raises ValueError for rows that cannot be compared."""
    check_comparable(rows)
    by_variant: dict[str, list[Row]] = {}
    for row in rows:
        by_variant.setdefault(row_name(row), []).append(row)
    return sorted((_score(name, trials) for name, trials in by_variant.items()), key=lambda score: score.mean)


def check_comparable(rows: Sequence[Row]) -> None:
    """Raise ValueError unless all rows are of one text, and a variant's differ in learning rate and seed only."""
    if len({row["data_digest"] for row in rows}) > 1:
        raise ValueError(f"The rows of {rows[0]['study']} are of different texts; keep those of each in a file.")
    settings: dict[str, Any] = {}
    trials = set()
    for row in rows:
        name = row_name(row)
        own = [{key: value for key, value in row["config"].items() if key not in ("lr", "seed")}, row["model"]]
        trial = (name, row["lr"], row["seed"])
        if settings.setdefault(name, own) != own or trial in trials:
            raise ValueError(
                f"The rows of {row['study']} have runs of {name} with different settings; keep those of each in a file."
            )
        trials.add(trial)


def study_table(rows: Sequence[Row]) -> str:
    """One line per variant, best first."""
    scores = variant_scores(rows)
    header = ["variant", "parameters", "best lr", "loss", "min..max", "seeds", "perplexity", "trials", "diverged"]
    body = []
    for score in scores:
        if score.losses:
            low, high = min(score.losses), max(score.losses)
            cells = [
                f"{score.parameters:,}",
                f"{score.best_lr:g}{' ' + EDGE if score.at_edge else ''}",
                f"{score.mean:.4f}",
                f"{low:.4f}..{high:.4f}" if len(score.losses) > 1 else "-",
                str(len(score.losses)),
                f"{math.exp(score.mean):.1f}"
                + (f" ({math.exp(low):.1f}..{math.exp(high):.1f})" if len(score.losses) > 1 else ""),
            ]
        else:
            cells = ["-"] * 6
        body.append([score.name, *cells, str(score.trials), str(score.diverged)])
    table = markdown(header, body, numbers_from=1)
    if any(score.at_edge for score in scores):
        table += f"\n\n{EDGE} the best learning rate lies at the edge of the sweep: a better one may lie beyond."
    return f"{table}\n\n{ran_on(_without_threads(rows))}"


def trials_table(rows: Sequence[Row]) -> str:
    """Validation loss of every trial: a line per variant in the order of `study_table`, a column per learning rate."""
    check_comparable(rows)
    rates = sorted({row["lr"] for row in rows})
    seeds = sorted({row["seed"] for row in rows})
    found = {(row_name(row), row["lr"], row["seed"]): row for row in rows}
    body = [
        [score.name, *(" / ".join(_cell(found.get((score.name, lr, seed))) for seed in seeds) for lr in rates)]
        for score in variant_scores(rows)
    ]
    table = markdown(["variant", *(f"lr {lr:g}" for lr in rates)], body, numbers_from=1)
    words = "Seed" if len(seeds) == 1 else "Seeds, in the order of the cells"
    return f"{table}\n\n{words}: {', '.join(map(str, seeds))}. A dash: not run."


def positions_table(rows: Sequence[Row]) -> str:
    """Perplexity by the position of the token in windows of `eval_context` tokens: a line per variant scored so, at
    its best learning rate, in the order of `study_table`."""
    scored = positions(rows)
    if not scored:
        raise ValueError(f"No row of {rows[0]['study']} is scored by position; give its runs an `eval_context`.")
    header = [f"{first:,}-{last:,}" for first, last in sorted({bin_[:2] for bins in scored.values() for bin_ in bins})]
    body = []
    for name, bins in scored.items():
        cells = {f"{first:,}-{last:,}": f"{math.exp(loss):.1f}" for first, last, loss in bins}
        body.append([name, *(cells.get(column, "-") for column in header)])
    return f"{markdown(['variant', *header], body, numbers_from=1)}\n\n{ran_on(_without_threads(_of(rows, scored)))}"


def quality_table(rows: Sequence[Row]) -> str:
    """Perplexity of every variant at its best learning rate, over all and at some positions; best first."""
    scored = positions(rows)
    bins = [
        bin_ for bin_ in ((64, 127), (512, 1023), (4096, 8191)) if all(bin_ in _edges(own) for own in scored.values())
    ]
    body = []
    for score in variant_scores(rows):
        by_edges = {own[:2]: own[2] for own in scored.get(score.name, [])}
        cells = [f"{math.exp(by_edges[bin_]):.1f}" if bin_ in by_edges else "-" for bin_ in bins]
        body.append([score.name, f"{math.exp(score.mean):.1f}", str(len(score.losses)), *cells])
    header = ["model", "perplexity", "seeds", *(f"at {first:,}-{last:,}" for first, last in bins)]
    return f"{markdown(header, body, numbers_from=1)}\n\n{ran_on(_without_threads(rows))}"


def _edges(bins: Iterable[tuple[int, int, float]]) -> set[tuple[int, int]]:
    return {(first, last) for first, last, _ in bins}


def positions(rows: Sequence[Row]) -> dict[str, list[tuple[int, int, float]]]:
    """By variant, at its best learning rate: (first position, last, loss in nats, the mean over seeds) of every bin.

    Empty where no row was scored by position (`eval_context` of `TrainConfig`).
    """
    found = {}
    for score in variant_scores(rows):
        own = [
            row for row in rows if row_name(row) == score.name and row["lr"] == score.best_lr and not row["diverged"]
        ]
        seeds = [row["by_position"] for row in own if "by_position" in row]
        if seeds:
            bins = zip(*seeds, strict=True)
            found[score.name] = [
                (of_seeds[0]["first"], of_seeds[0]["last"], sum(one["loss"] for one in of_seeds) / len(of_seeds))
                for of_seeds in bins
            ]
    return found


def _of(rows: Sequence[Row], names: Iterable[str]) -> list[Row]:
    return [row for row in rows if row_name(row) in set(names)]


def plot_positions(rows: Sequence[Row], file: str | Path) -> None:
    """Perplexity by position of the six best variants; each bin at its last position, counted from 1."""
    best = list(positions(rows).items())[:6]
    curves = {name: [(last + 1, math.exp(loss)) for _, last, loss in bins] for name, bins in best}
    plot_lengths(
        {"validation": curves}, file, title=rows[0]["title"], along="position in the window", unit="perplexity"
    )


def plot_study(rows: Sequence[Row], file: str | Path) -> None:
    """Validation loss of every trial, the best variant on top."""
    trials: dict[str, list[tuple[float, float | None]]] = {score.name: [] for score in variant_scores(rows)}
    for row in rows:
        trials[row_name(row)].append((row["lr"], None if row["diverged"] else row["validation_loss"]))
    plot_trials(trials, file, title=rows[0]["title"])


def _score(name: str, rows: Sequence[Row]) -> VariantScore:
    rates = sorted({row["lr"] for row in rows})
    finite = {lr: tuple(row["validation_loss"] for row in _good(rows, lr)) for lr in rates}
    lost = {lr: sum(row["diverged"] for row in rows if row["lr"] == lr) for lr in rates}
    scored = [lr for lr in rates if finite[lr]]
    best = min(scored, key=lambda lr: (lost[lr] > 0, sum(finite[lr]) / len(finite[lr])), default=None)
    return VariantScore(
        name=name,
        parameters=next((row["parameters"] for row in rows if not row["diverged"]), None),
        best_lr=best,
        losses=() if best is None else finite[best],
        at_edge=best is not None and best in _ends(rows),
        trials=len(rows),
        diverged=sum(lost.values()),
    )


def _ends(rows: Sequence[Row]) -> tuple[float, float]:
    """The lowest and the highest rate that were tried, in a sweep before these rows if there was one."""
    rates = [rate for row in rows for rate in row.get("rates", [row["lr"]])]
    return min(rates), max(rates)


def _good(rows: Iterable[Row], lr: float) -> list[Row]:
    return sorted((row for row in rows if row["lr"] == lr and not row["diverged"]), key=lambda row: row["seed"])


def _cell(row: Row | None) -> str:
    if row is None:
        return "-"
    return "diverged" if row["diverged"] else f"{row['validation_loss']:.4f}"


def _without_threads(rows: Sequence[Row]) -> list[Row]:
    """Threads say nothing about a run on a GPU."""
    gpu = [row for row in rows if row["config"]["compile"] or "NVIDIA" in row["device"]]
    return [{key: value for key, value in row.items() if key != "threads"} if row in gpu else row for row in rows]
