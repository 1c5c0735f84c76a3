"""Scores on tasks as Markdown, CSV, JSON and a plot: models side by side, with standard errors and numbers of items."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from regla.report.plots import plot_scores
from regla.report.tables import markdown
from regla.runtime.files import write_json, write_text

NAME = "results"  # .md, .csv, .json, .png


@dataclass(frozen=True)
class TaskScore:
    """One metric of one model on one task."""

    model: str
    task: str
    num_fewshot: int | None
    metric: str
    higher_is_better: bool | None
    value: float
    stderr: float | None
    """None where it cannot be told, as of a single item."""
    n: int | None
    """Items; None for a group of tasks."""
    cut: int
    """Requests whose prompt was longer than the model's context and was cut from the left."""


@dataclass(frozen=True)
class Comparison:
    """One task of one model with shared prefixes run once, and through lm-eval's own model class."""

    model: str
    task: str
    items: int
    items_that_differ: int
    """In a metric of an item, by more than 1e-3."""
    largest_difference: float
    """Of the log-likelihood of one request, in nats."""
    seconds: float
    seconds_lm_eval: float

    def __str__(self) -> str:
        return (
            f"{self.model}, {self.task}: {self.items_that_differ} of {self.items:,} items differ from lm-eval's own "
            f"model class, log-likelihoods by at most {self.largest_difference:.1e}; {self.seconds:.1f} s against "
            f"{self.seconds_lm_eval:.1f} s"
        )


def table(scores: Sequence[TaskScore]) -> str:
    """A row per task and metric, a column per model: value ± standard error."""
    models = list(dict.fromkeys(score.model for score in scores))
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    for score in scores:
        shots, n = ("" if value is None else f"{value:,}" for value in (score.num_fewshot, score.n))
        row = cells.setdefault((score.task, shots, score.metric, n), {})
        digits = 4 if abs(score.value) < 10 else 2
        error = "" if score.stderr is None else f" ± {score.stderr:.{digits}f}"
        row[score.model] = f"{score.value:.{digits}f}{error}"
    body = [[task, shots, metric, n, *(row.get(model, "") for model in models)]
            for (task, shots, metric, n), row in cells.items()]  # fmt: skip
    header = ["task", "shots", "metric", "n", *models]
    return markdown(header, body, numbers_from=3)


def write_scores(scores: Sequence[TaskScore], out: str | Path, comparisons: Sequence[Comparison] = ()) -> None:
    """Write results.md, .csv and .json into `out`, each replaced at once."""
    rows = [asdict(score) for score in scores]
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(TaskScore)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    results = {"scores": rows} | (
        {"comparisons": [asdict(comparison) for comparison in comparisons]} if comparisons else {}
    )
    write_text(Path(out) / f"{NAME}.md", table(scores) + "\n")
    write_text(Path(out) / f"{NAME}.csv", text.getvalue())
    write_json(Path(out) / f"{NAME}.json", results)


def plot(scores: Sequence[TaskScore], out: str | Path) -> None:
    """Draw results.png into `out`."""
    panels: dict[str, dict[str, dict[str, tuple[float, float]]]] = {}
    for score in scores:
        panel = panels.setdefault("perplexity" if "perplexity" in score.metric else "score", {})
        label = f"{score.task}, {score.metric}" + (f", {score.num_fewshot}-shot" if score.num_fewshot else "")
        panel.setdefault(score.model, {})[label] = (score.value, score.stderr or 0.0)
    plot_scores(panels, Path(out) / f"{NAME}.png")
