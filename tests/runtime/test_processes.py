"""Commands that write run in one process."""

from pathlib import Path

import pytest

from regla.cli import main

COMMANDS = {
    "linearize": ["linearize", "model", "--out", "new"],
    "study": ["study", "demo", "--out", "new"],
    "tokenize": ["tokenize", "a.txt", "--out", "new", "--vocab-size", "300"],
    "quickstart": ["quickstart", "--out", "new"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_several_processes_are_refused_in_one_sentence(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(COMMANDS[command]) == 2
    assert capsys.readouterr() == (
        "",
        f"regla: error: `regla {command}` runs in one process, but a launcher started 2 (WORLD_SIZE=2); start it "
        "without torchrun.\n",
    )
    assert not list(tmp_path.iterdir())


def test_a_launcher_that_does_not_say_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert main(["train", "--out", "new"]) == 2
    assert capsys.readouterr() == (
        "",
        "regla: error: WORLD_SIZE is 2, but LOCAL_RANK, MASTER_ADDR, MASTER_PORT are not set; start several processes "
        "with torchrun, or unset WORLD_SIZE.\n",
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("world", ["1", "", "many"])
def test_one_process_under_a_launcher(world: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("WORLD_SIZE", world)
    assert main(["train", "--out", str(tmp_path / "new"), "--data", "absent.txt"]) == 2
    assert "There is no file absent.txt" in capsys.readouterr().err
