"""The studies that repeat the paper's tables and figures: each variant trains, very small, and its page shows it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from regla.bench.generation import PROMPT
from regla.data.embedded import embedded_text
from regla.report.documents import draw, fill
from regla.report.measured import gates_table, generation_table
from regla.report.studies import variant_scores
from regla.study import run as study_run
from regla.study.data import StudyData, prepare
from regla.study.grid import Study, read_study
from regla.study.page import write_page
from regla.study.run import best_rates, study
from regla.study.trials import make_trials
from regla.study.worker import run, write_plan

PAPER = ["feature-maps", "normalisation", "gates", "table-4", "saturation", "speed-and-memory", "scaling"]
TINY: dict[str, Any] = {
    "hidden_size": 32,
    "layers": 2,
    "heads": 2,
    "seq_len": 16,
    "batch_size": 2,
    "steps": 2,
    "warmup": 1,
}
TINY |= {"dtype": "float32", "compile": False, "eval_context": None, "save_every": None}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> StudyData:
    folder = tmp_path_factory.mktemp("text")
    (folder / "corpus.txt").write_text(embedded_text().documents[0][:30_000], encoding="utf-8")
    return prepare(folder / "data", data=[str(folder / "corpus.txt")], vocab_size=300)


def tiny(name: str) -> Study:
    """The study, its models and runs so small that they take no time; of several sizes one."""
    whole = read_study(name)
    one_size = [variant for variant in whole.variants if variant.choices.get("size") in (None, "9M")]
    variants = tuple(replace(variant, settings={**variant.settings, **TINY}) for variant in one_size)
    measured = {key: value for key, value in {"inspect": 40, "generate": [3, 6]}.items() if key in whole.measured}
    return replace(
        whole, variants=variants, lrs=whole.lrs[:1], seeds=(0,), sweep=None, measured=measured, more_seeds={}
    )


def trained(plan: Study, tokens: StudyData, out: Path) -> list[dict[str, Any]]:
    rows = []
    for trial in make_trials(plan, tokens, out=out, device="cpu"):
        folder = out / "runs" / trial.id
        write_plan(folder, trial.config.__dict__, trial.row)
        run(folder)
        rows.append(json.loads((folder / "row.jsonl").read_text()))
    return rows


@pytest.mark.parametrize("name", PAPER)
def test_every_variant_trains(name: str, tokens: StudyData, tmp_path: Path) -> None:
    plan = tiny(name)
    rows = trained(plan, tokens, tmp_path)
    assert len(rows) == len(plan.variants) and not any(row["diverged"] for row in rows)
    assert len({row["id"] for row in rows}) == len(rows)
    parameters = [row["parameters"] for row in rows]
    assert max(parameters) < 1.02 * min(parameters)
    write_page(plan, rows, tmp_path)
    page = (tmp_path / f"{name}.md").read_text()
    assert all(f"| {variant.name} |" in page for variant in plan.variants)
    assert ("## Gates" in page) == (name == "saturation") and ("## Generation" in page) == (name == "speed-and-memory")
    if name == "saturation":
        check_gates(rows, tmp_path)
    if name == "speed-and-memory":
        check_generation(rows, tmp_path)


def check_gates(rows: list[dict[str, Any]], out: Path) -> None:
    """At the start all gates that begin at a bias of -8 are closed, and a plain one passes sigmoid'(-8) on."""
    assert (out / "saturation-gates.png").stat().st_size > 0
    by_name = {"/".join(row["variant"].values()): row["gates"] for row in rows}
    for start, closed, opened in (("bias -8", 1.0, 0.0), ("bias 0", 0.0, 0.0), ("bias +8", 0.0, 1.0)):
        for layer in by_name[f"plain/{start}"]["start"]:
            assert layer["saturated_low"]["value"] == closed and layer["saturated_high"]["value"] == opened
    plain, refined = (by_name[f"{gate}/bias -8"]["start"][0]["slopes"]["value"] for gate in ("plain", "refined"))
    assert plain == pytest.approx(3.35e-4, rel=0.05) and refined == pytest.approx(plain, rel=0.05)  # r is 1/2
    assert by_name["plain/bias 0"]["start"][0]["slopes"]["value"] == pytest.approx(0.25, rel=0.01)
    assert "| plain/bias -8 | 100.0% |" in gates_table(rows)


def check_generation(rows: list[dict[str, Any]], out: Path) -> None:
    assert (out / "speed-and-memory-generation.png").stat().st_size > 0
    for row in rows:
        first, second = row["generation"]
        assert (first["tokens"], second["tokens"]) == (3, 6) and 0 < first["seconds"] < second["seconds"]
        grown = second["cache_bytes"] - first["cache_bytes"]
        softmax = row["variant"]["model"] == "softmax"
        assert grown == (3 * 2 * 2 * 32 * 4 if softmax else 0)  # tokens, layers, keys and values, width, float32
        if softmax:
            assert first["cache_bytes"] == (PROMPT + 2) * 2 * 2 * 32 * 4  # the last token has not been read
    assert "| softmax | 6 |" in generation_table(rows)


def test_the_rows_fill_documents_and_plots(tokens: StudyData, tmp_path: Path) -> None:
    plan = tiny("saturation")
    rows = trained(replace(plan, variants=plan.variants[:1]), tokens, tmp_path / "out")
    studies = tmp_path / "benchmarks/studies"
    studies.mkdir(parents=True)
    (studies / "saturation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = "<!-- table: gates/saturation -->\n<!-- end of table -->\n"
    assert "| refined/bias 0 | 0.0% |" in fill(text, tmp_path)
    (tmp_path / "docs/results").mkdir(parents=True)
    (tmp_path / "docs/page.md").write_text("![Gates](results/saturation-gates.png)")
    assert draw(tmp_path) == [tmp_path / "docs/results/saturation-gates.png"]


SWEPT = """\
title: Swept
base: {vocab_size: 300, hidden_size: 16, layers: 1, heads: 1, seq_len: 16, batch_size: 1, steps: 3}
sweep: {steps: 1}
also: {one: {}, two: {weight_decay: 0}}
lr: [1e-3, 2e-3, 3e-3]
more_seeds: {two: [1]}
"""
LOSSES = {("one", 1e-3): 5.0, ("one", 2e-3): 4.0, ("one", 3e-3): 6.0, ("two", 1e-3): 3.0}


def pretended(trials: list[Any], *, finished: Callable[[Any, str], None], **_: Any) -> list[Any]:
    for trial in trials:
        loss = LOSSES.get((trial.variant.name, trial.lr), 9.0)
        row = trial.row | {"diverged": False, "validation_loss": loss, "parameters": 1, "process_seconds": 1.0}
        row |= {"epochs": None, "validation": [], "device": "D", "torch": "9", "commit": "c", "date": "2026-01-01"}
        finished(trial, json.dumps(row))
    return []


def test_a_sweep_chooses_the_rate_of_each_variant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(study_run, "work", pretended)
    (tmp_path / "swept.yaml").write_text(SWEPT)
    (tmp_path / "corpus.txt").write_text(embedded_text().documents[0][:30_000], encoding="utf-8")
    out, options = tmp_path / "out", {"data": [str(tmp_path / "corpus.txt")], "device": "cpu"}
    study(str(tmp_path / "swept.yaml"), dry_run=True)
    shown = capsys.readouterr().out
    assert "2 variants at lr 0.001, 0.002, 0.003 in the sweep: 6 runs, 96 tokens" in shown
    assert "lr as the sweep says with seeds 0, 1 (the latter of some variants): 3 runs, 144 tokens" in shown
    assert study(str(tmp_path / "swept.yaml"), out=out, **options) == []
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    final = [row for row in rows if row["study"] == "swept"]
    assert len(rows) == 6 + 3 and best_rates(rows[:6]) == {"one": 2e-3, "two": 1e-3}
    assert [(row["variant"]["also"], row["lr"], row["seed"], row["config"]["steps"]) for row in final] == [
        ("one", 2e-3, 0, 3),
        ("two", 1e-3, 0, 3),
        ("two", 1e-3, 1, 3),
    ]
    assert {score.name: score.at_edge for score in variant_scores(final)} == {"one": False, "two": True}
    assert (out / "swept.md").is_file() and (out / "swept-sweep.md").is_file()
    before = (out / "rows.jsonl").read_bytes()
    assert study(str(tmp_path / "swept.yaml"), out=out, **options) == []  # all done: nothing trains again
    assert (out / "rows.jsonl").read_bytes() == before
    (out / "swept-sweep.md").unlink()
    assert study(str(tmp_path / "swept.yaml"), out=out, report=True) == []
    assert (out / "swept-sweep.md").is_file()
