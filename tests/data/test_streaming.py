"""Text that streams: documents in pieces, token files from it, bad records on the way."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from regla.data import text as text_module
from regla.data.bad import BadRecords
from regla.data.cache import cached_tokens
from regla.data.sources import document_pieces, read_source, read_text
from regla.data.text import Piece, encode, trimmed, whole
from regla.data.tokenize import tokenize_files
from regla.data.tokenizer import load_tokenizer, train_tokenizer

LINES = [f"Line {number} says little, {number * number}." for number in range(40)]
DOCUMENTS = ["\n".join(LINES[:20]), "One line alone.", "A\n\nparted\n\none", "\r\n".join(LINES[20:])]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(DOCUMENTS, 300)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "_READ_CHARACTERS", 7)
    monkeypatch.setattr(text_module, "_PIECE_CHARACTERS", 50)


def test_pieces_join_to_the_documents_and_encode_alike(tmp_path: Path, small: None, tokenizer) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(("\n\n" + "\n<|endoftext|>\n".join([*DOCUMENTS, "\n \n", ""]) + "\n\n").encode())
    pieces = list(document_pieces(file))
    assert whole(pieces) == trimmed(DOCUMENTS) and len(pieces) > 20
    assert max(len(piece.text) for piece in pieces) <= 50
    streamed = np.concatenate([ids for ids, _ in text_module.encode_pieces(tokenizer, iter(pieces))])
    np.testing.assert_array_equal(streamed, encode(tokenizer, DOCUMENTS))


def test_cuts_between_lines_change_no_token(monkeypatch: pytest.MonkeyPatch, tokenizer) -> None:
    at_once = encode(tokenizer, DOCUMENTS[:1])
    monkeypatch.setattr(text_module, "_PIECE_CHARACTERS", 50)
    np.testing.assert_array_equal(encode(tokenizer, DOCUMENTS[:1]), at_once)


def test_text_without_any_break_is_cut_at_its_length(tmp_path: Path, small: None) -> None:
    (tmp_path / "a.txt").write_text("x" * 120 + "<|endoftext|>\n<|endoftext|>\n" + "y" * 60 + "<|endoftext|>")
    documents = read_text(tmp_path / "a.txt").documents
    assert documents == ("x" * 120 + "<|endoftext|>", "y" * 60 + "<|endoftext|>")  # no line of its own


def records(file: Path, *lines: object) -> Path:
    file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return file


def test_bad_records_are_left_out_and_named(tmp_path: Path) -> None:
    good = {"text": "A text."}
    file = records(tmp_path / "a.jsonl", good, {"body": "b"}, '{"text": ', good, {"text": 3}, {"text": "\ud83d"}, good)
    bad = BadRecords(4)
    assert read_source(file, bad=bad).documents == ("A text.",) * 3
    assert [said[: said.index("a.jsonl") + 7].replace(str(tmp_path), "") for said in bad.told] == [
        "Line 2 of /a.jsonl",
        "Line 3 of /a.jsonl",
        "Field 'text' in line 5 of /a.jsonl",
        "Field 'text' in line 6 of /a.jsonl",
    ]
    assert bad.report().startswith("4 bad records left out:\n  Line 2 of ")
    with pytest.raises(ValueError, match=r"More than max_bad_records 3 records cannot be used. The first: Line 2 of .*"
                                         r"has no field 'text' .* The last: Field 'text' in line 6"):  # fmt: skip
        read_source(file, bad=BadRecords(3))


def test_a_file_of_bad_records_alone(tmp_path: Path) -> None:
    file = records(tmp_path / "a.jsonl", {"body": "b"}, {"body": "c"})
    with pytest.raises(ValueError, match=r"a.jsonl holds no text that can be used; 2 bad records, the first: Line 1"):
        read_source(file, bad=BadRecords(100))


@pytest.mark.parametrize("long", [False, True])
def test_a_document_that_is_not_utf8_is_left_out(long: bool, tmp_path: Path, small: None) -> None:
    first = "one\n" * 40 if long else "one "
    content = [b"zero", first.encode() + b"caf\xe9\nmore", b"two"]
    (tmp_path / "a.txt").write_bytes(b"\n<|endoftext|>\n".join(content))
    bad = BadRecords(1)
    documents = read_text(tmp_path / "a.txt", bad=bad).documents
    assert documents[0] == "zero" and documents[-1] == "two"
    assert len(documents) == (3 if long else 2)  # what has gone before the byte stays
    at = b"\n<|endoftext|>\n".join(content).index(b"\xe9")
    assert bad.told == [f"Document 2 of {tmp_path / 'a.txt'} is not UTF-8 text (byte {at}); convert it to UTF-8."]


def test_bad_rows_of_a_table(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ["a", None, "b"]}), tmp_path / "a.parquet")
    bad = BadRecords(1)
    assert read_source(tmp_path / "a.parquet", bad=bad).documents == ("a", "b")
    assert "row 2 of" in bad.told[0]


def test_a_token_file_is_the_text_read_at_once(tmp_path: Path, small: None, tokenizer) -> None:
    tokenizer.save_pretrained(tmp_path / "codec")
    (tmp_path / "web").mkdir()
    for number, part in enumerate((DOCUMENTS[:2], DOCUMENTS[2:])):
        records(tmp_path / "web" / f"{number}.jsonl", *({"text": document} for document in part))
    counts = tokenize_files([tmp_path / "web"], tmp_path / "out", tokenizer=tmp_path / "codec")
    assert list(counts) == [tmp_path / "out" / "web.bin"]
    ids = read_source(tmp_path / "out" / "web.bin").tokens(tokenizer)
    np.testing.assert_array_equal(ids, encode(tokenizer, DOCUMENTS))
    record = json.loads((tmp_path / "out" / "web.bin.json").read_text())
    assert (record["documents"], record["tokens"], record["left_out"]) == (4, len(ids), [])


def tokenized(folder: Path, **options) -> None:
    """Shards from ten documents with a bad record among them."""
    file = folder / "many.jsonl"
    if not file.exists():
        texts = [{"text": f"{LINES[number]}\n{LINES[number + 1]}"} for number in range(10)]
        records(file, *texts[:4], {"text": 1}, *texts[4:])
    tokenize_files([file], folder / options.pop("out"), **{"vocab_size": 300, "shard_tokens": 30} | options)


def shards(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted((out / "many").glob("*.bin*"))}


def test_shards_end_with_a_document_and_repeat_exactly(tmp_path: Path) -> None:
    tokenized(tmp_path, out="a")
    tokenized(tmp_path, out="b")
    tokenized(tmp_path, out="whole", shard_tokens=None)
    codec = load_tokenizer(tmp_path / "a")
    assert shards(tmp_path / "a") == shards(tmp_path / "b") and len(shards(tmp_path / "a")) > 6
    ids = [read_source(file).tokens(codec) for file in sorted((tmp_path / "a" / "many").glob("*.bin"))]
    assert all(len(part) >= 30 and part[-1] == codec.eos_token_id for part in ids[:-1])
    np.testing.assert_array_equal(np.concatenate(ids), read_source(tmp_path / "whole" / "many.bin").tokens(codec))
    np.testing.assert_array_equal(np.concatenate(ids), read_source(tmp_path / "a" / "many").tokens(codec))
    told = json.loads((tmp_path / "a" / "bad-records.json").read_text())
    assert len(told) == 1 and "in line 5 of" in told[0]


def test_an_interrupted_tokenization_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    tokenized(tmp_path, out="whole")
    monkeypatch.setattr(text_module, "_ENCODE_CHARACTERS", 1)
    encode_pieces = text_module.encode_pieces

    def stop(codec, pieces: Iterator[Piece]):
        for number, encoded in enumerate(encode_pieces(codec, pieces)):
            if number == 6:
                raise KeyboardInterrupt
            yield encoded

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("regla.data.tokenize.encode_pieces", stop)
        tokenized(tmp_path, out="part")
    assert "the same command with --resume goes on behind them" in capsys.readouterr().err
    begun = shards(tmp_path / "part")
    assert 0 < len(begun) < len(shards(tmp_path / "whole"))
    with pytest.raises(ValueError, match="is not empty"):
        tokenized(tmp_path, out="part")
    with pytest.raises(ValueError, match=r"was begun with other files or options \(shard_tokens\); repeat those"):
        tokenized(tmp_path, out="part", shard_tokens=60, resume=True)
    encoded = []
    with monkeypatch.context() as patch:
        patch.setattr(
            "regla.data.tokenize.encode_pieces",
            lambda codec, pieces: encode_pieces(codec, (encoded.append(piece) or piece for piece in pieces)),
        )
        tokenized(tmp_path, out="part", resume=True)
    assert shards(tmp_path / "part") == shards(tmp_path / "whole")
    assert 0 < len(encoded) < 10  # not all once more
    told = [(tmp_path / name / "bad-records.json").read_bytes() for name in ("part", "whole")]
    assert told[0] == told[1]


def test_a_failure_before_the_first_token_file_leaves_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="in line 5 of"):
        tokenized(tmp_path, out="a", tokenizer=None, max_bad_records=0)
    tokenized(tmp_path, out="codec")
    with pytest.raises(ValueError, match="in line 5 of"):
        tokenized(tmp_path, out="a", vocab_size=None, tokenizer=tmp_path / "codec", max_bad_records=0)
    assert not list((tmp_path / "a").iterdir())


def test_cached_tokens_are_made_once_for_a_text_and_a_tokenizer(tmp_path: Path, tokenizer, capsys) -> None:
    file = records(tmp_path / "a.jsonl", *({"text": document} for document in DOCUMENTS), {"text": 1})
    cache = tmp_path / "cache"
    bad = BadRecords(5)
    ids = cached_tokens(file, cache, tokenizer, bad=bad).tokens(tokenizer)
    np.testing.assert_array_equal(ids, encode(tokenizer, DOCUMENTS))
    assert len(bad) == 1 and "Tokenizing" in capsys.readouterr().out
    again = BadRecords(5)
    np.testing.assert_array_equal(cached_tokens(file, cache, tokenizer, bad=again).tokens(tokenizer), ids)
    assert again.told == bad.told and capsys.readouterr().out == ""
    cached_tokens(file, cache, train_tokenizer(DOCUMENTS[:1], 280), bad=bad)
    records(file, {"text": "another text"})
    changed = cached_tokens(file, cache, tokenizer).tokens(tokenizer)
    np.testing.assert_array_equal(changed, encode(tokenizer, ["another text"]))
    assert len(list(cache.glob("*.bin"))) == 3 and not list(cache.glob(".*"))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot be created \(.*\); give token_cache a place"):
        cached_tokens(file, tmp_path / "file" / "cache", tokenizer)
