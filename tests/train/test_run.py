"""A whole run: what is trained on, what is saved, and what is saved when it ends early."""

import json
import math
import signal
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from regla.data.embedded import embedded_text
from regla.data.sources import HELD_OUT
from regla.data.text import Text, encode
from regla.data.tokenize import tokenize_files
from regla.eval.measure import evaluate
from regla.eval.perplexity import mean_score, position_table
from regla.train import loop, run
from regla.train.config import TrainConfig

TINY = {
    "vocab_size": 300,
    "hidden_size": 32,
    "layers": 2,
    "heads": 2,
    "seq_len": 32,
    "batch_size": 4,
    "lr": 1e-2,
    "device": "cpu",
}
DOCUMENTS = embedded_text().documents[:6]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "corpus.txt"
    file.write_text("\n<|endoftext|>\n".join(DOCUMENTS), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "hybrid"
    run.train(TrainConfig(out=str(out), data=(str(corpus),), mixer="hybrid", steps=25, **TINY))
    return out


def config(out: Path, corpus: Path, **arguments) -> TrainConfig:
    return TrainConfig(**{"out": str(out), "data": (str(corpus),), "steps": 6} | TINY | arguments)


def act_in_step(number: int, act, monkeypatch: pytest.MonkeyPatch) -> None:
    """Call `act` when the crops of step `number` are drawn."""
    draw = loop.crops

    def drawing(*arguments, batch: int, **options):
        if batch == number - 1:
            act()
        return draw(*arguments, batch=batch, **options)

    monkeypatch.setattr(loop, "crops", drawing)


def test_the_saved_folder_loads_with_the_auto_classes(trained: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(trained)
    tokenizer = AutoTokenizer.from_pretrained(trained)
    assert model.config.model_type == "regla" and model.config.vocab_size == len(tokenizer) == 300
    assert model.config.layer_types == ["linear_attention", "full_attention"]
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    ids = tokenizer("The statement", return_tensors="pt")["input_ids"]
    assert model.generate(ids, max_new_tokens=3, min_new_tokens=3).shape == (1, ids.shape[1] + 3)


def test_the_summary_says_what_was_done(trained: Path) -> None:
    summary = json.loads((trained / "training.json").read_text())
    assert summary["complete"] and summary["steps"] == 25 and summary["tokens"] == 25 * 4 * 32
    assert summary["arguments"]["mixer"] == "hybrid" and summary["arguments"]["lr"] == 1e-2
    model = AutoModelForCausalLM.from_pretrained(trained)
    assert summary["parameters"] == sum(p.numel() for p in model.parameters())
    assert abs(summary["parameters"] / summary["softmax_parameters"] - 1) <= 0.005
    assert summary["train_loss"] < math.log(300) - 0.3  # it learnt something
    assert summary["validation_perplexity"] == pytest.approx(math.exp(summary["validation_loss"]))
    assert summary["seconds"] > 0 and summary["tokens_per_second"] > 0
    assert set(summary["versions"]) == {"regla", "python", "torch", "transformers"}


def test_the_validation_loss_is_that_of_the_saved_model_on_the_held_out_text(
    trained: Path, corpus: Path, tmp_path: Path
) -> None:
    _, last = Text("corpus", DOCUMENTS).hold_out(HELD_OUT)
    held_out = tmp_path / "held_out.txt"
    held_out.write_text("\n<|endoftext|>\n".join(last.documents), encoding="utf-8")
    (score,) = evaluate(trained, data=[held_out], device="cpu")
    summary = json.loads((trained / "training.json").read_text())
    assert score.loss == pytest.approx(summary["validation_loss"], rel=1e-6)
    assert score.bytes == summary["validation"][0]["bytes"] == last.bytes


@pytest.mark.parametrize("mixer", ["hybrid", "softmax"])
def test_the_perplexity_by_position_is_that_of_the_saved_model(
    mixer: str, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "run"
    valid = tmp_path / "valid.txt"
    valid.write_text(DOCUMENTS[1], encoding="utf-8")
    options = {"valid": (str(corpus), str(valid)), "steps": 2, "mixer": mixer}
    summary = run.train(config(out, corpus, eval_context=100, **options))
    printed = capsys.readouterr().out
    scores = evaluate(out, data=[corpus, valid], device="cpu", seq_len=100, by_position=True)
    expected = [asdict(bin_) for bin_ in mean_score(scores).positions]
    assert [(bin_["first"], bin_["last"]) for bin_ in summary["by_position"]] == [(0, 63), (64, 99)]
    for bin_, other in zip(summary["by_position"], expected, strict=True):
        assert bin_ == pytest.approx(other, rel=1e-5)
    assert json.loads((out / "training.json").read_text())["by_position"] == summary["by_position"]
    assert position_table(scores) in printed and "more than the model's max_position_embeddings, 32." in printed
    assert summary["validation_loss"] != mean_score(scores).loss  # that one is of windows of --seq-len


def test_a_context_that_no_text_has(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has \d+ tokens, fewer than eval_context 1000000; give more text or a sh"):
        run.train(config(tmp_path / "run", corpus, eval_context=10**6))
    assert not (tmp_path / "run").exists()


def test_the_held_out_text_is_not_trained_on(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(model, tokens_N, *arguments, **options):
        seen.append(tokens_N)
        loop.optimise(model, tokens_N, *arguments, **options)

    monkeypatch.setattr(run, "optimise", spy)
    run.train(config(tmp_path / "run", corpus, steps=1))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    first, _ = Text("corpus", DOCUMENTS).hold_out(HELD_OUT)
    np.testing.assert_array_equal(seen[0].numpy(), encode(tokenizer, first.documents))

    run.train(
        config(tmp_path / "valid", corpus, steps=1, valid=(str(corpus),), vocab_size=None, tokenizer=tmp_path / "run")
    )
    np.testing.assert_array_equal(seen[1].numpy(), encode(tokenizer, DOCUMENTS))  # all of it, as --valid names a file


def test_token_files_train_the_same_model_as_their_text(corpus: Path, tmp_path: Path) -> None:
    tokenize_files([corpus], tmp_path / "tokens", vocab_size=300)
    options = {"vocab_size": None, "tokenizer": str(tmp_path / "tokens"), "valid": (str(corpus),)}
    run.train(config(tmp_path / "a", corpus, **options))
    run.train(config(tmp_path / "b", tmp_path / "tokens" / "corpus.bin", **options))
    a, b = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in "ab")
    assert all(torch.equal(weight, b[name]) for name, weight in a.items())


def test_ctrl_c_saves_the_model_after_the_step_it_falls_into(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    weights = {}

    def spy(model, *arguments, **options):
        loop.optimise(model, *arguments, **options)
        weights.update(model.state_dict())

    monkeypatch.setattr(run, "optimise", spy)
    act_in_step(3, lambda: signal.raise_signal(signal.SIGINT), monkeypatch)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run.train(config(tmp_path / "run", corpus))
    assert signal.getsignal(signal.SIGINT) is before
    assert "Interrupted after 3 of 6 steps; the model as it is now is in" in capsys.readouterr().out
    summary = json.loads((tmp_path / "run" / "training.json").read_text())
    assert summary["steps"] == 3 and not summary["complete"] and "validation_loss" not in summary
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run").state_dict()
    assert all(torch.equal(weight, saved[name]) for name, weight in weights.items())


def test_an_error_behind_the_first_step_saves_the_model(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def fail() -> None:
        raise torch.OutOfMemoryError("no room")

    act_in_step(4, fail, monkeypatch)
    with pytest.raises(MemoryError, match="lower batch_size and raise accumulate"):
        run.train(config(tmp_path / "run", corpus))
    assert "Stopped by OutOfMemoryError in step 4; the model as it was is in" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "training.json").read_text())["steps"] == 3
    AutoModelForCausalLM.from_pretrained(tmp_path / "run")


def test_nothing_is_saved_that_is_not_worth_it(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder stays empty, so that the same command may run again."""
    with pytest.raises(FloatingPointError):
        run.train(config(tmp_path / "spoilt", corpus, lr=1e30))
    assert not list((tmp_path / "spoilt").iterdir())

    def fail() -> None:
        raise torch.OutOfMemoryError("no room")

    act_in_step(1, fail, monkeypatch)
    with pytest.raises(MemoryError):
        run.train(config(tmp_path / "untrained", corpus))
    assert not list((tmp_path / "untrained").iterdir())


def test_text_shorter_than_a_sequence(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Only a few words of text are in here.")
    with pytest.raises(ValueError, match=r"The training text has \d+ tokens, expected more than seq_len 32"):
        run.train(config(tmp_path / "run", tmp_path / "short.txt"))
    assert not (tmp_path / "run").exists()


def test_token_files_need_their_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"\x01\x00" * 1000)
    with pytest.raises(ValueError, match=r"a.bin holds tokens; name the folder of their tokenizer with tokenizer"):
        run.train(config(tmp_path / "run", tmp_path / "a.bin"))
