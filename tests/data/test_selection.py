"""What a command trains, validates and scores on."""

from pathlib import Path

from regla.data.embedded import embedded_text
from regla.data.selection import read_sources, split_validation
from regla.data.sources import HELD_OUT


def test_no_files_are_the_embedded_text() -> None:
    assert read_sources([]) == [embedded_text()]


def test_validation_is_the_named_files_or_the_last_tenth(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("line\n" * 50)
    (tmp_path / "b.jsonl").write_text('{"body": "other"}\n')
    data = read_sources([tmp_path / "a.txt"])
    train, valid = split_validation(data)
    assert (train, valid) == tuple([part] for part in data[0].hold_out(HELD_OUT))
    train, valid = split_validation(data, [tmp_path / "b.jsonl"], "body")
    assert train == data and valid[0].documents == ("other",)
