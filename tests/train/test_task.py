"""Training on associative recall: loss and scores are of the answers alone, and runs repeat exactly."""

import json
from pathlib import Path

import pytest
import torch

from regla.cli import main
from regla.models import ReGLAForCausalLM
from regla.runtime.errors import OptionError
from regla.train.config import TrainConfig
from regla.train.material import TaskMaterial
from regla.train.run import train

TINY = {
    "task": "mqar",
    "vocab_size": 64,
    "hidden_size": 16,
    "layers": 2,
    "heads": 2,
    "seq_len": 32,
    "batch_size": 8,
    "steps": 4,
    "device": "cpu",
}


def run(out: Path, **options) -> dict:
    return train(TrainConfig(out=str(out), **TINY | options))


def test_a_run_is_scored_in_every_cell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = run(tmp_path / "m", pairs=(2, 4, 8), gaps=(0, 16))
    assert [(cell["pairs"], cell["gap"]) for cell in summary["recall"]] == [(2, 0), (2, 16), (4, 0), (4, 16), (8, 0)]
    assert [cell["n"] for cell in summary["recall"]] == [256 * pairs for pairs in (2, 2, 4, 4, 8)]
    assert all(cell["by_distance"] and cell["generation"] < 0.3 for cell in summary["recall"])
    mean = sum(cell["nats"] for cell in summary["recall"]) / 5
    assert summary["validation_loss"] == pytest.approx(mean) and summary["task"] == "mqar"
    assert "| 4 pairs, 16 gap | 1,024 |" in capsys.readouterr().out
    saved = json.loads((tmp_path / "m" / "training.json").read_text())
    assert saved["recall"] == json.loads(json.dumps(summary["recall"]))
    model = ReGLAForCausalLM.from_pretrained(tmp_path / "m")
    assert model.config.vocab_size == 64 and not list((tmp_path / "m").glob("tokenizer*"))
    assert (
        main(["eval", str(tmp_path / "m"), "--probes", "mqar", "--lengths", "32", "--limit", "2", "--pairs", "4"]) == 0
    )


def test_a_resumed_run_ends_in_the_same_weights(tmp_path: Path) -> None:
    whole = run(tmp_path / "m", steps=6, pairs=(2,), save_every=2)
    resumed = run(tmp_path / "m", steps=6, pairs=(2,), save_every=2, resume="previous")
    assert resumed["recall"] == whole["recall"]
    assert resumed["train_loss"] == whole["train_loss"]


def test_batches_come_from_their_number_and_the_seed() -> None:
    config = TrainConfig(out="-", **TINY | {"pairs": (2, 4)})
    batches = TaskMaterial(config).batches(torch.device("cpu"))
    assert batches(3).shape == (2, 8, 32) and torch.equal(batches(3), batches(3))
    assert not torch.equal(batches(3), batches(4))
    other = TaskMaterial(TrainConfig(out="-", **TINY | {"pairs": (2, 4), "seed": 1})).batches(torch.device("cpu"))
    assert not torch.equal(batches(3), other(3))


def test_the_loss_is_of_the_answers_alone() -> None:
    """Its gradient reaches the logits of questions, and no others."""
    source = TaskMaterial(TrainConfig(out="-", **TINY | {"pairs": (4,)}))
    both = source.batches(torch.device("cpu"))(0)
    logits = torch.randn(8, 32, 64, requires_grad=True)

    class Fixed(torch.nn.Module):
        def forward(self, input_ids, use_cache):
            return type("Out", (), {"logits": logits})

    loss = source.loss(Fixed(), both)
    loss.backward()
    asked = both[1] != -100
    assert torch.equal(logits.grad.abs().sum(-1) > 0, asked)
    nats = -logits.log_softmax(-1)[asked].gather(1, both[1][asked][:, None])
    assert loss.item() == pytest.approx(nats.mean().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"pairs": (16,)}, "16 pairs and a gap of 0 tokens need 64 tokens"),
        ({"pairs": (0,)}, "pairs is 0, expected a number above 0"),
        ({"data": ("a.txt",)}, "Both task and data are given; a task makes its own sequences"),
        ({"eval_context": 64}, "Both task and eval_context are given"),
        ({"task": None, "gaps": (3,)}, "gaps is given without task"),
        ({"task": "mqra"}, "task is 'mqra', expected one of"),
    ],
)
def test_bad_input(tmp_path: Path, options: dict, sentence: str) -> None:
    with pytest.raises((OptionError, ValueError), match=sentence):
        run(tmp_path / "m", **options)
    assert not (tmp_path / "m").exists()


def test_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--out", str(tmp_path / "m"), "--pairs", "2,4"]) == 2
    assert "--pairs is given without --task" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["softmax", "regla"])
def test_small_models_learn_it(tmp_path: Path, mixer: str) -> None:
    overrides = {
        "initializer_range": 0.15,
        "softmax_conv_kernel_dim": 2,
        "linear_conv_kernel_dim": 2,
        "gate_half_life": [16, 1024],
    }
    summary = run(
        tmp_path / "m",
        mixer=mixer,
        pairs=(2, 4),
        hidden_size=32,
        batch_size=32,
        steps=400,
        lr=1e-2,
        overrides=overrides,
    )
    assert all(cell["generation"] > 0.9 for cell in summary["recall"])
