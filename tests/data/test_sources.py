"""Sources of tokens: what is read, how it is split, and what each token stands for."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from regla.data.embedded import embedded_text
from regla.data.records import read_dataset
from regla.data.sources import encode_source, read_source
from regla.data.text import Text, encode
from regla.data.tokenizer import train_tokenizer
from regla.data.tokens import Ids, Tokens

DOCUMENTS = ("One line.\n\nAnother line of the first.", "Grüße, 世界 🙂", "An <|endoftext|> inside a line stays text.")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["some plain text to learn merges from, some plain text"], 270)


def test_lines_of_end_of_text_separate_documents(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes("\n<|endoftext|>\n".join(DOCUMENTS).encode() + b"\n<|endoftext|>\r\n\r\n<|endoftext|>\n  \n")
    source = read_source(file)
    assert source == Text(str(file), DOCUMENTS)
    assert source.bytes == sum(len(document.encode()) for document in DOCUMENTS)


def test_every_document_ends_with_the_end_of_text_token_and_decodes_to_itself(tokenizer) -> None:
    ids = encode(tokenizer, DOCUMENTS)
    assert ids.dtype == np.int32
    ends = np.flatnonzero(ids == tokenizer.eos_token_id)
    assert len(ends) == len(DOCUMENTS) and ends[-1] == len(ids) - 1  # the one spelled out in the text is no token
    parts = np.split(ids, ends + 1)[:-1]
    assert tuple(tokenizer.decode(part[:-1]) for part in parts) == DOCUMENTS


def test_encoding_in_batches_changes_nothing(tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once = encode(tokenizer, DOCUMENTS)
    monkeypatch.setattr("regla.data.text._ENCODE_CHARACTERS", 1)
    np.testing.assert_array_equal(encode(tokenizer, DOCUMENTS), at_once)


def test_hold_out_cuts_the_text_once_at_a_line_break() -> None:
    text = Text("a", ("x" * 400 + "\n" + "y" * 500, "z" * 100))
    first, last = text.hold_out(0.1)
    assert first.documents == ("x" * 400 + "\n" + "y" * 500,) and last.documents == ("z" * 100,)
    first, last = text.hold_out(0.5)  # the cut at 501 moves back to the line break
    assert first.documents == ("x" * 400,) and last.documents == ("y" * 500, "z" * 100)
    first, last = Text("b", ("w" * 1000,)).hold_out(0.1)  # no line break: at the character
    assert first.documents == ("w" * 900,) and last.documents == ("w" * 100,)


def test_hold_out_of_tokens() -> None:
    first, last = Tokens("a", Ids.of(np.arange(100, dtype=np.uint16))).hold_out(0.1)
    np.testing.assert_array_equal(first.ids.read(), np.arange(90))
    np.testing.assert_array_equal(last.ids.read(), np.arange(90, 100))


def test_a_source_too_short_to_split_is_refused(tokenizer) -> None:
    _, last = Tokens("short.bin", Ids.of(np.arange(3, dtype=np.uint16))).hold_out(0.1)
    with pytest.raises(ValueError, match=r"short.bin is too short to hold out"):
        encode_source(last, tokenizer)


def test_embedded_text_is_prose_without_repetitions() -> None:
    text = embedded_text()
    assert text == embedded_text()
    assert text.bytes > 150_000
    paragraphs = [paragraph for document in text.documents for paragraph in document.split("\n\n")]
    assert len(set(paragraphs)) == len(paragraphs)
    assert not any("::=" in paragraph or ">>>" in paragraph or "\n" in paragraph for paragraph in paragraphs)
    first, last = text.hold_out(0.1)
    assert 0.09 < last.bytes / text.bytes < 0.12
    assert first.bytes + last.bytes > text.bytes - 10  # nothing but line breaks at the cut is lost


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"caf\xe9", r"a.txt is not UTF-8 text \(byte 3\); convert it to UTF-8"),
        ("a.txt", b" \n<|endoftext|>\n", r"a.txt holds no text"),
        ("a.bin", b"\x01\x00\x02", r"a.bin has 3 bytes, expected two for each token"),
        ("a.bin", b"", r"a.bin has 0 bytes"),
        ("a.pdf", b"%PDF", r"unknown kind '.pdf'; give .txt .* or .bin"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', r"Line 2 of .*a.jsonl is not JSON .*; correct it"),
        ("a.jsonl", b'{"text": "caf\xe9"}', r"Line 1 of .*a.jsonl is not JSON"),
        (
            "a.jsonl",
            b'{"text": "a"}\n\n{"body": "b", "id": 1}',
            r"Line 3 of .*a.jsonl has no field 'text' \(it has body, id\)",
        ),
        ("a.jsonl", b"[1]", r"Line 1 of .*a.jsonl has no field 'text' \(it has no fields\)"),
        ("a.jsonl", b'{"text": 3}', r"Field 'text' in line 1 of .*a.jsonl is of type int, expected text"),
        ("a.jsonl", b"\n", r"a.jsonl holds no text"),
        ("a.jsonl", b'{"text": "a"}\n' + b"[" * 100_000, r"Line 2 of .*a.jsonl is nested too deeply"),
        (
            "A.jsonl",  # the name as it is
            b'{"text": "a"}\n{"text": "half \\ud83d emoji"}',
            r"'text' in line 2 of .*A.jsonl is no valid Unicode text \(a lone surrogate, '\\ud83d', at character 5",
        ),
        ("A.jsonl", b'{"body": "a"}', r"Line 1 of .*A.jsonl has no field"),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_source(tmp_path / name)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"There is no file .*none.txt"):
        read_source(tmp_path / "none.txt")


def test_tokens_of_another_tokenizer_are_refused(tokenizer) -> None:
    source = Tokens("a.bin", Ids.of(np.array([1, 5000], dtype=np.uint16)))
    with pytest.raises(
        ValueError, match=r"a.bin holds token id 5000, but the largest id of the tokenizer is \d+; give"
    ):
        source.tokens(tokenizer)


def test_json_lines(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(json.dumps({"body": document, "id": 1}) for document in DOCUMENTS) + "\n\n")
    assert read_source(file, "body") == Text(str(file), DOCUMENTS)


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"body": DOCUMENTS, "id": [1, 2, 3]}), file, row_group_size=2)
    assert read_source(file, "body") == Text(str(file), DOCUMENTS)
    with pytest.raises(ValueError, match=r"a.parquet has no field 'text' \(it has body, id\); .* with text_field"):
        read_source(file)
    with pytest.raises(ValueError, match=r"Field 'id' in row 1 of .*a.parquet is of type int, expected text"):
        read_source(file, "id")
    file.write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"a.parquet is no readable Parquet file"):
        read_source(file)


def test_a_data_set_is_streamed_as_far_as_it_is_needed(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    lines = "\n".join(json.dumps({"body": f"Document {number:03d}"}) for number in range(100))
    (tmp_path / "train.jsonl").write_text(lines)
    everything = read_dataset(str(tmp_path), "body")
    assert everything == Text(str(tmp_path), tuple(f"Document {number:03d}" for number in range(100)))
    some = read_dataset(str(tmp_path), "body", characters=30)
    assert some.documents == ("Document 000", "Document 001", "Document 002")
    with pytest.raises(ValueError, match=r"Record 1 of .* has no field 'text' \(it has body\)"):
        read_dataset(str(tmp_path))


def test_a_data_set_that_cannot_be_read(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    with pytest.raises(
        ValueError, match=r"The data set no/such:set cannot be read \(.*; check its name and the network"
    ):
        read_dataset("no/such:set")
    with pytest.raises(ValueError, match=r"The data set .* cannot be read"):
        read_dataset(str(tmp_path))  # an empty folder


def test_name_and_configuration_reach_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    seen = []
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *names, **options: seen.append((names, options)) or [{"text": "A text."}]
    )
    assert read_dataset("user/name:config").documents == read_dataset("name").documents == ("A text.",)
    assert seen == [
        (("user/name", "config"), {"split": "train", "streaming": True}),
        (("name", None), {"split": "train", "streaming": True}),
    ]


@pytest.mark.parametrize("package", ["pyarrow", "datasets"])
def test_packages_that_are_not_installed(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "a.parquet").touch()
    with pytest.raises(ValueError, match=rf"needs the package {package}, which is not installed; run `pip install"):
        read_source(tmp_path / "a.parquet") if package == "pyarrow" else read_dataset("name")


def test_text_in_parquet_that_is_not_utf8_names_its_row(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    data = pyarrow.array([b"good", b"caf\xe9"]).cast(pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": data}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"Field 'text' in row 2 of .*a.parquet is not UTF-8 text \(byte 3\)"):
        read_source(tmp_path / "a.parquet")


def test_documents_that_no_file_can_hold_are_refused(tokenizer) -> None:
    with pytest.raises(ValueError, match=r"Document 2 is no valid Unicode text"):
        encode(tokenizer, ["good", "half \ud83d"])


def test_a_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "a.txt").write_text("text")
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ValueError, match=r"a.txt cannot be read \(Permission denied\); give"):
        read_source(tmp_path / "a.txt")
    with pytest.raises(ValueError, match=r"cannot be read \(File name too long\)"):
        read_source(tmp_path / ("a" * 300 + ".txt"))
