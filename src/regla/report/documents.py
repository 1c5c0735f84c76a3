"""Tables in the documentation, rewritten from the committed rows: `python -m regla.report readme`.

A document marks the place of a table by two lines:

    <!-- table: NAME -->
    <!-- end of table -->
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from regla.report.benches import benches_table, plot_bench
from regla.report.plots import plot_losses
from regla.report.studies import (
    plot_positions,
    plot_study,
    positions,
    positions_table,
    study_table,
    trials_table,
)
from regla.report.tables import (
    calibration_table,
    decode_table,
    forms_table,
    latest,
    memory_table,
    read_rows,
    scores_table,
    training_table,
)

DOCUMENTS = ("README.md", "docs/results/34m.md", "docs/results/cpu.md", "docs/results/smollm2.md")

CURVES = {
    "docs/results/34m.png": {
        "ReGLA": "benchmarks/curves/34m-regla.jsonl",
        "softmax with extras": "benchmarks/curves/34m-softmax.jsonl",
    }
}
"""Plots of training logs: the file, and the logs (as `regla train` writes them) by the name of the model."""

_Table = Callable[[Sequence[dict[str, Any]]], str]
TABLES: dict[str, tuple[str, _Table]] = {
    "train_34m": ("benchmarks/train_34m.jsonl", latest(training_table)),
    "forms": ("benchmarks/cpu.jsonl", latest(forms_table)),
    "decode": ("benchmarks/cpu.jsonl", latest(decode_table)),
    "memory": ("benchmarks/cpu.jsonl", latest(memory_table)),
    "linearize": ("benchmarks/linearize.jsonl", scores_table),
    "calibration": ("benchmarks/linearize.jsonl", calibration_table),
}
"""By the name of the table: the file of its rows, and how they are shown."""

STUDIES = "benchmarks/studies"
"""Rows of studies: NAME.jsonl."""

STUDY_TABLES: dict[str, _Table] = {"study": study_table, "trials": trials_table, "positions": positions_table}
"""By what the name of a table begins with: `study/NAME` and so on show rows of the study NAME."""

BENCHES = "benchmarks/gpu"
"""Rows of `regla bench ops|decode|train`: NAME.jsonl."""

BENCH_TABLES = ("ops", "decode", "train")
"""By what the name of a table begins with: `ops/NAME` shows the rows of `regla bench ops` in NAME.jsonl."""

BENCHMARKS = {"calibration": "linearize"}
"""The benchmark whose rows a table shows, where it is not the table's name."""

_BLOCK = re.compile(r"(^<!-- table: (?P<name>\S+) -->\n).*?(^<!-- end of table -->$)", re.MULTILINE | re.DOTALL)


def fill(text: str, root: Path) -> str:
    """`text` with every table replaced by what the rows under `root` give now."""

    def table(match: re.Match[str]) -> str:
        name = match["name"]
        kind, _, file_name = name.partition("/")
        if kind in STUDY_TABLES and file_name:
            rows = read_rows(root / STUDIES / f"{file_name}.jsonl", "study")
            return f"{match[1]}\n{STUDY_TABLES[kind](rows)}\n\n{match[3]}"
        if kind in BENCH_TABLES and file_name:
            rows = read_rows(root / BENCHES / f"{file_name}.jsonl", f"bench {kind}")
            return f"{match[1]}\n{benches_table(rows)}\n\n{match[3]}"
        if name not in TABLES:
            raise ValueError(f"There is no table {name!r}; the known ones are {', '.join(TABLES)}.")
        file, show = TABLES[name]
        return f"{match[1]}\n{show(read_rows(root / file, BENCHMARKS.get(name, name)))}\n\n{match[3]}"

    return _BLOCK.sub(table, text)


def documents(root: Path) -> list[str]:
    """DOCUMENTS, and every other page under docs in a checkout that has tables, such as those of studies."""
    pages = [page.relative_to(root).as_posix() for page in sorted((root / "docs").glob("**/*.md"))]
    others = [page for page in pages if page not in DOCUMENTS]
    return [*DOCUMENTS, *(page for page in others if _BLOCK.search((root / page).read_text(encoding="utf-8")))]


def update(root: Path) -> list[Path]:
    """Rewrite the documents of a checkout; those that changed."""
    changed = []
    for name in documents(root):
        file = root / name
        if not file.is_file():
            raise ValueError(f"There is no {file}; run this in a checkout, or name its folder with --root.")
        old = file.read_text(encoding="utf-8")
        new = fill(old, root)
        if new != old:
            file.write_text(new, encoding="utf-8")
            changed.append(file)
    return changed


def draw(root: Path) -> list[Path]:
    """Draw the plots of the documentation from the committed logs and the rows of studies and benchmarks; their files.

    NAME.jsonl of studies gives docs/results/NAME.png, and NAME-positions.png where rows were scored by position; of
    benchmarks NAME-ops.png, NAME-decode.png and NAME-train.png, as far as it has their rows and a page shows them.
    """
    for plot, logs in CURVES.items():
        curves = {}
        for name, log in logs.items():
            lines = (root / log).read_text(encoding="utf-8").splitlines()
            curves[name] = [(row["tokens"], row["loss"]) for row in map(json.loads, lines)]
        plot_losses(curves, root / plot, smoothing=1)
    plots = [root / plot for plot in CURVES]
    for file in sorted((root / STUDIES).glob("*.jsonl")):
        rows = read_rows(file, "study")
        plots.append(root / "docs/results" / f"{file.stem}.png")
        plot_study(rows, plots[-1])
        if positions(rows):
            plots.append(root / "docs/results" / f"{file.stem}-positions.png")
            plot_positions(rows, plots[-1])
    pages = "".join(page.read_text(encoding="utf-8") for page in (root / "docs").glob("**/*.md"))
    for file in sorted((root / BENCHES).glob("*.jsonl")):
        there = {json.loads(line)["benchmark"] for line in file.read_text(encoding="utf-8").splitlines()}
        for kind in BENCH_TABLES:
            picture = root / "docs/results" / f"{file.stem}-{kind}.png"
            if f"bench {kind}" in there and picture.name in pages:
                plots.append(picture)
                plot_bench(read_rows(file, f"bench {kind}"), picture)
    return plots
