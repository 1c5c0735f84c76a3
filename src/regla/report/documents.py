"""Tables in the documentation, rewritten from the committed rows: `python -m regla.report readme`.

A document marks the place of a table by two lines:

    <!-- table: NAME -->
    <!-- end of table -->
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from regla.report.benches import benches_table, kernels_table, plot_bench, speed_table
from regla.report.distributed import DISTRIBUTED_TABLES
from regla.report.measured import gates_table, generation_table, plot_gates, plot_generation
from regla.report.recall import RECALL_TABLES, plot_recall
from regla.report.studies import (
    plot_positions,
    plot_study,
    positions_table,
    quality_table,
    study_table,
    trials_table,
)
from regla.report.tables import (
    calibration_table,
    data_table,
    decode_table,
    forms_table,
    latest,
    memory_table,
    read_rows,
    scores_table,
)

DOCUMENTS = ("README.md", "docs/results/cpu.md", "docs/results/smollm2.md")

_Table = Callable[[Sequence[dict[str, Any]]], str]
TABLES: dict[str, tuple[str, _Table]] = {
    "forms": ("benchmarks/cpu.jsonl", latest(forms_table)),
    "delta": ("benchmarks/cpu.jsonl", latest(forms_table)),
    "decode": ("benchmarks/cpu.jsonl", latest(decode_table)),
    "memory": ("benchmarks/cpu.jsonl", latest(memory_table)),
    "data": ("benchmarks/data.jsonl", data_table),
    "linearize": ("benchmarks/linearize.jsonl", scores_table),
    "calibration": ("benchmarks/linearize.jsonl", calibration_table),
    **{name: ("benchmarks/distributed.jsonl", show) for name, show in DISTRIBUTED_TABLES.items()},
}
"""By the name of the table: the file of its rows, and how they are shown."""

STUDIES = "benchmarks/studies"
"""Rows of studies: NAME.jsonl."""

STUDY_TABLES: dict[str, _Table] = {
    "study": study_table,
    "trials": trials_table,
    "positions": positions_table,
    "quality": quality_table,
    "gates": gates_table,
    "generation": generation_table,
    **RECALL_TABLES,
}
"""By what the name of a table begins with: `study/NAME` and so on show rows of the study NAME."""

BENCHES = "benchmarks/gpu"
"""Rows of `regla bench ops|decode|train`: NAME.jsonl."""

BENCH_TABLES = ("ops", "decode", "train")
"""By what the name of a table begins with: `ops/NAME` shows the rows of `regla bench ops` in NAME.jsonl."""

BENCHMARKS = {"calibration": "linearize", **dict.fromkeys(DISTRIBUTED_TABLES, "bench distributed")}
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
        if kind in ("speed", "kernels") and file_name:
            rows = read_rows(root / BENCHES / f"{file_name}.jsonl", "bench train" if kind == "speed" else "bench ops")
            shown = speed_table(rows) if kind == "speed" else kernels_table(rows)
            return f"{match[1]}\n{shown}\n\n{match[3]}"
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
    """Draw the plots that the pages under docs show, from the rows of studies and benchmarks; their files.

    Under docs/results, of studies NAME.png, NAME-positions.png, NAME-recall.png, NAME-gates.png and
    NAME-generation.png, of benchmarks NAME-ops.png, NAME-decode.png and NAME-train.png.
    """
    pages = "".join(page.read_text(encoding="utf-8") for page in (root / "docs").glob("**/*.md"))
    plots: list[tuple[Path, Callable[[Sequence[dict[str, Any]], Path], None], Path, str]] = []
    for file in sorted((root / STUDIES).glob("*.jsonl")):
        plots.append((root / "docs/results" / f"{file.stem}.png", plot_study, file, "study"))
        plots.append((root / "docs/results" / f"{file.stem}-positions.png", plot_positions, file, "study"))
        plots.append((root / "docs/results" / f"{file.stem}-recall.png", plot_recall, file, "study"))
        plots.append((root / "docs/results" / f"{file.stem}-gates.png", plot_gates, file, "study"))
        plots.append((root / "docs/results" / f"{file.stem}-generation.png", plot_generation, file, "study"))
    for file in sorted((root / BENCHES).glob("*.jsonl")):
        for kind in BENCH_TABLES:
            plots.append((root / "docs/results" / f"{file.stem}-{kind}.png", plot_bench, file, f"bench {kind}"))
    shown = [plot for plot in plots if re.search(rf"[(/]{re.escape(plot[0].name)}\)", pages)]
    for picture, plot, file, benchmark in shown:
        plot(read_rows(file, benchmark), picture)
    return [picture for picture, *_ in shown]
