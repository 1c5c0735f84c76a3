"""Byte-level BPE and token files."""

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from regla.data.sources import read_source
from regla.data.tokenizer import tokenize_files, train_tokenizer

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
    with pytest.raises(ValueError, match="either --tokenizer DIR or --vocab-size N"):
        tokenize_files([text], out)
    with pytest.raises(ValueError, match="no tokenizer folder"):
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
