"""The queue, with processes that only pretend to train."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from regla.cli import main
from regla.study import queue

STUDY = """\
title: Pretended
base: {vocab_size: 300, hidden_size: 16, layers: 1, heads: 1, seq_len: 16, batch_size: 1, steps: 2}
also: {good: {}, also good: {weight_decay: 0}, failing: {steps: 3}, lost: {steps: 4}}
lr: [1e-3, 2e-3]
"""

WORKER = """\
import json, os, pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
plan = json.loads((folder / "run.json").read_text())
row = plan["row"]
name = row["variant"]["also"]
(folder / "model").mkdir(exist_ok=True)
print("begins", flush=True)
if name == "failing" and row["lr"] == 2e-3:
    os.kill(os.getpid(), 9)
if name == "failing":
    sys.exit("regla: error: The memory of the GPU is full.")
time.sleep(SECONDS)
result = {"diverged": True} if name == "lost" else {
    "diverged": False, "parameters": 1000, "validation_loss": 100 * row["lr"] + len(name), "epochs": 0.5,
    "validation": [{"name": "valid.bin"}],
}
around = {"process_seconds": 60.0, "device": "D", "torch": "9", "commit": "abc", "date": "today"}
(folder / "row.jsonl").write_text(json.dumps(row | result | around) + chr(10))
"""


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A study whose worker takes no time; the working folder is its own."""
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(STUDY)
    Path("text.txt").write_text("".join(f"Line {number} says {number % 7}.\n" for number in range(200)))
    pretend(monkeypatch, seconds=0)
    return tmp_path


def pretend(monkeypatch: pytest.MonkeyPatch, *, seconds: float) -> None:
    Path("worker.py").write_text(WORKER.replace("SECONDS", str(seconds)))
    monkeypatch.setattr(queue, "COMMAND", (sys.executable, "worker.py"))


def run(*more: str) -> int:
    try:
        return main(["study", "mine.yaml", "--out", "out", "--data", "text.txt", "--device", "cpu", *more])
    except SystemExit as end:
        assert isinstance(end.code, int)
        return end.code


def rows() -> list[dict]:
    return [json.loads(line) for line in Path("out/rows.jsonl").read_text().splitlines()]


def test_failures_are_told_at_the_end_and_divergence_is_a_result(study: Path, capsys: pytest.CaptureFixture) -> None:
    assert run() == 1
    out, err = capsys.readouterr()
    assert out.startswith("mine: 4 variants, 8 runs, of them 0 done; 352 tokens to train on")
    *_, first, second, last = err.splitlines()
    assert first.startswith("regla: failing-lr0.001-seed0-")
    assert first.endswith(" failed: regla: error: The memory of the GPU is full.")
    assert second.startswith("regla: failing-lr0.002-seed0-") and second.endswith(" failed: it was ended by signal 9")
    assert last == "regla: 2 runs failed; their output is in out/runs/*/log.txt"
    assert [(row["variant"]["also"], row["lr"]) for row in rows()] == [
        (name, lr) for lr in (1e-3, 2e-3) for name in ("good", "also good", "lost")
    ]
    page = Path("out/mine.md").read_text()
    assert "| good | 1,000 | 0.001 ⚠ | 4.1000 | - | 1 | 60.3 | 2 | 0 |" in page
    assert "| lost | - | - | - | - | - | - | 2 | 2 |" in page
    assert "| lost | diverged | diverged |" in page
    assert Path("out/mine.png").stat().st_size > 1000
    assert not list(Path("out/runs").glob("*good*/model"))

    for row in list(Path("out/runs").glob("*/row.jsonl")):
        row.unlink()
    assert run() == 1  # what failed is tried again, what is done is not
    assert capsys.readouterr().out.startswith("mine: 4 variants, 8 runs, of them 6 done; 96 tokens")
    assert len(rows()) == 6


def test_rows_from_elsewhere_count_as_done(study: Path, capsys: pytest.CaptureFixture) -> None:
    assert run("--only", "good", "also *") == 0
    Path("out").rename("before")
    capsys.readouterr()
    assert run("--only", "*good", "--rows", "before/rows.jsonl", "--set", "seeds=[0, 1]") == 0
    assert capsys.readouterr().out.startswith("mine: 2 variants, 8 runs, of them 4 done;")
    assert {row["seed"] for row in rows()} == {1}
    page = Path("out/mine.md").read_text()
    assert "4.1000..4.1000 | 2 | 60.3 (60.3..60.3) | 4 | 0 |" in page and "| good | 4.1000 / 4.1000 |" in page
    assert "regla study mine.yaml --out runs/mine --data text.txt\n" in page
    assert "regla study mine.yaml --out runs/mine --data text.txt --set 'seeds=[0, 1]'\n" in page
    assert run("--only", "*good", "--set", "warmup=1") == 0  # another run by the same names
    assert len(rows()) == 8


def test_a_line_cut_short_is_dropped_and_its_run_counted_again(study: Path) -> None:
    assert run("--only", "good") == 0
    text = Path("out/rows.jsonl").read_text()
    Path("out/rows.jsonl").write_text(text[:-20])
    assert run("--only", "good") == 0  # from the row that the run itself left
    assert sorted(Path("out/rows.jsonl").read_text().splitlines()) == sorted(text.splitlines())


def test_minutes(study: Path, capsys: pytest.CaptureFixture) -> None:
    assert run("--only", "good", "--set", "lr=[1e-3]") == 0
    assert run("--only", "*good", "--minutes", "0.9") == 0  # a run takes a minute, as the row of the first says
    assert "3 of 4 runs are left, which --minutes 0.9 gave no time for." in capsys.readouterr().out
    assert len(rows()) == 1
    assert run("--only", "*good", "--minutes", "2") == 0
    assert "are left" not in capsys.readouterr().out
    assert len(rows()) == 4


def test_several_at_a_time(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, seconds=2)
    began = time.perf_counter()
    assert run("--only", "*good", "--devices", "4") == 0
    assert time.perf_counter() - began < 7  # and not the 8 seconds of one after the other
    assert len(rows()) == 4


def test_several_at_a_time_on_a_device(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, seconds=2)
    began = time.perf_counter()
    assert run("--only", "*good", "--runs-per-device", "4", "--set", "compile=true") == 0
    assert time.perf_counter() - began < 7
    assert len(rows()) == 4


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_runs_too(
    number: signal.Signals, code: int, study: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    pretend(monkeypatch, seconds=60)

    def send() -> None:
        while not any("begins" in file.read_text() for file in Path("out/runs").glob("*/log.txt")):
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send)
    sender.start()
    began = time.perf_counter()
    assert run() == code
    sender.join()
    assert time.perf_counter() - began < 30
    err = capsys.readouterr().err
    assert err.splitlines()[-1] == "regla: interrupted" and "Traceback" not in err
    assert rows() == [] and len(list(Path("out/runs").iterdir())) == 1


BAD = {
    "--minutes 0": "--minutes is 0.0, expected a number above 0.",
    "--minutes nan": "--minutes is nan, expected a number above 0.",
    "--devices 0": "--devices is 0, expected a number above 0.",
    "--runs-per-device 0": "--runs-per-device is 0, expected a number above 0.",
    "--only nothing": "No variant matches --only 'nothing'; the study has good, also good, failing, lost.",
    "--only no-thing neither": "No variant matches --only 'no-thing' 'neither'; the study has good,",
    "--rows none.jsonl": "none.jsonl cannot be read (No such file or directory); give the .jsonl file",
    "--rows text.txt": "Line 1 of text.txt is no row of a study; remove it.",
    "--valid none.txt": "There is no file none.txt; give the path of a text or token file.",
    "--tokenizer none": "There is no tokenizer folder none",
    "--set seq_len=100000": "expected more than the seq_len 100000 of the variant good; give more text",
    "--report": "out/rows.jsonl cannot be read",
    "--out text.txt": "text.txt cannot be created",
    "--device cuda": "CUDA was asked for, but this PyTorch sees no GPU",
}


@pytest.mark.parametrize("options", BAD)
def test_bad_input_is_one_sentence_before_anything_trains(
    options: str, study: Path, capsys: pytest.CaptureFixture
) -> None:
    assert run(*options.split()) == 2
    out, err = capsys.readouterr()
    assert BAD[options] in err and err.count("\n") == 1 and err.startswith("regla: error: ")
    assert out == "" and not Path("out/runs").exists()


def test_one_study_at_a_time_in_a_folder(study: Path, capsys: pytest.CaptureFixture) -> None:
    from regla.runtime.files import alone_in

    Path("out").mkdir()
    with alone_in(Path("out")):
        assert run() == 2
    assert "Another study is at work in out; wait for it, or give another --out." in capsys.readouterr().err


def test_dry_run(study: Path, capsys: pytest.CaptureFixture) -> None:
    assert run("--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Pretended"
    assert [line.split()[-2:] for line in lines[3:7]] == [["2", "32"], ["2", "32"], ["3", "48"], ["4", "64"]]
    assert lines[8] == "4 variants at lr 0.001, 0.002 with seeds 0: 8 runs, 352 tokens"
    assert not Path("out").exists()
