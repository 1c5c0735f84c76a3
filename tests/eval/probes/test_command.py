"""`regla eval --probes`: several models side by side, every cell once, and errors before anything is asked."""

import csv
import json
from pathlib import Path

import pytest
import torch

from regla.cli import main
from regla.data.embedded import embedded_text
from regla.data.tokenizer import train_tokenizer
from regla.eval.probes import command
from regla.eval.probes.command import page, panels, pooled_by_distance, short_names
from regla.eval.probes.run import Cell, Plan, record
from regla.eval.probes.score import Answers
from regla.models import ReGLAConfig, ReGLAForCausalLM
from regla.runtime.errors import OptionError

V = 300


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[str]:
    """A pure model and a softmax model with a tokenizer each, and one without."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = train_tokenizer(embedded_text().documents[:3], V)
    for name, kind in (("a/linear", "linear_attention"), ("b/softmax", "full_attention"), ("c/bare", "full_attention")):
        torch.manual_seed(0)
        config = ReGLAConfig(
            vocab_size=V,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            layer_types=[kind],
        )
        ReGLAForCausalLM(config).save_pretrained(root / name)
        if "bare" not in name:
            tokenizer.save_pretrained(root / name)
    return [str(root / name) for name in ("a/linear", "b/softmax", "c/bare")]


def test_models_side_by_side(models, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    arguments = ["eval", *models[:2], "--probes", "mqar,passkey", "--lengths", "128", "--depths", "0,1"]
    arguments += ["--pairs", "4", "--gaps", "0,32", "--limit", "3", "--out", str(out)]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "| length | asked | n | chance | linear | softmax |" in shown
    assert "| 128 | 4 pairs, 32 gap | 12 | 0.25 |" in shown and "| 128 | depth 1 | 3 | 0.10 |" in shown
    assert (out / "probes.md").read_text().startswith("# Probes of memory")
    records = json.loads((out / "probes.json").read_text())["records"]
    assert [(one["model"], one["probe"], one["gap"], one["depth"]) for one in records] == [
        (model, *rest)
        for model in models[:2]
        for rest in (("mqar", 0, None), ("mqar", 32, None), ("passkey", None, 0.0), ("passkey", None, 1.0))
    ]
    assert all(one["n"] and one["generation_se"] >= 0 for one in records)
    rows = list(csv.DictReader((out / "probes.csv").open()))
    assert [row["likelihood"] for row in rows] == [str(one["likelihood"]) for one in records]
    assert (out / "probes.png").stat().st_size > 10_000

    # An interrupted run goes on: what is there is not asked again, and a line cut short is.
    lines = (out / "probes.jsonl").read_text().splitlines(keepends=True)
    (out / "probes.jsonl").write_text("".join(lines[:5]) + lines[5][:40])
    asked = []
    real = command.run_cell
    monkeypatch.setattr(command, "run_cell", lambda *args, **options: asked.append(args[1:3]) or real(*args, **options))
    assert main(arguments) == 0
    assert [(name, cell.depth, cell.gap) for name, cell in asked] == [
        (models[1], None, 32), (models[1], 0.0, None), (models[1], 1.0, None)
    ]  # fmt: skip
    assert json.loads((out / "probes.json").read_text())["records"] == records


def test_token_ids_need_no_tokenizer(models):
    assert main(["eval", models[2], "--probes", "copy,induction", "--lengths", "16", "--limit", "2"]) == 0


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--probes", "mqar,paskey"], "--probes has 'paskey', which does not exist; the nearest is 'passkey'"),
        (["--probes", ","], "--probes is empty"),
        (["--probes", "mqar", "--lengths", "10"], "4 pairs and a gap of 0 tokens need 16 tokens"),
        (["--probes", "mqar", "--lengths", "0"], "--lengths is 0, expected a number above 0"),
        (["--probes", "mqar", "--limit", "1"], "--limit is 1, expected 2 or more"),
        (["--probes", "passkey", "--depths", "1.5"], "--depths has 1.5, expected 0 (the beginning) to 1"),
        (["--probes", "passkey", "--lengths", "20"], "passkey: facts and question need"),
        (["--probes", "kv", "--pairs", "1", "--lengths", "200"], "kv: 1 pairs; expected 2 to"),
        (["--pairs", "4"], "--pairs goes with --probes; name some, or leave it out"),
        (["--out", "x"], "--out goes with --tasks or --probes"),
    ],
)
def test_bad_input(models, options, sentence, capsys):
    assert main(["eval", models[0], *options]) == 2
    error = capsys.readouterr().err
    assert sentence in error and len(error.strip().splitlines()[-1]) == len(error.strip().splitlines()[-1].strip())


def test_a_list_that_is_none(models, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["eval", models[0], "--probes", "mqar", "--lengths", "64,x"])
    assert stop.value.code == 2 and "invalid list of int value: '64,x'" in capsys.readouterr().err


def test_text_needs_a_tokenizer(models, capsys):
    assert main(["eval", models[2], "--probes", "needle"]) == 2
    assert f"{models[2]} has no tokenizer, which probes of text (passkey, needle, kv) need" in capsys.readouterr().err


def test_a_folder_with_something_else(models, tmp_path, capsys):
    (tmp_path / "probes.jsonl").write_text('{"a": 1}\n')
    assert main(["eval", models[0], "--probes", "mqar", "--out", str(tmp_path)]) == 2
    assert "holds no records of probes; give --out another folder" in capsys.readouterr().err


def test_in_python_errors_name_parameters():
    with pytest.raises(OptionError, match="limit is 1, expected 2 or more"):
        Plan(probes=("mqar",), limit=1)


def of(model: str, gap: int, right: list[float], distance: int) -> object:
    ones = torch.tensor(right)
    answers = Answers(torch.arange(len(ones)), torch.full((len(ones),), distance), ones, ones, ones)
    return record(model, Cell(probe="mqar", length=64, pairs=1, gap=gap), answers, 1.0)


def test_bins_of_several_cells_are_pooled():
    records = [of("m", 0, [1, 1, 1, 0], 5), of("m", 8, [0, 0, 0, 1], 13), of("m", 16, [0, 0], 20)]
    near, far = pooled_by_distance(records)
    assert (near["first"], near["last"], near["n"], near["generation"]) == (0, 15, 8, 0.5)
    assert near["generation_se"] == pytest.approx((2 * (4 * 0.25) ** 2) ** 0.5 / 8)  # each 0.25: sqrt(3/16 * 4/3 / 4)
    assert (far["first"], far["generation"], far["generation_se"]) == (16, 0, 0)
    text = page(Plan(probes=("mqar",)), records)
    assert (
        "| 0-15 | 8 | 0.50 ± 0.18 |" in text
        and "| 64 | 1 pairs, 8 gap | 4 | 1.00 | 0.25 ± 0.25 / 0.25 ± 0.25 |" in text
    )
    assert panels(records)["mqar, by gap"]["m"] == [(0, 0.75, 0.25), (8, 0.25, 0.25), (16, 0.0, 0.0)]


def test_short_names():
    assert short_names(["runs/a/x", "runs/b/x"]) == {"runs/a/x": "a/x", "runs/b/x": "b/x"}
    assert short_names([str(Path("runs") / "a")]) == {"runs/a": "a"}
