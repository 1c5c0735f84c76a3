"""Tables of `regla bench students`."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from regla.report.benches import lines
from regla.report.documents import documents, fill
from regla.report.students import students_table, students_tasks_table

AROUND = {"device": "D", "torch": "9", "commit": "abc", "date": "today"}


def text(perplexity: float) -> dict[str, Any]:
    return {"name": "a.txt", "tokens": 10, "loss": math.log(perplexity), "perplexity": perplexity}


def task(name: str, value: float, metric: str = "acc") -> dict[str, Any]:
    return {"task": name, "metric": metric, "value": value, "stderr": 0.03, "n": 1500}


def row(case: str, *perplexities: float, **more: Any) -> dict[str, Any]:
    recall = [
        {"probe": "passkey", "length": 128, "value": 0.5, "stderr": 0.06, "n": 60},
        {"probe": "passkey", "length": 256, "value": 0.25, "stderr": 0.08, "n": 60},
        {"probe": "kv", "length": 128, "value": 1.0, "stderr": 0.0, "n": 20},
    ]
    return {
        "benchmark": "bench students",
        "model": "small",
        "case": case,
        "options": {},
        "setting": {"tokens": "1M", "probe_lengths": [128, 256]},
        "tokens": 1_000_000,
        "seconds": 61.4,
        "parameters": 1,
        "layers": 6,
        "linear_layers": [0, 1, 2, 4],
        "windowed_layers": [],
        "valid": [text(one) for one in perplexities],
        "unseen": [text(100.0)],
        "divergence": {"mean": 0.12345, "se": 0.0061},
        "recall": recall,
        "tasks": [task("boolq", 0.5), task("lambada", 20.0, "perplexity"), task("lambada", 0.25)],
        **AROUND,
        **more,
    }


ORIGINAL = row("original", 10.0, tokens=0, divergence=None, linear_layers=[], unseen=[], recall=[])


def test_a_line_for_each_case() -> None:
    """Geometric means over files; the last row of a case counts."""
    rows = [row("pure", 99.0), row("pure", 10.0, 40.0), row("teacher, trained", 5.0, 20.0, linear_layers=[]), ORIGINAL]
    header, rule, pure, teacher, original, _, note, _, where = students_table(rows).splitlines()
    assert header == (
        "| case | softmax layers | tokens | perplexity | x teacher, trained | unseen text | KL | passkey | kv |"
    )
    end = "| 100.00 | 0.123 ± 0.006 | 0.38 ± 0.05 | 1.00 ± 0.00 |"
    assert pure == f"| pure | 2 of 6 | 1.00M | 20.00 | 2.000 {end}"
    assert teacher == f"| teacher, trained | 6 of 6 | 1.00M | 10.00 | 1.000 {end}"
    assert original == "| original | 6 of 6 | - | 10.00 | 1.000 | - | - | - | - |"
    assert rule.count("|") == pure.count("|") == header.count("|")
    assert "120 passkey, 20 kv questions in 128 and 256 tokens" in note
    assert where == "Measured on D, torch 9, commit abc, today."


def test_without_the_trained_teacher_there_is_no_ratio() -> None:
    windowed = row("window", 12.0, linear_layers=[], windowed_layers=list(range(6)))
    assert "| window | 0 of 6 | 1.00M | 12.00 | - |" in students_table([windowed])


def test_a_column_for_each_task() -> None:
    without = row("without tasks", 1.0, tasks=[])
    header, _, line, _, note, _, _ = students_tasks_table([row("pure", 1.0), without]).splitlines()
    assert header == "| case | boolq | lambada | mean |"
    assert line == "| pure | 50.0 ± 3.0 | 25.0 ± 3.0 | 37.5 ± 2.1 |"
    assert note == "Accuracy in % ± standard error. Items: boolq 1,500, lambada 1,500."
    with pytest.raises(ValueError, match="No row of `regla bench students` has tasks; measure with --tasks"):
        students_tasks_table([without])


def test_rows_of_two_settings_are_not_compared() -> None:
    other = row("pure", 1.0, setting={"tokens": "2M"})
    with pytest.raises(ValueError, match="The rows of 'original' and 'pure' differ in their setting; keep those of"):
        students_table([ORIGINAL, other])
    with pytest.raises(ValueError, match="differ in their model"):
        students_table([ORIGINAL, row("pure", 1.0, model="other")])


def test_what_is_printed() -> None:
    titles, shown = lines(row("pure", 10.0))
    assert titles.index("KL") == shown.index("0.123 ±") and titles.index("boolq") == shown.index("0.500")
    assert titles.split()[:4] == ["case", "tokens", "seconds", "perplexity"]


def test_any_page_of_the_docs_can_show_them(tmp_path: Path) -> None:
    (tmp_path / "benchmarks/students").mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    (tmp_path / "benchmarks/students/small.jsonl").write_text(json.dumps(row("pure", 10.0)) + "\n")
    kinds = ("students", "students-tasks")
    page = "\n".join(f"<!-- table: {kind}/small -->\n<!-- end of table -->\n" for kind in kinds)
    (tmp_path / "docs/page.md").write_text(page)
    assert "docs/page.md" in documents(tmp_path)
    filled = fill(page, tmp_path)
    assert "| pure | 2 of 6 |" in filled and "| pure | 50.0 ± 3.0 |" in filled
    assert fill(filled, tmp_path) == filled
