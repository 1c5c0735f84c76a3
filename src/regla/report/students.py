"""Tables of `regla bench students`: one line for each way of converting a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from regla.report.tables import markdown, ran_on

Row = dict[str, Any]

_TRAINED = "teacher, trained"
_PROBES = ("passkey", "kv")
_METRICS = ("acc", "acc_norm")  # of a task, the first that it has


def students_table(rows: Sequence[Row]) -> str:
    """Softmax layers, tokens, perplexity and its ratio to that of the trained teacher, KL to the original, recall."""
    rows = _comparable(rows)
    teacher = next((_perplexity(row["valid"]) for row in rows if row["case"] == _TRAINED), None)
    body = []
    for row in rows:
        perplexity = _perplexity(row["valid"])
        assert perplexity is not None
        softmax = row["layers"] - len(row["linear_layers"]) - len(row["windowed_layers"])
        body.append(
            [
                row["case"],
                f"{softmax} of {row['layers']}",
                _tokens(row["tokens"]),
                f"{perplexity:.2f}",
                "-" if teacher is None else f"{perplexity / teacher:.3f}",
                _number(_perplexity(row["unseen"])),
                _divergence(row),
                *(_recall(row, probe) for probe in _PROBES),
            ]
        )
    titles = ["case", "softmax layers", "tokens", "perplexity", f"x {_TRAINED}", "unseen text", "KL", *_PROBES]
    asked = ", ".join(f"{n:,} {probe}" for probe in _PROBES if (n := _pooled(rows[0], probe)[2]))
    lengths = " and ".join(f"{length:,}" for length in rows[0]["setting"]["probe_lengths"])
    note = (
        "Perplexity: geometric mean over the files. KL to the original, nats per token ± standard error. Recall by "
        f"free generation, share of right answers ± standard error: {asked} questions in {lengths} tokens."
    )
    return f"{markdown(titles, body, numbers_from=1)}\n\n{note}\n\n{ran_on(rows)}"


def students_tasks_table(rows: Sequence[Row]) -> str:
    """A column for each task, accuracy ± standard error, and the mean of all; as in the paper's table 5."""
    rows = [row for row in _comparable(rows) if row["tasks"]]
    if not rows:
        raise ValueError("No row of `regla bench students` has tasks; measure with --tasks.")
    names = list(dict.fromkeys(score["task"] for score in rows[0]["tasks"]))
    body = []
    for row in rows:
        scores = [_score(row, name) for name in names]
        errors = [score["stderr"] or 0.0 for score in scores]
        mean = sum(score["value"] for score in scores) / len(scores)
        error = math.sqrt(sum(error**2 for error in errors)) / len(errors)
        cells = [_with_error(100 * score["value"], 100 * (score["stderr"] or 0.0)) for score in scores]
        body.append([row["case"], *cells, _with_error(100 * mean, 100 * error)])
    items = ", ".join(f"{name} {_score(rows[0], name)['n']:,}" for name in names)
    note = f"Accuracy in % ± standard error. Items: {items}."
    return f"{markdown(['case', *names, 'mean'], body, numbers_from=1)}\n\n{note}\n\n{ran_on(rows)}"


def students_cells(row: Row) -> dict[str, str]:
    """What is printed of a row, by the column's title."""
    tasks = list(dict.fromkeys(score["task"] for score in row["tasks"]))
    return {
        "case": row["case"],
        "tokens": _tokens(row["tokens"]),
        "seconds": f"{row['seconds']:,.0f}",
        "perplexity": _number(_perplexity(row["valid"])),
        "unseen": _number(_perplexity(row["unseen"])),
        "KL": _divergence(row),
        **{probe: _recall(row, probe) for probe in _PROBES},
        **{name: f"{_score(row, name)['value']:.3f}" for name in tasks},
    }


def _comparable(rows: Sequence[Row]) -> list[Row]:
    """The last row of every case; ValueError unless all are of one model and one setting."""
    last = list({row["case"]: row for row in rows}.values())
    for row in last:
        for name in ("model", "setting"):
            if row[name] != last[0][name]:
                raise ValueError(
                    f"The rows of {last[0]['case']!r} and {row['case']!r} differ in their {name}; keep those of each "
                    "in a file."
                )
    return last


def _perplexity(texts: Sequence[Row]) -> float | None:
    """The geometric mean over files; None without any."""
    return math.exp(sum(text["loss"] for text in texts) / len(texts)) if texts else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _tokens(count: int) -> str:
    return "-" if not count else f"{count / 1e6:.2f}M"


def _divergence(row: Row) -> str:
    found = row["divergence"]
    return "-" if found is None else f"{found['mean']:.3f} ± {found['se']:.3f}"


def _pooled(row: Row, probe: str) -> tuple[float, float, int]:
    """Share, standard error and number of questions over all lengths."""
    cells = [cell for cell in row["recall"] if cell["probe"] == probe]
    n = sum(cell["n"] for cell in cells)
    if not n:
        return math.nan, math.nan, 0
    value = sum(cell["n"] * cell["value"] for cell in cells) / n
    return value, math.sqrt(sum((cell["n"] * cell["stderr"]) ** 2 for cell in cells)) / n, n


def _recall(row: Row, probe: str) -> str:
    value, error, n = _pooled(row, probe)
    return f"{value:.2f} ± {error:.2f}" if n else "-"


def _score(row: Row, task: str) -> Row:
    scores = {score["metric"]: score for score in row["tasks"] if score["task"] == task}
    return next((scores[metric] for metric in _METRICS if metric in scores), next(iter(scores.values())))


def _with_error(value: float, error: float) -> str:
    return f"{value:.1f} ± {error:.1f}"
