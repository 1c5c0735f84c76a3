"""The quickstart: its measurements by hand, its folder, and the whole of it on a small scale."""

import json
import struct
from pathlib import Path

import pytest
import torch

from regla.cli import main
from regla.models import ReGLAConfig, ReGLAForCausalLM
from regla.quickstart import run
from regla.quickstart.decoding import DecodingCost, decoding_costs, streaming_difference
from regla.quickstart.run import comparison, decoding_table, quickstart, read_losses
from regla.train.config import MIXERS


def make_model(layer: str) -> ReGLAForCausalLM:
    config = ReGLAConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,
        layer_types=[layer] * 2,
    )
    return ReGLAForCausalLM(config).eval()


def test_the_cache_is_measured_at_each_context() -> None:
    softmax, regla = (
        decoding_costs(make_model(layer), [8, 40, 700], repeats=2) for layer in ("full_attention", "linear_attention")
    )
    assert [cost.context for cost in softmax] == [8, 40, 700]
    assert [cost.cache_bytes for cost in softmax] == [2 * 2 * 32 * 4 * tokens for tokens in (8, 40, 700)]
    assert len({cost.cache_bytes for cost in regla}) == 1
    assert all(cost.milliseconds > 0 for cost in softmax + regla)


@pytest.mark.parametrize("layer", ["linear_attention", "full_attention"])
def test_streaming_differs_by_rounding_alone(layer: str) -> None:
    difference = streaming_difference(make_model(layer), torch.randint(50, (1, 90)), chunk=7)
    assert 0 <= difference < 1e-4


def test_a_model_that_forgets_between_chunks_is_found_out() -> None:
    model = make_model("linear_attention")
    forward = model.forward
    model.forward = lambda past_key_values=None, **rest: forward(past_key_values=None, **rest)
    assert streaming_difference(model, torch.randint(50, (1, 90)), chunk=7) > 1e-2


def test_tables() -> None:
    row = {
        "parameters": 1234567,
        "tokens": 8192,
        "validation_perplexity": 87.65,
        "tokens_per_second": 4321,
        "seconds": 9,
    }
    assert comparison({"softmax": row}).splitlines()[1].split() == [
        "softmax",
        "1,234,567",
        "8,192",
        "87.7",
        "4,321",
        "9",
    ]
    costs = {"regla": [DecodingCost(128, 1.5, 2048)], "softmax": [DecodingCost(128, 2.5, 4096)]}
    assert decoding_table(costs).splitlines()[1].split() == ["128", "1.50", "2", "2.50", "4"]


def test_only_its_own_folder_is_replaced(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    notes = tmp_path / "notes.md"
    notes.write_text("mine")
    assert main(["quickstart", "--out", str(tmp_path)]) == 2
    assert "holds something else than a quickstart" in capsys.readouterr().err
    assert main(["quickstart", "--out", str(notes)]) == 2
    assert "is a file" in capsys.readouterr().err
    assert notes.read_text() == "mine"


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "q"
    assert main(["quickstart", "--out", str(out), "--steps", "0"]) == 2
    assert capsys.readouterr().err == "regla: error: --steps is 0, expected a number above 0.\n"
    with pytest.raises(ValueError, match="longest is 100, expected at least 128"):
        quickstart(out=out, longest=100)
    assert not out.exists()


def test_its_models_have_names() -> None:
    """`regla train` knows more mixers than the quickstart compares."""
    assert set(run._COMPARED) <= set(run._TRAINED) <= set(MIXERS) and set(run._TRAINED) == set(run._NAMES)


def test_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    answers = []

    def meanwhile(*args: object, **options: object) -> dict:
        monkeypatch.undo()
        answers.append(main(["quickstart", "--out", str(tmp_path)]))
        return {}

    monkeypatch.setattr(run, "_quickstart", meanwhile)
    quickstart(out=tmp_path)
    assert answers == [2] and f"Another quickstart is at work in {tmp_path}" in capsys.readouterr().err


@pytest.mark.slow
def test_all_of_it_twice(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "q"
    quickstart(out=out, steps=2, longest=128, sample_tokens=3)
    (out / "regla" / "stale").touch()
    result = quickstart(out=out, steps=3, longest=256, sample_tokens=3)
    assert not (out / "regla" / "stale").exists()
    sizes = [result["models"][mixer]["parameters"] for mixer in ("regla", "hybrid", "softmax")]
    assert max(sizes) / min(sizes) < 1.01
    assert {row["tokens"] for row in result["models"].values()} == {3 * 1024}
    assert [(row["tokens"], row["chunk"]) for row in result["streaming"]] == [(256, 1), (2048, 100)]
    assert all(row["max_difference"] < 1e-4 for row in result["streaming"])
    assert [cost["context"] for cost in result["decoding"]["softmax"]] == [128, 256]
    assert json.loads((out / "quickstart.json").read_text())["seconds"] == result["seconds"]
    assert [tokens for tokens, _ in read_losses(out / "softmax")] == [1024, 2048, 3072]
    for plot in ("loss.png", "decoding.png"):
        width, height = struct.unpack(">II", (out / plot).read_bytes()[16:24])
        assert width > 900 and height > 500
    scores = result["linearized"]["scores"]
    assert result["linearized"]["linear_layers"] == list(range(6))
    printed = capsys.readouterr().out
    assert f"Held-out perplexity: {scores['original'][0]['perplexity']:.2f} with softmax attention" in printed
    assert comparison(result["models"]) in printed and "Next:" in printed
