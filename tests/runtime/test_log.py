"""The log: whole lines, each step once, and the same figures in TensorBoard."""

import json
from pathlib import Path

import pytest

from regla.cli import main
from regla.runtime import log
from regla.runtime.log import TrainingLog


def steps(file: Path) -> list[int]:
    return [json.loads(line)["step"] for line in file.read_text().splitlines()]


def test_lines_behind_the_step_gone_on_from_are_dropped(tmp_path: Path) -> None:
    with TrainingLog(tmp_path) as training_log:
        for step in range(1, 6):
            training_log({"step": step, "loss": 1 / step})
            assert steps(tmp_path / "log.jsonl") == list(range(1, step + 1))  # readable at once
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')  # killed while it wrote
    with TrainingLog(tmp_path, after=3) as training_log:
        training_log({"step": 4, "loss": 0.5})
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["loss"] for line in lines] == [1, 1 / 2, 1 / 3, 0.5]
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


def test_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs /dev/full, where every write finds the disk full")
    training_log = TrainingLog.__new__(TrainingLog)
    training_log._file, training_log._tensorboard = full.open("w"), None
    with (
        pytest.raises(OSError, match=r"^The log /dev/full cannot be written \(No space left on device\)\.$"),
        training_log,
    ):
        training_log({"step": 1})


def test_tensorboard_gets_the_same_figures(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with TrainingLog(tmp_path, tensorboard=True) as training_log:
        for step in (1, 2):
            training_log({"step": step, "loss": step / 2, "stage": "a word"})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0.5), (2, 1.0)]


def test_tensorboard_asked_for_and_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(log, "find_spec", lambda name: None)
    assert main(["train", "--out", str(tmp_path / "run"), "--tensorboard"]) == 2
    assert capsys.readouterr().err == (
        "regla: error: --tensorboard needs the package tensorboard, which is not installed; "
        "run `pip install tensorboard` or leave it out, log.jsonl holds the same figures.\n"
    )
    assert not (tmp_path / "run").exists()
