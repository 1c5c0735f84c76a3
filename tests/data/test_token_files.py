"""Token files: what is written, what is read, and what damage is told."""

import json
from pathlib import Path

import numpy as np
import pytest

from regla.data.sources import read_source
from regla.data.token_files import TokenFile, TokenWriter, record_of
from regla.data.tokenizer import train_tokenizer
from regla.data.tokens import Ids, Tokens


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["some plain text to learn merges from, some plain text"], 270)


def written(file: Path, *documents: list[int], tokenizer=None) -> Path:
    with TokenWriter(file, tokenizer) as writer:
        for document in documents:
            writer.write(np.array(document))
    return file


def test_a_file_has_its_record(tmp_path: Path, tokenizer) -> None:
    file = written(tmp_path / "a.bin", [5, 6, 0], [7, 8, 9, 10, 0], tokenizer=tokenizer)
    assert file.read_bytes() == np.array([5, 6, 0, 7, 8, 9, 10, 0], dtype="<u2").tobytes()
    content = TokenFile(file).content()
    assert (content.tokens, content.documents, content.longest_document, content.largest_id) == (8, 2, 5, 10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.bin.json"]


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"do not fit the 16 bits"), TokenWriter(tmp_path / "a.bin") as writer:
        writer.write(np.array([1, 2]))
        writer.write(np.array([70_000]))
    assert not list(tmp_path.iterdir())


def test_reading_in_blocks_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written(tmp_path / "a.bin", list(range(100)))
    whole = TokenFile(file).content()
    monkeypatch.setattr("regla.data.token_files._BLOCK", 7)
    record_of(file).unlink()
    again = TokenFile(file).content()
    assert (again.sha256, again.largest_id, again.documents) == (whole.sha256, 99, None)


def damage(file: Path, kind: str) -> None:
    content = file.read_bytes()
    if kind == "short":
        file.write_bytes(content[:-2])
    elif kind == "long":
        file.write_bytes(content + b"\0\0")
    elif kind == "changed":
        file.write_bytes(content[:4] + b"\1" + content[5:])
    elif kind == "record":
        record_of(file).write_text('{"tokens": 8')
    elif kind == "empty record":
        record_of(file).write_text("{}")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("short", r"a.bin is damaged: it has 14 bytes, expected 16 by a.bin.json; write both again"),
        ("long", r"a.bin is damaged: it has 18 bytes, expected 16"),
        ("changed", r"a.bin is damaged: its content does not have the SHA-256 in a.bin.json"),
        ("record", r"a.bin.json is damaged; write it and a.bin again .* or remove it"),
        ("empty record", r"a.bin.json is damaged"),
    ],
)
def test_damage_is_told(kind: str, message: str, tmp_path: Path, tokenizer) -> None:
    file = written(tmp_path / "a.bin", [5, 6, 0], [7, 8, 9, 10, 0])
    assert len(read_source(file).tokens(tokenizer)) == 8
    damage(file, kind)
    with pytest.raises(ValueError, match=message):
        read_source(file).tokens(tokenizer)


def test_without_verification_the_record_is_believed(tmp_path: Path, tokenizer) -> None:
    file = written(tmp_path / "a.bin", [5, 6, 0], [7, 8, 9, 10, 0])
    damage(file, "changed")
    assert TokenFile(file).content(verify=False).tokens == 8
    damage(file, "short")
    with pytest.raises(ValueError, match="it has 14 bytes"):
        TokenFile(file)


def test_a_file_that_is_cut_while_it_is_read(tmp_path: Path) -> None:
    file = TokenFile(written(tmp_path / "a.bin", list(range(100))))
    damage(file.path, "short")
    np.testing.assert_array_equal(file[10:12], [10, 11])
    with pytest.raises(ValueError, match=r"a.bin has become shorter while it was read"):
        file[90:100]


def test_tokens_of_another_tokenizer(tmp_path: Path, tokenizer) -> None:
    file = written(tmp_path / "a.bin", [5, 6, 269, 0], tokenizer=tokenizer)
    other = train_tokenizer(["quite another text, and other merges in it, another text"], 270)
    with pytest.raises(ValueError, match=r"a.bin was made with another tokenizer; give tokenizer the folder of that"):
        read_source(file).tokens(other)
    tokenizer.add_tokens(["<added>"])
    assert len(read_source(file).tokens(tokenizer)) == 4


def test_ids_in_parts_are_one_row(tmp_path: Path) -> None:
    parts = [np.arange(5), TokenFile(written(tmp_path / "a.bin", list(range(5, 12)))), np.arange(12, 13)]
    ids = Ids.of(*parts)
    assert len(ids) == 13 and ids.largest() == 12
    for start in range(13):
        for stop in range(start, 14):
            np.testing.assert_array_equal(ids.read(start, stop), np.arange(start, min(stop, 13))[: stop - start])
            np.testing.assert_array_equal(ids[start:stop].read(), np.arange(start, min(stop, 13)))
    assert Ids.of(ids[:6], ids[6:]).read().tolist() == list(range(13))
    assert ids.digest() != ids[:12].digest() != ids[1:].digest()


def test_a_folder_is_one_source_in_the_order_of_names(tmp_path: Path, tokenizer) -> None:
    for name, first in (("b", 4), ("a", 1)):
        written(tmp_path / f"{name}.bin", [first, first + 1, first + 2])
    (tmp_path / "notes.md").write_text("of no matter")
    source = read_source(tmp_path)
    assert isinstance(source, Tokens) and source.tokens(tokenizer).tolist() == [1, 2, 3, 4, 5, 6]
    (tmp_path / "c.txt").write_text("text")
    with pytest.raises(ValueError, match=r"holds files of several kinds \(.bin, .txt\); give one with files of one"):
        read_source(tmp_path)
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"none holds no .txt, .jsonl, .parquet or .bin file"):
        read_source(tmp_path / "none")


def test_at_most_a_million_tokens_are_held_out() -> None:
    ids = Ids.of(np.broadcast_to(np.uint16(3), (20_000_000,)))
    first, last = Tokens("a", ids).hold_out(0.1)
    assert (len(first.ids), len(last.ids)) == (19_000_000, 1_000_000)


def test_the_record_is_plain_json(tmp_path: Path) -> None:
    file = written(tmp_path / "a.bin", [5, 6, 0])
    assert json.loads(record_of(file).read_text())["tokens"] == 3
