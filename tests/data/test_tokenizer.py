"""Byte-level BPE and token files."""

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from regla.data.sources import encode_source, read_source, text_size
from regla.data.text import Text
from regla.data.tokenize import tokenize_files
from regla.data.tokenizer import load_tokenizer, train_tokenizer, vocabulary_size
from regla.data.tokens import write_tokens

TEXTS = ["the cat sat on the mat, the cat sat", "Ünïcödé 世界 🙂\ttabs  and   spaces\r\n", "\x00\x7f odd bytes"]


def test_any_text_decodes_to_itself_after_training_on_another() -> None:
    tokenizer = train_tokenizer(TEXTS[:1], 280)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("the cat")["input_ids"]) < len("the cat")  # merges were learnt
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == tokenizer.pad_token_id == 0


def test_training_repeats_exactly() -> None:
    first, second = (train_tokenizer(TEXTS, 300) for _ in range(2))
    assert first.get_vocab() == second.get_vocab()


def test_tokens_written_with_their_tokenizer_decode_to_the_documents(tmp_path: Path, capsys) -> None:
    (tmp_path / "a.txt").write_text("the cat\n<|endoftext|>\nsat on\nthe mat\n", encoding="utf-8")
    (tmp_path / "b.txt").write_text("世界", encoding="utf-8")
    out = tmp_path / "tokens"
    counts = tokenize_files([tmp_path / "a.txt", tmp_path / "b.txt"], out, vocab_size=270)
    tokenizer = AutoTokenizer.from_pretrained(out)
    raw = np.fromfile(out / "a.bin", dtype="<u2")
    assert tokenizer.decode(raw) == "the cat<|endoftext|>sat on\nthe mat<|endoftext|>"
    assert counts == {out / "a.bin": len(raw), out / "b.bin": (out / "b.bin").stat().st_size // 2}
    assert f"{len(raw)} tokens" in capsys.readouterr().out
    ids = read_source(out / "a.bin").tokens(tokenizer)
    np.testing.assert_array_equal(ids, read_source(tmp_path / "a.txt").tokens(tokenizer))

    again = tmp_path / "again"  # the same tokenizer for another folder
    tokenize_files([tmp_path / "a.txt"], again, tokenizer=out)
    np.testing.assert_array_equal(np.fromfile(again / "a.bin", dtype="<u2"), raw)


def test_records_are_tokenised_as_text_is(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one document\n<|endoftext|>\nanother document")
    (tmp_path / "b.jsonl").write_text('{"body": "one document"}\n{"body": "another document"}\n')
    tokenize_files([tmp_path / "a.txt", tmp_path / "b.jsonl"], tmp_path / "out", vocab_size=270, text_field="body")
    assert (tmp_path / "out" / "a.bin").read_bytes() == (tmp_path / "out" / "b.bin").read_bytes()


def test_bad_input(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("text")
    other = tmp_path / "other"
    other.mkdir()
    (other / "a.txt").write_text("text")
    tokens = tmp_path / "t.bin"
    tokens.write_bytes(b"\x00\x00")
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="vocabulary of 65537 does not fit token files of uint16"):
        tokenize_files([text], out, vocab_size=2**16 + 1)
    with pytest.raises(ValueError, match="vocabulary of 256 is too small: it needs at least 257"):
        tokenize_files([text], out, vocab_size=256)
    with pytest.raises(ValueError, match="Give either tokenizer or vocab_size"):
        tokenize_files([text], out)
    with pytest.raises(ValueError, match="There is no tokenizer folder"):
        tokenize_files([text], out, tokenizer=tmp_path / "none")
    with pytest.raises(ValueError, match="holds no readable tokenizer"):
        tokenize_files([text], out, tokenizer=other)
    with pytest.raises(ValueError, match="Two files would both be written to"):
        tokenize_files([text, other / "a.txt"], out, vocab_size=300)
    with pytest.raises(ValueError, match=r"t.bin is not text"):
        tokenize_files([tokens], out, vocab_size=300)
    with pytest.raises(ValueError, match="is not empty"):
        tokenize_files([text], other, vocab_size=300)
    assert not out.exists()  # nothing is left behind


def test_a_tokenizer_too_large_for_uint16_is_refused(tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(2**16 + 1)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0").save_pretrained(tmp_path / "large")
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match=r"vocabulary of 65537 does not fit token files of uint16"):
        tokenize_files([tmp_path / "a.txt"], tmp_path / "out", tokenizer=tmp_path / "large")


def with_gaps(folder: Path, ids: dict[str, int]) -> Path:
    """A tokenizer of words with these ids."""
    words = Tokenizer(models.WordLevel(ids, unk_token="end"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="end").save_pretrained(folder)
    return folder


def test_ids_with_gaps_are_counted_to_the_largest(tmp_path: Path) -> None:
    codec = load_tokenizer(with_gaps(tmp_path / "codec", {"end": 0, "a": 1, "b": 409}))
    assert len(codec) == 3 and vocabulary_size(codec) == 410
    (tmp_path / "t.txt").write_text("a b a")
    tokenize_files([tmp_path / "t.txt"], tmp_path / "out", tokenizer=tmp_path / "codec")
    np.testing.assert_array_equal(read_source(tmp_path / "out" / "t.bin").tokens(codec), [1, 409, 1, 0])
    encoded = encode_source(read_source(tmp_path / "out" / "t.bin"), codec)
    assert (encoded.bytes, encoded.words) == (5, 3)
    codec.add_tokens(["<extra>"])
    assert vocabulary_size(codec) == max(codec.get_vocab().values()) + 1


def test_an_id_beyond_16_bits_is_refused_and_never_wrapped(tmp_path: Path) -> None:
    with_gaps(tmp_path / "codec", {"end": 0, "a": 1, "b": 70_399})
    (tmp_path / "t.txt").write_text("a b a")
    with pytest.raises(ValueError, match=r"vocabulary of 70400 does not fit token files of uint16"):
        tokenize_files([tmp_path / "t.txt"], tmp_path / "out", tokenizer=tmp_path / "codec")
    assert not (tmp_path / "out").exists()
    for ids in ([0, 70_399], [-1, 3]):
        with pytest.raises(ValueError, match=r"do not fit the 16 bits of .*wrong.bin"):
            write_tokens(tmp_path / "wrong.bin", np.array(ids))
    assert not (tmp_path / "wrong.bin").exists()


def test_the_text_of_tokens_is_measured(tmp_path: Path) -> None:
    """Bytes and words of a token file are those of the text it was made from; so are those of a text's start."""
    documents = ("Grüße,  世界 🙂", "two words\nand more", "x")
    text = Text("a", documents)
    codec = train_tokenizer(TEXTS, 300)
    whole = encode_source(text, codec)
    assert text_size(whole.ids, codec) == (text.bytes, text.words) == (whole.bytes, whole.words)
    first = len(codec(documents[0])["input_ids"]) + 1
    start = whole.start(first, codec)
    assert (len(start.ids), start.bytes, start.words) == (first, len(documents[0].encode()), 3)
    assert whole.start(10_000, codec) is whole
