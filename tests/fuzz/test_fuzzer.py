"""Malformed inputs end in a sentence, and the fuzzer that makes them sees what does not."""

import pickle
import random
from pathlib import Path

import pytest

from tests.fuzz import fuzzer
from tests.fuzz.fuzzer import SEEDS, Hang, attempt, fuzz, malformed


def test_a_round_of_malformed_inputs(tmp_path: Path) -> None:
    failures, counts = fuzz(len(SEEDS), 1, tmp_path)
    assert not failures
    assert sum(counts.values()) == len(SEEDS)


@pytest.mark.slow
def test_500_malformed_inputs(tmp_path: Path) -> None:
    failures, _ = fuzz(500, 0, tmp_path)
    assert not failures


def _says(message: str, code: int):
    def command(_: list[str]) -> int:
        print(message, file=fuzzer.sys.stderr)
        return code

    return command


def _raises(_: list[str]) -> int:
    raise KeyError("layers")


def _hangs(_: list[str]) -> int:
    raise Hang


def _overwrites(command: list[str]) -> int:
    Path(command[1]).write_text("lost")
    return 0


def _leaves(command: list[str]) -> int:
    out = Path(command[1]).parents[1] / "out"
    out.mkdir()
    (out / "half").touch()
    return _says("regla: error: no", 2)(command)


def _executes(command: list[str]) -> int:
    pickle.loads(Path(command[1]).read_bytes())
    return 0


@pytest.mark.parametrize(
    ("command", "wrong"),
    {
        _says("regla: error: no", 2): "",
        _says("", 0): "",
        _says("Something else", 2): "without a sentence",
        _says("regla: Traceback", 2): "Traceback",
        _says("regla: error: no", 139): "exit code 139",
        _raises: "KeyError",
        _hangs: "did not end within",
        _overwrites: "was changed",
        _leaves: "failed, and left",
        _executes: "was executed",
    }.items(),
)
def test_the_fuzzer_sees_what_is_wrong(command, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzzer, "main", command)
    base, place = tmp_path / "base", tmp_path / "case"
    base.mkdir()
    place.mkdir()
    study = next(seed for seed in SEEDS if seed.kind == "study")
    (base / study.copied).write_text("title: A study")
    content = pickle.dumps(fuzzer._Bomb(base / "executed"))
    _, found = attempt(study, content, base, place)
    assert wrong in found and bool(wrong) == bool(found)


def test_a_case_is_the_same_every_time_and_differs_from_its_seed() -> None:
    content = b'{"a": {"b": 1}, "c": [1, 2]}'
    changed = [malformed(content, random.Random(number)) for number in range(200)]
    assert changed == [malformed(content, random.Random(number)) for number in range(200)]
    assert sum(one == content for one in changed) < 5 and len(set(changed)) > 100
