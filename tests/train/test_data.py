"""Sources of tokens: what is read, how it is split, and what each token stands for."""

from pathlib import Path

import numpy as np
import pytest

from regla.train.data import Text, Tokens, encode, encode_source, read_source
from regla.train.embedded import embedded_text
from regla.train.tokenizer import train_tokenizer

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
    monkeypatch.setattr("regla.train.data._ENCODE_CHARACTERS", 1)
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
    first, last = Tokens("a", np.arange(100, dtype=np.uint16)).hold_out(0.1)
    np.testing.assert_array_equal(first.ids, np.arange(90))
    np.testing.assert_array_equal(last.ids, np.arange(90, 100))


def test_a_source_too_short_to_split_is_refused(tokenizer) -> None:
    _, last = Tokens("short.bin", np.arange(3, dtype=np.uint16)).hold_out(0.1)
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
    source = Tokens("a.bin", np.array([1, 5000], dtype=np.uint16))
    with pytest.raises(ValueError, match=r"a.bin holds token id 5000, but the tokenizer has only \d+ tokens"):
        source.tokens(tokenizer)
