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
from regla.report.students import students_table, students_tasks_table
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
"""Rows of studies: NAME.jsonl; NAME+OTHER stands for those of both, which must be of one text."""

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

STUDY_PLOTS: dict[str, Callable[[Sequence[dict[str, Any]], Path], None]] = {
    "": plot_study,
    "-positions": plot_positions,
    "-recall": plot_recall,
    "-gates": plot_gates,
    "-generation": plot_generation,
}
"""By what stands behind the study's name in the name of a picture."""

BENCHES = "benchmarks/gpu"
"""Rows of `regla bench ops|decode|train`: NAME.jsonl."""

BENCH_TABLES = ("ops", "decode", "train")
"""By what the name of a table begins with: `ops/NAME` shows the rows of `regla bench ops` in NAME.jsonl."""

STUDENTS = "benchmarks/students"
"""Rows of `regla bench students`: NAME.jsonl."""

STUDENTS_TABLES: dict[str, _Table] = {"students": students_table, "students-tasks": students_tasks_table}
"""By what the name of a table begins with: `students/NAME` shows the rows in NAME.jsonl."""

BENCHMARKS = {"calibration": "linearize", **dict.fromkeys(DISTRIBUTED_TABLES, "bench distributed")}
"""The benchmark whose rows a table shows, where it is not the table's name."""

_BLOCK = re.compile(r"(^<!-- table: (?P<name>\S+) -->\n).*?(^<!-- end of table -->$)", re.MULTILINE | re.DOTALL)


def fill(text: str, root: Path) -> str:
    """`text` with every table replaced by what the rows under `root` give now."""

    def table(match: re.Match[str]) -> str:
        name = match["name"]
        kind, _, file_name = name.partition("/")
        if kind in STUDY_TABLES and file_name:
            return f"{match[1]}\n{STUDY_TABLES[kind](_of_studies(root, file_name))}\n\n{match[3]}"
        if kind in ("speed", "kernels") and file_name:
            rows = read_rows(root / BENCHES / f"{file_name}.jsonl", "bench train" if kind == "speed" else "bench ops")
            shown = speed_table(rows) if kind == "speed" else kernels_table(rows)
            return f"{match[1]}\n{shown}\n\n{match[3]}"
        if kind in BENCH_TABLES and file_name:
            rows = read_rows(root / BENCHES / f"{file_name}.jsonl", f"bench {kind}")
            return f"{match[1]}\n{benches_table(rows)}\n\n{match[3]}"
        if kind in STUDENTS_TABLES and file_name:
            rows = read_rows(root / STUDENTS / f"{file_name}.jsonl", "bench students")
            return f"{match[1]}\n{STUDENTS_TABLES[kind](rows)}\n\n{match[3]}"
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

    Under docs/results, of studies NAME.png or NAME-KIND.png with a kind of STUDY_PLOTS, of benchmarks NAME-ops.png,
    NAME-decode.png and NAME-train.png.
    """
    pages = "".join(page.read_text(encoding="utf-8") for page in (root / "docs").glob("**/*.md"))
    drawn = []
    for name in sorted(set(re.findall(r"[(/]([\w+-]+)\.png\)", pages))):
        picture = root / "docs/results" / f"{name}.png"
        for behind, plot in STUDY_PLOTS.items():
            study = name.removesuffix(behind)
            if name.endswith(behind) and all(_rows_file(root, part).is_file() for part in study.split("+")):
                plot(_of_studies(root, study), picture)
                drawn.append(picture)
    for file in sorted((root / BENCHES).glob("*.jsonl")):
        for kind in BENCH_TABLES:
            picture = root / "docs/results" / f"{file.stem}-{kind}.png"
            if re.search(rf"[(/]{re.escape(picture.name)}\)", pages):
                plot_bench(read_rows(file, f"bench {kind}"), picture)
                drawn.append(picture)
    return drawn


def _rows_file(root: Path, study: str) -> Path:
    return root / STUDIES / f"{study}.jsonl"


def _of_studies(root: Path, names: str) -> list[dict[str, Any]]:
    """The rows of NAME, or of NAME+OTHER."""
    return [row for name in names.split("+") for row in read_rows(_rows_file(root, name), "study")]
