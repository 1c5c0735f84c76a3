"""A study of a task: no text, rows with recall, and a page with its tables and plot."""

import json
from pathlib import Path

import pytest

from regla.report.recall import by_distance, by_gap, by_pairs, gaps_table, pairs_table, state_size
from regla.study import study
from regla.study.grid import read_study

TEXT = """
title: Tiny recall
base:
  task: mqar
  vocab_size: 64
  pairs: [2, 4]
  gaps: [0, 8]
  hidden_size: 16
  heads: 2
  layers: 1
  seq_len: 24
  batch_size: 4
  steps: 3
vary:
  mixer:
    regla: {mixer: regla}
    window: {mixer: window, window: 8}
lr: [1.0e-3]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TEXT)
    return path


def test_from_the_grid_to_the_page(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert study(str(file), out=out, device="cpu") == []
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    assert [row["variant"] for row in rows] == [{"mixer": "regla"}, {"mixer": "window"}]
    for row in rows:
        assert [(cell["pairs"], cell["gap"]) for cell in row["recall"]] == [(2, 0), (2, 8), (4, 0), (4, 8)]
        assert row["config"]["pairs"] == [2, 4] and row["epochs"] is None and not row["diverged"]
    page = (out / "tiny.md").read_text()
    assert "the answers of mqar in all cells" in page and "training text" not in page
    for kind in ("pairs", "gaps", "distances"):
        assert f"<!-- table: {kind}/tiny -->" in page
    assert "![Recall by pairs, gap and distance](tiny-recall.png)" in page and (out / "tiny-recall.png").is_file()
    assert study(str(file), out=out, device="cpu") == []  # all done: nothing trains again
    assert len((out / "rows.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("pairs: [2, 4]", "pairs: [2, x]", "pairs in base of the study tiny is .*, expected a list of whole numbers"),
        ("pairs: [2, 4]", "pairs: 2", "expected a list of whole numbers or null"),
        ("pairs: [2, 4]", "pairs: [7]", "The variant regla does not fit: mqar: 7 pairs .* need 28 tokens"),
        (
            "regla: {mixer: regla}",
            "regla: {mixer: regla, task: null, pairs: null, gaps: null}",
            "set `task` in its base",
        ),
    ],
)
def test_bad_studies(file: Path, tmp_path: Path, old: str, new: str, sentence: str) -> None:
    file.write_text(TEXT.replace(old, new))
    with pytest.raises(ValueError, match=sentence):
        study(str(file), out=tmp_path / "out", device="cpu")


def test_a_task_takes_no_text(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--data is given, but tiny trains on the task mqar"):
        study(str(file), out=tmp_path / "out", data=["a.txt"], device="cpu")


@pytest.mark.parametrize(("name", "variants"), [("mqar", 12), ("mqar-features", 6), ("mqar-memory", 13)])
def test_the_shipped_studies_fit(name: str, variants: int, capsys: pytest.CaptureFixture[str]) -> None:
    study(name, dry_run=True)
    assert f"{variants} variants at lr" in capsys.readouterr().out
    assert {variant.settings["task"] for variant in read_study(name).variants} == {"mqar"}


def cell(pairs: int, gap: int, right: float, bins: dict[int, float]) -> dict:
    one = {"n": 100, "sequences": 50, "generation_se": 0.03}
    by_distance = [{"first": first, "last": first + 15, "generation": share} | one for first, share in bins.items()]
    return {"pairs": pairs, "gap": gap, "generation": right, "by_distance": by_distance} | one


def row(name: str, kind: str, seed: int, recall: list[dict]) -> dict:
    return {
        "study": "s",
        "title": "t",
        "variant": {"mixer": name},
        "lr": 1e-3,
        "seed": seed,
        "diverged": False,
        "validation_loss": 1.0,
        "parameters": 10,
        "data_digest": "d",
        "config": {"lr": 1e-3, "seed": seed, "seq_len": 64, "compile": False},
        "model": {
            "layer_types": [kind, kind],
            "num_key_value_heads": 2,
            "head_dim": 4,
            "value_head_dim": 4,
            "sliding_window": 16,
        },
        "recall": recall,
        "device": "cpu",
        "torch": "2",
        "commit": "c",
        "date": "d",
    }


def test_tables_of_recall() -> None:
    others = [cell(4, 8, 0.2, {16: 0.1}), cell(8, 0, 0.4, {0: 0.4})]
    seeds = [
        row("a", "linear_attention", seed, [cell(4, 0, right, {0: 1.0, 16: 0.5}), *others])
        for seed, right in ((0, 1.0), (1, 0.8))
    ]
    se = 0.03 / 2**0.5
    assert by_pairs(seeds) == {4: (pytest.approx(0.9), pytest.approx(se)), 8: (pytest.approx(0.4), pytest.approx(se))}
    assert by_gap(seeds) == {0: (pytest.approx(0.9), pytest.approx(se)), 8: (pytest.approx(0.2), pytest.approx(se))}
    near, far = by_distance(seeds).values()  # two cells of 100 answers each are pooled before seeds are
    assert near == (pytest.approx(0.7), pytest.approx(0.03 / 2)) and far == (
        pytest.approx(0.3),
        pytest.approx(0.03 / 2),
    )
    assert "| a | 64 | 0.900 ± 0.021 | 0.400 ± 0.021 |" in pairs_table(seeds)
    assert "| variant | state | gap 0 | gap 8 |" in gaps_table(seeds)


@pytest.mark.parametrize(
    ("kind", "size"),
    [("linear_attention", 4 * 16), ("full_attention", 4 * 8 * 64), ("sliding_attention", 4 * 8 * 16)],
)
def test_the_size_of_a_memory(kind: str, size: int) -> None:
    assert state_size(row("a", kind, 0, [])) == size


def test_other_studies_have_no_recall() -> None:
    rows = [row("a", "full_attention", 0, [])]
    del rows[0]["recall"]
    with pytest.raises(ValueError, match="No row of s is of a task of recall"):
        pairs_table(rows)
