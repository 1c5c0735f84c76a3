"""Many conversions of one model, measured alike. Conversions run in this process, but for one test."""

import contextlib
import dataclasses
import json
import os
import signal
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

import pytest

from regla.bench import students
from regla.cli import _parser, main
from regla.data.embedded import embedded_text
from regla.eval.measure import evaluate
from regla.linearize.config import LinearizeConfig
from regla.quickstart.pretrained import PRETRAINED
from regla.runtime.signals import Interrupted

AROUND = {"device", "threads", "torch", "regla", "commit", "date"}
WINDOW, PURE = "pure, window and sinks", "pure, no calibration"  # which are quick


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a.txt, b.txt and c.txt, and models made in it."""
    folder = tmp_path / "texts"
    folder.mkdir()
    document = "\n".join(embedded_text().documents)
    for name, start, length in (("a", 0, 40_000), ("b", 40_000, 3_000), ("c", 43_000, 2_000)):
        (folder / f"{name}.txt").write_text(document[start : start + length], encoding="utf-8")
    (tmp_path / "made").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "made"))
    return folder


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Runs what would be processes in this one; the arguments of each."""
    seen: list[list[str]] = []

    def run(command: Sequence[str], told: TextIO) -> int:
        seen.append(list(command[4:]))
        with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
            return main(command[3:])

    instead_of_processes(monkeypatch, run)
    return seen


def instead_of_processes(
    monkeypatch: pytest.MonkeyPatch, run: Callable[[Sequence[str], TextIO], int | None]
) -> list[str]:
    """What is done to processes whose exit code `run` gives, from their command and output; None: it runs on."""
    calls: list[str] = []

    def start(command: Sequence[str], *, stdout: TextIO, **rest: Any) -> SimpleNamespace:
        told = {name: lambda name=name: calls.append(name) for name in ("terminate", "wait", "kill")}
        return SimpleNamespace(poll=lambda: run(command, stdout), **told)

    monkeypatch.setattr(students, "subprocess", SimpleNamespace(Popen=start, DEVNULL=None))
    return calls


def command(texts: Path, *more: str) -> int:
    files = ["--data", str(texts / "a.txt"), "--valid", str(texts / "b.txt"), "--unseen", str(texts / "c.txt")]
    return main(["bench", "students", str(PRETRAINED), *files, "--quick", "--tokens", "2k", "--device", "cpu", *more])


def rows_of(file: Path) -> dict[str, dict[str, Any]]:
    return {row["case"]: row for row in map(json.loads, file.read_text(encoding="utf-8").splitlines())}


def test_rows_and_a_second_run(
    texts: Path, tmp_path: Path, told: list[list[str]], capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "new" / "rows.jsonl"
    more = ["--out", str(out), "--only", "original", "teacher*", PURE, WINDOW]
    assert command(texts, *more) == 0
    assert [arguments[-1] for arguments in told].count("--dry-run") == 1 and len(told) == 4
    assert not list((tmp_path / "made").iterdir())
    rows = rows_of(out)
    assert list(rows) == ["original", "teacher, trained", PURE, WINDOW]
    for row in rows.values():
        assert row.keys() >= AROUND and row["benchmark"] == "bench students" and row["model"] == "tiny-neox"
        assert row["setting"]["data"] == ["a.txt"] and row["setting"]["unseen"] == ["c.txt"] and row["tasks"] == []
        assert [text["name"] for text in (*row["valid"], *row["unseen"])] == ["b.txt", "c.txt"]
        assert [(cell["probe"], cell["length"], cell["n"]) for cell in row["recall"]] == [
            ("passkey", 128, 6),
            ("kv", 128, 2),
        ]
    assert str(tmp_path) not in out.read_text() and str(PRETRAINED.parent) not in out.read_text()

    original, teacher, pure, window = rows.values()
    assert original["tokens"] == window["tokens"] == 0 and teacher["tokens"] == pure["tokens"] == 7 * 4 * 64
    assert original["divergence"] is None and pure["divergence"]["mean"] > teacher["divergence"]["mean"] > 0
    assert len(pure["linear_layers"]) == len(window["windowed_layers"]) == original["layers"] == 6
    assert pure["parameters"] > original["parameters"] == teacher["parameters"] and pure["transfer_error"] < 1e-4
    assert pure["options"] == {"keep": "none", "calibration_tokens": 0}
    assert teacher["options"] == {"keep": "all", "preset": "paper"}
    # All are scored as `regla eval` does, and a window as long as the text's windows changes nothing.
    (score,) = evaluate(PRETRAINED, data=[texts / "b.txt"], seq_len=64, batch_size=4, device="cpu")
    assert original["valid"][0]["loss"] == pytest.approx(score.loss, rel=1e-6)
    assert window["valid"][0]["loss"] == pytest.approx(score.loss, rel=1e-5)
    assert pure["valid"][0]["loss"] > score.loss

    printed = capsys.readouterr().out
    assert printed.startswith("case ") and f"{pure['valid'][0]['perplexity']:.2f}" in printed
    before = out.read_bytes()
    assert command(texts, *more) == 0
    assert out.read_bytes() == before and len(told) == 4
    assert f"{PURE}: measured before" in capsys.readouterr().out
    assert command(texts, "--out", str(out), "--only", "original", "--seed", "1") == 0  # another setting
    assert len(out.read_bytes()) > len(before)


def test_a_case_that_fails_ends_no_other(
    texts: Path,
    tmp_path: Path,
    told: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    broken = {"broken": {"keep": "every-1"}, WINDOW: students.CASES[WINDOW], "original": None}
    monkeypatch.setattr(students, "CASES", broken)
    out = tmp_path / "rows.jsonl"
    assert command(texts, "--out", str(out)) == 1
    assert list(rows_of(out)) == [WINDOW, "original"]
    captured = capsys.readouterr()
    assert "broken: failed, the others go on" in captured.out
    (made,) = (tmp_path / "made").iterdir()
    reason = "regla: error: --keep is 'every-1'; expected 'none', 'every-N'"
    assert f"broken failed:\n{reason}" in captured.err
    assert captured.err.endswith(f"1 of 3 cases failed; their logs are in {made}.\n")
    assert reason in (made / "broken.log").read_text() and not (made / "pure-window-and-sinks").exists()


def test_models_that_are_kept_are_not_made_again(
    texts: Path, tmp_path: Path, told: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is a conversion begun anew that was interrupted."""
    scores = {name: [] for name in ("valid", "unseen", "recall", "tasks")}
    monkeypatch.setattr(students, "_scores", lambda setting, model: scores)
    work = tmp_path / "work"
    more = ["--only", PURE, "--work", str(work)]
    assert command(texts, *more) == 0 and (work / "pure-no-calibration" / "model.safetensors").is_file()
    made = [arguments for arguments in told if "--dry-run" not in arguments]
    assert len(made) == 1 and "--resume" not in made[0]
    assert command(texts, *more) == 0
    assert [arguments for arguments in told if "--dry-run" not in arguments] == made
    (work / "pure-no-calibration.json").unlink()
    monkeypatch.setattr(students, "_linearize", lambda arguments, log: told.append(list(arguments)))
    assert command(texts, *more) == 0
    assert told[-1][-3:] == ["--out", str(work / "pure-no-calibration"), "--resume"]


@pytest.mark.slow
def test_a_conversion_is_a_process_of_its_own(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    work = tmp_path / "work"
    assert command(texts, "--only", WINDOW, "--work", str(work), "--out", str(tmp_path / "rows.jsonl")) == 0
    assert f"Saved to {work / 'pure-window-and-sinks'}" in (work / "pure-window-and-sinks.log").read_text()


def test_a_process_that_is_killed_is_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: Sequence[str], told: TextIO) -> int:
        told.write("\n".join(map(str, range(9))) + "\rstep 1\rstep 2\n")
        return -9

    instead_of_processes(monkeypatch, run)
    with pytest.raises(students.CaseError, match=r"^6\n7\n8\nstep 1\nstep 2\nended by signal 9$"):
        students._linearize([], tmp_path / "log")


def test_a_signal_ends_the_conversion_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM to the conversion, which saves a checkpoint, before the command ends."""
    calls = instead_of_processes(monkeypatch, lambda command, told: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted, match="SIGTERM"):
        students._linearize([], tmp_path / "log")
    assert calls == ["terminate", "wait", "kill"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--only", "nonsense*"], "--only matches no case; their names are like 'table 5, paper'."),
        (["--data", "none.txt"], "none.txt"),
        (["--valid", "none.txt"], "none.txt"),
        (["--unseen", "none.txt"], "none.txt"),
        (["--limit", "0"], "--limit is 0, expected a number above 0."),
        (["--seq-len", "0"], "--seq-len is 0, expected a number above 0."),
        (["--tokens", "10"], "--tokens is 10, too few for a step of"),
        (["--lr", "-1"], "--lr is -1.0, expected a number above 0."),
        (["--out", "rows.txt"], "--out is rows.txt, expected a file that ends in .jsonl"),
    ],
)
def test_bad_input(
    texts: Path, told: list[list[str]], more: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    assert command(texts, *more) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("regla: error: ") and message in captured.err and captured.err.count("\n") == 1
    assert captured.out == "" and all(arguments[-1] == "--dry-run" for arguments in told)


def test_a_file_of_other_lines(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "rows.jsonl"
    out.write_text('{"benchmark": "bench stu')
    assert command(texts, "--out", str(out)) == 2
    assert f"{out} has a line that is no row of a measurement" in capsys.readouterr().err


def test_tasks(texts: Path, tmp_path: Path, told: list[list[str]], capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("lm_eval")
    folder = tmp_path / "eval" / "boolq"
    folder.mkdir(parents=True)
    question = {"question": "is it so", "passage": "It is so.", "title": "It"}
    items = [json.dumps(question | {"answer": answer}) for answer in (True, False, True, True)]
    (folder / "dev.jsonl").write_text("\n".join(items) + "\n")
    out = tmp_path / "rows.jsonl"
    more = ["--only", "original", "--data-dir", str(tmp_path / "eval"), "--limit", "3", "--out", str(out)]
    assert command(texts, *more, "--tasks", "nonsense") == 2
    captured = capsys.readouterr()
    assert "has no data for the task 'nonsense'" in captured.err and captured.err.count("\n") == 1 and not told
    assert command(texts, *more, "--tasks", "boolq") == 0
    (score,) = rows_of(out)["original"]["tasks"]
    assert (score["task"], score["metric"], score["n"]) == ("boolq", "acc", 3)
    assert 0 <= score["value"] <= 1 and score["stderr"] is not None


def test_tasks_need_a_package(
    texts: Path, told: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("regla.runtime.install.installed", lambda package: False)
    assert command(texts, "--tasks", "boolq") == 2
    assert "Tasks of lm-eval need the packages lm_eval and accelerate" in capsys.readouterr().err and not told


def test_every_case_is_one_that_linearize_takes() -> None:
    setting = students.Setting(
        model="original",
        data=("a.txt",),
        valid=("b.txt",),
        unseen=(),
        tokens="2k",
        seq_len=64,
        batch_size=4,
        lr=1e-3,
        seed=0,
        device="cpu",
        dtype="float32",
        tasks={},
        limit=None,
        probe_lengths=(128,),
        probe_limit=2,
    )
    known = {field.name for field in dataclasses.fields(LinearizeConfig)}
    for name, options in students.CASES.items():
        if options is not None:
            parsed = vars(_parser().parse_args(["linearize", *setting.arguments(options), "--out", "new"]))
            config = LinearizeConfig(**{name: value for name, value in parsed.items() if name in known})
            assert config.seq_len * 64 == config.valid_tokens and config.lr == 1e-3
            assert sum(stage.tokens for stage in config.stages) == (0 if name == WINDOW else 7 * 4 * 64)
            assert all(getattr(config, key) == value for key, value in options.items())
