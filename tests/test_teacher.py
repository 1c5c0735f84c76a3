"""The command that trains the pretrained model of the package."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from regla.data.text import Text
from regla.quickstart import teacher

_TOPICS = tuple(f"Statement {number} of the reference is this one. " * 12 for number in range(20))


@pytest.fixture
def books(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(teacher, "embedded_text", lambda: Text("embedded", _TOPICS))
    monkeypatch.setattr(teacher, "_HELD_OUT_OF_A_BOOK_FILE", 0.1)
    file = tmp_path / "books.txt"
    file.write_text("It was a dark and stormy night; the rain fell in torrents. " * 400, encoding="utf-8")
    return file


def run(books: Path, out: Path, *more: str) -> int:
    shape = ["--tokens", "2048", "--batch-size", "2", "--device", "cpu", "--dtype", "float32"]
    return teacher.main(["--data", str(books), "--out", str(out), *shape, *more])


def test_the_folder_loads_with_transformers_alone(books: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    assert run(books, out) == 0
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.config.model_type == "gpt_neox" and model.dtype == torch.bfloat16
    assert model.config.rope_parameters["partial_rotary_factor"] == 0.25 and model.config.use_parallel_residual
    assert tokenizer.decode(tokenizer("A dark night.")["input_ids"]) == "A dark night."
    assert tokenizer.eos_token_id == model.config.eos_token_id


def test_figures_and_card(books: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "model"
    assert run(books, out, "--repeat", "3") == 0
    figures = json.loads((out / "training.json").read_text())
    assert figures["tokens"] == 2048 and [row["name"] for row in figures["validation"]] == ["books", "embedded"]
    card = (out / "README.md").read_text()
    assert "license: apache-2.0" in card and "--data books.txt --out DIR --tokens 2048 --repeat 3" in card
    for row in figures["validation"]:
        assert f"| {row['name']} | {row['tokens']:,} | {row['perplexity']:.2f} |" in card
    assert str(tmp_path) not in card + json.dumps(figures)
    assert "validation loss" in capsys.readouterr().out


def test_what_is_scored_is_not_trained_on(books: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Seen(Exception):
        pass

    def stop(model: object, tokens: torch.Tensor, *rest: object, **options: object) -> None:
        seen.extend(tokens.tolist())
        raise Seen

    tokenizers = []
    train_tokenizer = teacher.train_tokenizer
    monkeypatch.setattr(teacher, "optimise", stop)
    monkeypatch.setattr(
        teacher, "train_tokenizer", lambda *given: tokenizers.append(train_tokenizer(*given)) or tokenizers[0]
    )
    with pytest.raises(Seen):
        run(books, tmp_path / "model", "--repeat", "2")
    text = tokenizers[0].decode(seen)
    assert text.count("Statement 3 of") == 2 * 12
    assert "Statement 18 of" not in text and "Statement 19 of" not in text


def test_bad_input(books: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(tmp_path / "none.txt", tmp_path / "model") == 2
    assert "none.txt" in capsys.readouterr().err
    assert run(books, tmp_path / "model", "--tokens", "0") == 2
    assert "--tokens is 0, expected a number above 0" in capsys.readouterr().err
    assert run(books, tmp_path) == 2
    assert "is not empty; give --out a new folder" in capsys.readouterr().err
