"""The page of a study: setup, commands, tables and plot, all from its rows."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from regla.report.measured import (
    gates_table,
    generation_table,
    plot_gates,
    plot_generation,
    with_gates,
    with_generation,
)
from regla.report.recall import distances_table, gaps_table, pairs_table, plot_recall, recall
from regla.report.studies import (
    check_comparable,
    plot_positions,
    plot_study,
    positions,
    positions_table,
    row_name,
    study_table,
    trials_table,
)
from regla.report.tables import markdown
from regla.runtime.files import write_text
from regla.study.grid import Study

Row = dict[str, Any]
_SWEPT = ("lr", "seed")


def write_page(study: Study, rows: Sequence[Row], out: Path) -> None:
    """Write OUT/NAME.md, OUT/NAME.png and, of what else was measured, OUT/NAME-positions.png and the like.

    Raises ValueError for rows that are none or cannot be compared.
    """
    if not rows:
        raise ValueError(f"There are no rows of {study.name}; train it first, or name their file with --rows.")
    check_comparable(rows)
    out.mkdir(parents=True, exist_ok=True)
    plot = out / f"{study.name}.png"
    plot_study(rows, plot)
    if recall(rows):
        plot_recall(rows, out / f"{study.name}-recall.png")
    if positions(rows):
        plot_positions(rows, out / f"{study.name}-positions.png")
    if with_gates(rows):
        plot_gates(rows, out / f"{study.name}-gates.png")
    if with_generation(rows):
        plot_generation(rows, out / f"{study.name}-generation.png")
    write_text(out / f"{study.name}.md", page(study, rows, plot.name))


def page(study: Study, rows: Sequence[Row], plot: str) -> str:
    """Markdown; the tables stand between the marks by which `regla.report.documents` keeps them in step with rows."""
    validated = next((row for row in rows if not row["diverged"]), None)
    sources = ", ".join(source["name"] for source in validated["validation"]) if validated is not None else "-"
    if rows[0]["config"].get("task") is not None:
        sources = f"the answers of {rows[0]['config']['task']} in all cells, new sequences"
    return f"""\
# {study.title}

{len(rows)} runs of {len({row_name(row) for row in rows})} variants. Validation loss in nats per token, the mean over
{sources}; perplexity is its exponential.

## Variants

<!-- table: study/{study.name} -->

{study_table(rows)}

<!-- end of table -->

![Validation loss of every trial]({plot})

## Trials

<!-- table: trials/{study.name} -->

{trials_table(rows)}

<!-- end of table -->
{_positions(study, rows)}{_recall(study, rows)}{_gates(study, rows)}{_generation(study, rows)}
## Setup

{_setup(rows)}

{_settings_of_variants(rows)}

## Repeat it

```sh
{_commands(study, rows)}
```
"""


def _positions(study: Study, rows: Sequence[Row]) -> str:
    """The section on what context is worth, where rows were scored by position."""
    if not positions(rows):
        return ""
    return f"""
## By position

Perplexity of the tokens at these positions of a window; the training length was {rows[0]["config"]["seq_len"]:,}.

<!-- table: positions/{study.name} -->

{positions_table(rows)}

<!-- end of table -->

![Perplexity by position]({study.name}-positions.png)
"""


def _recall(study: Study, rows: Sequence[Row]) -> str:
    """The section on recall, where rows were trained on it."""
    if not recall(rows):
        return ""
    tables = "\n\n".join(
        f"{title}\n\n<!-- table: {kind}/{study.name} -->\n\n{show(rows)}\n\n<!-- end of table -->"
        for kind, title, show in (
            ("pairs", "By pairs, queries right behind them:", pairs_table),
            ("gaps", "By the noise between pairs and queries:", gaps_table),
            ("distances", "By the tokens between a value and its query, all cells together:", distances_table),
        )
    )
    return f"""
## Recall

Share of answers that greedy decoding gives right, of the whole vocabulary, at each variant's best learning rate: mean
over seeds and its standard error over sequences. State: the numbers that a sequence's memory holds at its end.

![Recall by pairs, gap and distance]({study.name}-recall.png)

{tables}
"""


def _gates(study: Study, rows: Sequence[Row]) -> str:
    """The section on the forget gates, where they were looked at."""
    if not with_gates(rows):
        return ""
    return f"""
## Gates

On {with_gates(rows)[0]["inspect"]:,} tokens of validation text, before and after training, each variant at its best
learning rate with the first seed: shares of the forget gates F that are nearly closed and nearly open, and the mean of
dF/da, a the logit of the gate, which is what the gradient of a passes through.

<!-- table: gates/{study.name} -->

{gates_table(rows)}

<!-- end of table -->

![Forget gates before and after training]({study.name}-gates.png)
"""


def _generation(study: Study, rows: Sequence[Row]) -> str:
    """The section on the cost of generation, where it was measured."""
    if not with_generation(rows):
        return ""
    return f"""
## Generation

One text from a prompt of 5 tokens, greedily, with a cache that grows as it has to.

<!-- table: generation/{study.name} -->

{generation_table(rows)}

<!-- end of table -->

![Time and memory of generation]({study.name}-generation.png)
"""


def _setup(rows: Sequence[Row]) -> str:
    """What all runs share."""
    first = rows[0]["config"]
    shared = {key: value for key, value in first.items() if all(row["config"].get(key) == value for row in rows)}
    shared = {key: value for key, value in shared.items() if value not in (None, {}) and key not in _SWEPT}
    shared |= {name: ", ".join(f"{value:g}" for value in sorted({row[name] for row in rows})) for name in _SWEPT}
    of_text = [row for row in rows if not row["diverged"] and row["epochs"] is not None]
    epochs = sorted({f"{row['epochs']:.2f}" for row in of_text}, key=float)
    lines = [[f"`{key}`", f"`{value}`"] for key, value in shared.items()]
    if first.get("task") is None:
        lines.append(["training text", f"{', '.join(rows[0]['data'])}: {rows[0]['text_tokens']:,} tokens"])
    if epochs:
        lines.append(["epochs", ", ".join(epochs)])
    return markdown(["all runs", ""], lines, numbers_from=2)


def _settings_of_variants(rows: Sequence[Row]) -> str:
    """In what the variants differ."""
    flat: dict[str, dict[str, Any]] = {}
    for row in rows:
        config = {key: value for key, value in row["config"].items() if key not in _SWEPT}
        flat[row_name(row)] = config | {f"overrides.{key}": value for key, value in config.pop("overrides").items()}
    keys = sorted({key for config in flat.values() for key in config})
    differing = [key for key in keys if len({repr(config.get(key)) for config in flat.values()}) > 1]
    lines = [
        [name, ", ".join(f"`{key}={config[key]}`" for key in differing if key in config) or "-"]
        for name, config in flat.items()
    ]
    return markdown(["variant", "what sets it apart"], lines, numbers_from=2)


def _commands(study: Study, rows: Sequence[Row]) -> str:
    """The commands that made the rows, with the names of files but not their folders."""
    lines = []
    for row in rows:
        words = ["regla", "study", study.source, "--out", f"runs/{study.name}", *row["files"]]
        for assignment in row["set"]:
            words += ["--set", assignment]
        line = shlex.join(words)
        if line not in lines:
            lines.append(line)
    return "\n".join(lines)
