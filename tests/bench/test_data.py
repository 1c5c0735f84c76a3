"""Text at scale: memory does not grow with it. Run with REGLA_GIGABYTES=8 for the size that is promised."""

import json
import os
from pathlib import Path

import pytest

from regla.bench import data
from regla.bench.run import bench_data
from regla.cli import main

GIGABYTES = float(os.environ.get("REGLA_GIGABYTES", 0.25))


@pytest.mark.timing
def test_memory_does_not_grow_with_the_tokens(tmp_path: Path) -> None:
    check("draw", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["train", "tokenize"])
def test_memory_does_not_grow_with_the_text(what: str, tmp_path: Path) -> None:
    check(what, tmp_path)


def check(what: str, place: Path) -> None:
    (row,) = bench_data(only=[what], gigabytes=GIGABYTES, folder=str(place))
    assert row["bytes"] == GIGABYTES * 1e9 and row["tokens"] > 0
    assert row["peak_bytes"] > 1e8 and row["beyond_bytes"] < 1e8, row
    assert not list(place.iterdir())


def test_the_command_and_what_is_wrong_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    seen = []
    monkeypatch.setitem(data._MEASURES, "draw", lambda place, size: seen.append((place.parent, size)) or {"tokens": 1})
    out = tmp_path / "rows.jsonl"
    words = ["bench", "data", "--only", "draw", "--out", str(out), "--dir", str(tmp_path)]
    assert main([*words, "--gigabytes", "0.5"]) == 0
    assert seen == [(tmp_path, 500_000_000)]
    assert json.loads(out.read_text()).items() >= {"benchmark": "data", "subject": "draw", "bytes": 500_000_000}.items()
    capsys.readouterr()
    for more, message in (
        (["--gigabytes", "-1"], "--gigabytes is -1.0, expected a number above 0"),
        (["--gigabytes", "1e9"], "GB free, and 1500000001.0 GB are needed; give fewer --gigabytes or another --dir"),
        (["--dir", "none"], "There is no folder none; give --dir one that exists"),
    ):
        assert main([*words, *more]) == 2
        assert message in capsys.readouterr().err


def test_what_is_generated(tmp_path: Path) -> None:
    data._write_tokens(tmp_path / "a.bin", 2_000_000)
    data._write_text(tmp_path / "a.jsonl", 100_000)
    data.draw_all(str(tmp_path / "a.bin"))
    assert (tmp_path / "a.bin").stat().st_size == 2_000_000
    lines = (tmp_path / "a.jsonl").read_bytes()
    assert 95_000 < len(lines) <= 100_000 and all(json.loads(line)["text"] for line in lines.splitlines())
