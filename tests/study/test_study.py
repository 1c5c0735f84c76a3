"""Studies that train: killed and finished, diverged, tabulated."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from regla.cli import main
from regla.data.embedded import embedded_text
from regla.layers.defaults import DEFAULTS
from regla.report.documents import draw, fill
from regla.report.studies import (
    check_comparable,
    positions_table,
    quality_table,
    study_table,
    trials_table,
    variant_scores,
)
from regla.study.data import prepare
from regla.study.grid import read_study
from regla.study.trials import make_trials
from regla.study.worker import run, write_plan
from regla.train.config import TrainConfig

from ..ranks import skip_where_forks_cannot_train

STUDY = """\
title: Tiny
base:
  {vocab_size: 300, hidden_size: 32, layers: 2, heads: 2, seq_len: 32, batch_size: 2, steps: 80, save_every: 20}
vary:
  gate: {refined: {}, plain: {overrides: {gate: sigmoid}}}
lr: [1.0e-2, 1.0e+30]
"""
OF_THE_CLOCK = ("seconds", "tokens_per_second", "process_seconds", "date", "commit")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    (folder / "tiny.yaml").write_text(STUDY)
    text = "\n<|endoftext|>\n".join(embedded_text().documents[:2])
    (folder / "corpus.txt").write_text(text, encoding="utf-8")
    return folder


def command(files: Path, out: Path, *more: str) -> list[str]:
    options = {"--out": out, "--data": files / "corpus.txt", "--device": "cpu"}
    return ["study", str(files / "tiny.yaml"), *(str(part) for pair in options.items() for part in pair), *more]


def read(file: Path) -> dict[str, dict]:
    """Rows by id, without what depends on the clock."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return {row["id"]: {key: value for key, value in row.items() if key not in OF_THE_CLOCK} for row in rows}


@pytest.fixture(scope="module")
def undisturbed(files: Path) -> Path:
    """The rows of all trials, each run in this process."""
    study = read_study(str(files / "tiny.yaml"))
    data = prepare(files / "data", data=[str(files / "corpus.txt")], vocab_size=study.vocab_size)
    lines = []
    for trial in make_trials(study, data, out=files, device="cpu"):
        folder = files / "runs" / trial.id
        write_plan(folder, trial.config.__dict__, trial.row)
        run(folder)
        lines.append((folder / "row.jsonl").read_text())
    (files / "rows.jsonl").write_text("".join(lines))
    return files / "rows.jsonl"


def ended_in_the_middle(arguments: list[str], out: Path, end: Callable[[BaseProcess], None]) -> int | None:
    """Start a study, end it once the first run has a checkpoint and before it is finished; its exit code."""
    skip_where_forks_cannot_train()
    process = multiprocessing.get_context("fork").Process(target=lambda: sys.exit(main(arguments)))
    process.start()
    try:
        deadline = time.monotonic() + 120
        while not any(out.glob("runs/*/model/checkpoints/step-*")):
            assert process.is_alive() and time.monotonic() < deadline
            time.sleep(0.01)
        end(process)
        process.join(120)
    finally:
        process.kill()
    return process.exitcode


def test_killed_and_finished_it_has_the_rows_of_an_undisturbed_study(
    files: Path, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = command(files, tmp_path, "--only", "plain", "--set", "lr=[0.01]")
    assert ended_in_the_middle(arguments, tmp_path, lambda process: process.kill()) == -signal.SIGKILL
    assert read(tmp_path / "rows.jsonl") == {}
    assert main(arguments) == 0
    assert "1 variants, 1 runs, of them 0 done" in capsys.readouterr().out
    (ours,) = read(tmp_path / "rows.jsonl").values()
    (log,) = (file.read_text() for file in tmp_path.glob("runs/*/log.txt"))
    begun, resumed = re.findall(r"Goes on from (.*)", log)
    assert begun.startswith("the start") and re.search(r"step-0000[2-7]\d\.$", resumed)
    theirs = read(undisturbed)[ours["id"]]
    assert ours["set"] == ["lr=[0.01]"] and theirs["set"] == []
    assert ours | {"set": []} == theirs
    assert not list(tmp_path.glob("runs/*/model"))  # deleted with its checkpoints
    began = time.perf_counter()
    assert main(arguments) == 0
    assert time.perf_counter() - began < 5  # no process was needed
    assert "of them 1 done; 0 tokens" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_it_saves_a_checkpoint_and_goes_on(
    number: signal.Signals, code: int, files: Path, undisturbed: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    arguments = command(files, tmp_path, "--keep-models")
    assert ended_in_the_middle(arguments, tmp_path, lambda process: os.kill(process.pid, number)) == code
    err = capfd.readouterr().err
    assert err.splitlines()[-1] == "regla: interrupted" and "Traceback" not in err
    (model,) = tmp_path.glob("runs/*/model")
    assert json.loads((model / "training.json").read_text())["complete"] is False
    assert main(arguments) == 0
    assert read(tmp_path / "rows.jsonl") == read(undisturbed)
    assert len(list(tmp_path.glob("runs/*/model/model.safetensors"))) == 2  # of those that did not diverge


def test_the_row_of_a_run(undisturbed: Path) -> None:
    row = next(row for row in map(json.loads, undisturbed.read_text().splitlines()) if not row["diverged"])
    assert row["variant"] == {"gate": "refined"} and row["id"].startswith("refined-lr0.01-seed0-")
    assert (row["steps"], row["tokens"], row["lr"], row["seed"]) == (80, 80 * 64, 0.01, 0)
    assert row["epochs"] == pytest.approx(80 * 64 / row["text_tokens"])
    assert row["config"]["steps"] == 80 and row["model"]["gate"] == DEFAULTS.gate
    assert [source["name"] for source in row["validation"]] == ["corpus.bin"]
    assert len(row["curve"]) == 40 and row["curve"][-1][0] == 80
    assert row["curve"][0][1] == pytest.approx(5.7, abs=0.1)  # ln 300 at first
    assert row["validation_loss"] < row["curve"][0][1] and row["process_seconds"] > row["seconds"] > 0
    assert row["files"] == ["--data", "corpus.txt"] and row["commit"] and row["torch"] and row["device"]
    assert str(undisturbed.parent) not in json.dumps(row)


def test_a_run_that_diverges_is_a_row(undisturbed: Path) -> None:
    lost = [row for row in read(undisturbed).values() if row["lr"] == 1e30]
    assert [(row["diverged"], row["variant"]["gate"]) for row in lost] == [(True, "refined"), (True, "plain")]
    assert all(row["reason"] for row in lost) and not any("validation_loss" in row for row in lost)


def test_the_page_is_made_from_rows_alone(files: Path, undisturbed: Path, tmp_path: Path) -> None:
    report = ["--report", "--rows", str(undisturbed), "--out", str(tmp_path)]
    assert main(["study", str(files / "tiny.yaml"), *report]) == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["tiny.md", "tiny.png"]
    page = (tmp_path / "tiny.md").read_text()
    for row in read(undisturbed).values():
        if not row["diverged"]:
            assert f"| {row['validation_loss']:.4f} | - | 1 | {row['validation_perplexity']:.1f} | 2 | 1 |" in page
            assert f"| {row['variant']['gate']} | {row['validation_loss']:.4f} | diverged |" in page
    assert "regla study tiny.yaml --out runs/tiny --data corpus.txt\n" in page
    assert "| plain | `overrides.gate=sigmoid` |" in page and "| `steps` | `80` |" in page

    (tmp_path / "benchmarks/studies").mkdir(parents=True)
    shutil.copy(undisturbed, tmp_path / "benchmarks/studies/tiny.jsonl")
    assert fill(page, tmp_path) == page  # so a committed page is kept in step with committed rows
    assert fill(page.replace("diverged", "fine"), tmp_path) == page


def test_a_row_has_the_loss_by_position(files: Path, tmp_path: Path) -> None:
    study = read_study(str(files / "tiny.yaml"), ["steps=1", "eval_context=80", "lr=[0.01]"])
    data = prepare(files / "data", data=[str(files / "corpus.txt")], vocab_size=study.vocab_size)
    (trial, _) = make_trials(study, data, out=tmp_path, device="cpu")
    write_plan(tmp_path / "run", trial.config.__dict__, trial.row)
    run(tmp_path / "run")
    row = json.loads((tmp_path / "run" / "row.jsonl").read_text())
    summary = json.loads((Path(trial.config.out) / "training.json").read_text())
    assert row["by_position"] == summary["by_position"]
    assert [(bin_["first"], bin_["last"]) for bin_ in row["by_position"]] == [(0, 63), (64, 79)]

    report = ["--report", "--rows", str(tmp_path / "run" / "row.jsonl"), "--out", str(tmp_path / "page")]
    assert main(["study", str(files / "tiny.yaml"), *report]) == 0
    assert {file.name for file in (tmp_path / "page").iterdir()} == {"tiny.md", "tiny.png", "tiny-positions.png"}
    page = (tmp_path / "page" / "tiny.md").read_text()
    assert "| variant | 0-63 | 64-79 |" in page and "the training length was 32." in page
    (tmp_path / "benchmarks/studies").mkdir(parents=True)
    shutil.copy(tmp_path / "run" / "row.jsonl", tmp_path / "benchmarks/studies/tiny.jsonl")
    assert fill(page, tmp_path) == page


def test_the_table_by_position() -> None:
    def scored(losses: list[float], *row: Any) -> dict:
        bins = zip((0, 64), (63, 1099), losses, strict=True)
        return made_up(*row) | {"by_position": [{"first": a, "last": b, "loss": loss} for a, b, loss in bins]}

    rows = [
        scored([3.0, 2.0], "worse", 1e-3, 0, 2.5),
        scored([2.0, 1.0], "better", 1e-3, 0, 1.5),
        scored([2.0, 3.0], "better", 1e-3, 1, 1.5),
        scored([0.0, 0.0], "better", 2e-3, 0, 1.9),  # not at its best rate
        made_up("not scored", 1e-3, 0, 1.0),
    ]
    assert positions_table(rows).splitlines() == [
        "| variant | 0-63 | 64-1,099 |",
        "| --- | ---: | ---: |",
        "| better | 7.4 | 7.4 |",
        "| worse | 20.1 | 7.4 |",
        "",
        "Measured on D, torch 9, commit abc, today.",
    ]
    assert quality_table(rows).splitlines()[:5] == [
        "| model | perplexity | seeds |",
        "| --- | ---: | ---: |",
        "| not scored | 2.7 | 1 |",
        "| better | 4.5 | 2 |",
        "| worse | 12.2 | 1 |",
    ]
    with pytest.raises(ValueError, match=r"No row of s is scored by position; give its runs an `eval_context`\."):
        positions_table([made_up("not scored", 1e-3, 0, 1.0)])


def test_the_plots_of_committed_studies(undisturbed: Path, tmp_path: Path) -> None:
    for folder in ("benchmarks/studies", "docs/results"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(undisturbed, tmp_path / "benchmarks/studies/tiny.jsonl")
    assert draw(tmp_path) == []  # no page shows it
    (tmp_path / "docs/page.md").write_text("![Losses](results/tiny.png)\n")
    assert draw(tmp_path) == [tmp_path / "docs/results/tiny.png"]
    assert (tmp_path / "docs/results/tiny.png").stat().st_size > 1000


def made_up(name: str, lr: float, seed: int, loss: float | None) -> dict:
    row = {"study": "s", "title": "S", "variant": {"a": name}, "lr": lr, "seed": seed, "data_digest": "d", "model": {}}
    row |= {"config": {"lr": lr, "seed": seed, "compile": True}, "parameters": 2000, "diverged": loss is None}
    return row | {"device": "D", "torch": "9", "commit": "abc", "date": "today", "validation_loss": loss}


def test_the_table_of_variants() -> None:
    rows = [
        made_up("worse", 1e-3, 0, 3.0),
        made_up("worse", 2e-3, 0, 2.5),
        made_up("worse", 4e-3, 0, 2.0),
        made_up("better", 1e-3, 0, 2.0),
        made_up("better", 2e-3, 0, 1.0),
        made_up("better", 2e-3, 1, 2.0),
        made_up("better", 4e-3, 0, 1.0),
        made_up("better", 4e-3, 1, None),  # a lower mean, but of those that are left
        made_up("lost", 1e-3, 0, None),
    ]
    assert study_table(rows).splitlines() == [
        "| variant | parameters | best lr | loss | min..max | seeds | perplexity | trials | diverged |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| better | 2,000 | 0.002 | 1.5000 | 1.0000..2.0000 | 2 | 4.5 (2.7..7.4) | 5 | 1 |",
        "| worse | 2,000 | 0.004 ⚠ | 2.0000 | - | 1 | 7.4 | 3 | 0 |",
        "| lost | - | - | - | - | - | - | 1 | 1 |",
        "",
        "⚠ the best learning rate lies at the edge of the sweep: a better one may lie beyond.",
        "",
        "Measured on D, torch 9, commit abc, today.",
    ]
    assert trials_table(rows).splitlines()[2:5] == [
        "| better | 2.0000 / - | 1.0000 / 2.0000 | 1.0000 / diverged |",
        "| worse | 3.0000 / - | 2.5000 / - | 2.0000 / - |",
        "| lost | diverged / - | - / - | - / - |",
    ]
    assert [score.at_edge for score in variant_scores(rows)] == [False, True, False]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"data_digest": "other"}, "The rows of s are of different texts; keep those of each in a file."),
        ({"config": {"lr": 2, "seed": 0, "steps": 5}}, "The rows of s have runs of a with different settings"),
        ({"model": {"gate": "gla"}}, "The rows of s have runs of a with different settings"),
        ({"lr": 1}, "The rows of s have runs of a with different settings"),
    ],
)
def test_rows_that_cannot_be_compared(more: dict, message: str) -> None:
    check_comparable([made_up("a", 1, 0, 3.0), made_up("a", 2, 0, 3.0)])
    with pytest.raises(ValueError, match=message):
        check_comparable([made_up("a", 1, 0, 3.0), made_up("a", 2, 0, 3.0) | more])


def test_the_name_of_a_run_depends_on_all_that_its_result_does(files: Path) -> None:
    corpus = str(files / "corpus.txt")
    (files / "other.txt").write_text((files / "corpus.txt").read_text()[:-100])

    def ids(*sets: str, text: str = corpus, device: str = "cpu", out: Path = files) -> set[str]:
        plan = read_study(str(files / "tiny.yaml"), sets)
        data = prepare(files / "data", data=[text], vocab_size=plan.vocab_size)
        return {trial.id for trial in make_trials(plan, data, out=out, device=device)}

    assert len(ids()) == 4
    assert ids() == ids("compile=true", "save_every=3", "eval_context=9", device="cuda", out=files / "elsewhere")
    other = ids(text=str(files / "other.txt"))
    for changed in (ids("steps=81"), ids("overrides.qk_norm=true"), ids("seeds=[1]"), other):
        assert len(changed) == 4 and not changed & ids()


def test_tokens_are_used_where_they_are(files: Path, tmp_path: Path) -> None:
    text = str(files / "corpus.txt")
    written = prepare(tmp_path, data=[text], vocab_size=300)
    (folder,) = tmp_path.iterdir()
    assert prepare(tmp_path, data=[text], vocab_size=300) == written
    assert list(tmp_path.iterdir()) == [folder]
    again = prepare(tmp_path, data=written.data, valid=written.valid, tokenizer=written.tokenizer)
    assert (again.digest, again.tokens, again.data) == (written.digest, written.tokens, written.data)
    assert list(tmp_path.iterdir()) == [folder]
    with pytest.raises(ValueError, match="holds tokens; give tokenizer the folder of their tokenizer"):
        prepare(tmp_path, data=written.data)
    with pytest.raises(ValueError, match=r"leave out one of them \(--set vocab_size=null\)"):
        prepare(tmp_path, data=written.data, tokenizer=written.tokenizer, vocab_size=300)


def test_a_trial_is_a_training_run(files: Path) -> None:
    """What a study passes on is all that TrainConfig knows."""
    study = read_study(str(files / "tiny.yaml"))
    data = prepare(files / "data", data=[str(files / "corpus.txt")], vocab_size=study.vocab_size)
    trial = make_trials(study, data, out=files, device="cpu")[0]
    assert isinstance(trial.config, TrainConfig)
    assert trial.config.resume == "latest" and trial.config.out == str(files / "runs" / trial.id / "model")
    assert trial.config.tokenizer == data.tokenizer and os.path.isfile(trial.config.data[0])


def test_help_teaches(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        main(["study", "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert "examples:" in text and "regla study demo --out runs/demo" in text
