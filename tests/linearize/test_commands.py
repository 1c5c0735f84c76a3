"""What a user does with models of every family: `regla linearize` from folder to folder, and evaluation."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from regla.cli import main
from regla.data.tokenizer import load_tokenizer, train_tokenizer
from regla.linearize import convert
from tests.linearize.models import command
from tests.linearize.originals import FIRST, original

FAST = ("gpt2", "gpt_neox")  # the least like Llama
EVERY = pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in FIRST]
)


@pytest.fixture
def place(folder, tmp_path):
    """A folder as `command` takes it, and what makes its model."""

    def made(name, **changes):
        tokenizer = load_tokenizer(str(folder / "model"))
        model = original(name, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **changes)
        model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        (tmp_path / "text.txt").write_text((folder / "text.txt").read_text())
        return tmp_path

    return made


@EVERY
def test_linearize(name, place, capsys):
    """Both stages train, and the folder goes on with --init until no layer is softmax."""
    here = place(name)
    steps = ("--tokens", "1024", "--transfer-tokens", "512")
    assert main(command(here, here / "dry", "--tokens", "1024", "--dry-run")) == 0
    assert "3, 2 of them to become ReGLA" in capsys.readouterr().out
    assert main(command(here, here / "out", *steps)) == 0
    printed = capsys.readouterr().out
    assert "3 layers, 2 of them now ReGLA; softmax through the transferred weights reproduces" in printed
    assert main(command(here, here / "pure", "--init", str(here / "out"), "--keep", "none", *steps)) == 0
    summary = json.loads((here / "pure" / "linearize.json").read_text())
    assert summary["linear_layers"] == [0, 1, 2] and summary["transfer_error"] <= 1e-4
    assert [row["layer"] for row in summary["calibration"]] == [1]
    model = AutoModelForCausalLM.from_pretrained(here / "pure")
    assert isinstance(model, type(AutoModelForCausalLM.from_config(model.config.original_config())))


def test_keep_sliding(place):
    here = place("gemma3_text")
    assert main(command(here, here / "out", "--keep", "sliding")) == 0
    assert json.loads((here / "out" / "config.json").read_text())["linear_layers"] == [1]


def test_no_more_tokens_than_positions(place, capsys):
    """A table of positions ends: said before anything is read, and where a text grows too long."""
    here = place("gpt2", max_position_embeddings=48)
    words = command(here, here / "out")
    assert main(words) == 2
    assert "--seq-len is 64, but" in (error := capsys.readouterr().err) and "positions for 48 tokens" in error
    words[words.index("--seq-len") + 1] = "32"
    assert main(words) == 0  # calibrated on shorter pieces
    model = AutoModelForCausalLM.from_pretrained(here / "out")
    assert model(torch.zeros(1, 48, dtype=torch.long)).logits.isfinite().all()
    with pytest.raises(ValueError, match="position 48 is asked for, and the model has learnt 48; give fewer tokens"):
        model(torch.zeros(1, 49, dtype=torch.long))
    padded = torch.ones(1, 52, dtype=torch.long)
    padded[:, :4] = 0
    assert model(torch.zeros(1, 52, dtype=torch.long), attention_mask=padded).logits.isfinite().all()
    options = ["--init", str(here / "out"), "--data", str(here / "text.txt"), "--tokens", "512"]
    assert main(["train", "--out", str(here / "run"), *options, "--seq-len", "64"]) == 2
    assert "--seq-len is 64, but the model in --init" in capsys.readouterr().err


@pytest.mark.slow
def test_lm_eval(tmp_path):
    """All families: the scores of lm-eval's own class for Hugging Face models, padding and batches included."""
    pytest.importorskip("lm_eval", reason="the package lm_eval is not installed: it is in regla's extra eval")
    from regla.eval.harness import evaluate_tasks
    from tests.eval.originals import write_originals

    data = write_originals(tmp_path / "data")
    tokenizer = train_tokenizer(["the river is old and long, and the house is by the river"] * 3, 300)
    tasks = ["boolq", "hellaswag", "lambada_openai"]
    for name in FIRST:
        torch.manual_seed(0)
        sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 1024, "eos_token_id": tokenizer.eos_token_id}
        convert(original(name, **sizes), [1], check=False).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        scores = evaluate_tasks(
            [str(tmp_path / name)],
            tasks,
            data_dir=data,
            batch_size=3,
            device="cpu",
            out=tmp_path / f"{name}-out",
            compare_lm_eval=True,
        )
        comparisons = json.loads((tmp_path / f"{name}-out" / "results.json").read_text())["comparisons"]
        assert [row["task"] for row in comparisons] == tasks and len(scores) > 0, name
        assert all(row["items_that_differ"] == 0 and row["largest_difference"] < 1e-3 for row in comparisons), name
