"""`--init`: a converted model is distilled further, or further layers of it become linear."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

from regla.cli import main
from regla.models import ReGLAConfig, ReGLAForCausalLM
from regla.runtime.log import TrainingLog
from tests.linearize.models import command, llama


@pytest.fixture(scope="module")
def hybrid(folder):
    """Layer 1 of two is softmax."""
    out = folder / "hybrid"
    assert main(command(folder, out, "--keep", "every-2", "--tokens", "7680", "--lr", "3e-3")) == 0
    return out


def weights(place):
    return load_file(place / "model.safetensors")


def moved(name):
    """Where a weight is once layer 1 is linear."""
    return name.replace("layers.1.self_attn.", "layers.1.self_attn.mixer.")


def summary_of(place):
    return json.loads((place / "linearize.json").read_text())


def test_distilled_further(folder, converted, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(command(folder, out, "--init", str(converted), "--tokens", "10240", "--lr", "1e-3")) == 0
    assert "2 of them ReGLA; none is new" in capsys.readouterr().out
    before, after = summary_of(converted), summary_of(out)
    assert after["stages"].keys() == {"distillation"}
    assert after["scores"]["converted"] == before["scores"]["trained"]  # it starts where the first round ended
    assert after["scores"]["trained"][0]["loss"] < after["scores"]["converted"][0]["loss"]
    assert after["linear_layers"] == [0, 1] and after["transfer_error"] is None
    card = (out / "README.md").read_text()
    assert "The weights are those of `converted`" in card and "## Calibration" not in card


def test_further_layers(folder, hybrid, tmp_path, capsys):
    """The layer that was softmax is checked, calibrated and learns; before its training nothing else has changed."""
    out = tmp_path / "out"
    assert main(command(folder, out, "--init", str(hybrid), "--keep", "none")) == 0
    assert "reproduces the original's logits to" in capsys.readouterr().out
    summary = summary_of(out)
    assert summary["linear_layers"] == [0, 1] and [row["layer"] for row in summary["calibration"]] == [1]
    assert summary["transfer_error"] < 1e-4
    ours, theirs = weights(out), weights(hybrid)
    assert all(torch.equal(ours[moved(name)], value) for name, value in theirs.items())
    assert {name.split(".self_attn.")[0] for name in ours.keys() - theirs.keys()} == {"model.layers.1"}

    trained = tmp_path / "trained"
    assert (
        main(command(folder, trained, "--init", str(hybrid), "--keep", "none", "--tokens", "23040", "--lr", "3e-3"))
        == 0
    )
    stages = summary_of(trained)["stages"]
    assert {name: row["steps"] for name, row in stages.items()} == {"attention transfer": 30, "distillation": 60}
    assert all(row["last_loss"] < row["first_loss"] for row in stages.values())


def test_attention_transfer_leaves_the_first_rounds_layers_alone(folder, hybrid, tmp_path):
    out = tmp_path / "out"
    options = ("--init", str(hybrid), "--keep", "none", "--tokens", "768", "--transfer-tokens", "768")
    assert main(command(folder, out, *options)) == 0
    ours, theirs = weights(out), weights(hybrid)
    changed = {name for name, value in theirs.items() if not torch.equal(ours[moved(name)], value)}
    assert changed and all(name.startswith("model.layers.1.self_attn") for name in changed)


def test_resume(folder, hybrid, tmp_path, monkeypatch):
    options = ("--init", str(hybrid), "--keep", "none", "--tokens", "1536", "--save-every", "2")
    assert main(command(folder, tmp_path / "undisturbed", *options)) == 0
    write = TrainingLog.__call__

    def killed(log, record):
        write(log, record)
        if record["step"] == 5:
            raise SystemExit(9)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(TrainingLog, "__call__", killed)
        main(command(folder, tmp_path / "out", *options))
    assert main(command(folder, tmp_path / "out", *options, "--resume")) == 0
    ours, theirs = weights(tmp_path / "out"), weights(tmp_path / "undisturbed")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "--init without --tokens or --keep changes nothing"),
        (["--keep", "0"], "--keep 0 keeps layer 0, which is linear in HYBRID already"),
        (["--keep", "1"], "--keep 1 makes no further layer of HYBRID linear"),
        (["--keep", "5"], "--keep names layer 5; the model has layers 0 to 1"),
    ],
)
def test_what_cannot_be(folder, hybrid, more, message, tmp_path, capsys):
    assert main(command(folder, tmp_path / "out", "--init", str(hybrid), *more)) == 2
    assert message.replace("HYBRID", str(hybrid)) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_folders_that_do_not_fit(folder, hybrid, tmp_path, capsys):
    def refused(*words):
        assert main(command(folder, tmp_path / "out", *words)) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    steps = ("--tokens", "768")
    assert f"{tmp_path} holds no model to go on from; give --init" in refused("--init", str(tmp_path), *steps)
    assert "holds a model of type 'llama'" in refused("--init", str(folder / "model"), *steps)
    ReGLAForCausalLM(ReGLAConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2)).save_pretrained(
        tmp_path / "earlier"
    )
    assert "convert the original again" in refused("--init", str(tmp_path / "earlier"), *steps)
    other = tmp_path / "other"
    llama(num_hidden_layers=3).save_pretrained(other / "model")
    from regla.linearize import convert

    convert(llama(num_hidden_layers=3)).save_pretrained(other / "converted")
    assert re.search(r"has num_hidden_layers 3, but .* has 2", refused("--init", str(other / "converted"), *steps))
    words = command(folder, tmp_path / "out", *steps)
    words[1] = str(hybrid)
    assert main(words) == 2
    assert "of type 'regla_llama' already; give its original, and this folder with --init" in capsys.readouterr().err
