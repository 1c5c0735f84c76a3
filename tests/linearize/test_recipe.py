"""Stages, presets and the choice of layers through the command: what is trained, kept and resumed."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from regla.cli import main
from regla.linearize.config import BASELINES, LinearizeConfig
from regla.models.student import linear_attention
from regla.runtime.log import TrainingLog, read_log
from tests.linearize.models import command

#: Options of a conversion, and the steps at which it is killed: of 256 tokens each, checkpoints every 2.
RECIPES = {
    "auto": (
        ("--keep", "auto:1", "--tokens", "2560", "--transfer-tokens", "1024", "--long-tokens", "512"),
        [3, 4, 6, 10],
    ),
    "lora": (("--preset", "lora", "--keep", "none", "--tokens", "2048", "--transfer-tokens", "1024"), [3, 7]),
    "paper": (
        ("--preset", "paper", "--mixer", "delta", "--tokens", "1024", "--calibration-tokens", "0"),
        [3],
    ),
}
COMMON = ("--save-every", "2", "--long-seq-len", "128")


def options_of(recipe):
    options, _ = RECIPES[recipe]
    return (*options, *(COMMON if "--long-tokens" in options else COMMON[:2]))


@pytest.fixture(scope="module")
def undisturbed(folder):
    found = {}

    def run(recipe):
        if recipe not in found:
            found[recipe] = folder / f"undisturbed-{recipe}"
            assert main(command(folder, found[recipe], *options_of(recipe))) == 0
        return found[recipe]

    return run


@pytest.mark.parametrize(("recipe", "stopped_at"), [(name, step) for name in RECIPES for step in RECIPES[name][1]])
def test_killed_in_any_stage_it_ends_in_the_same_model(recipe, stopped_at, folder, undisturbed, tmp_path, monkeypatch):
    expected = undisturbed(recipe)
    out = tmp_path / "out"
    write = TrainingLog.__call__

    def killed(log, record):
        write(log, record)
        if record["step"] == stopped_at:
            raise SystemExit(9)

    monkeypatch.setattr(TrainingLog, "__call__", killed)
    with pytest.raises(SystemExit):
        main(command(folder, out, *options_of(recipe)))
    monkeypatch.undo()
    assert main(command(folder, out, *options_of(recipe), "--resume")) == 0
    ours, theirs = (load_file(place / "model.safetensors") for place in (out, expected))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert [r["step"] for r in read_log(out)] == [r["step"] for r in read_log(expected)]
    keys = ("layer_choice", "linear_layers", "divergence", "parameters")
    summaries = [json.loads((place / "linearize.json").read_text()) for place in (out, expected)]
    assert [summaries[0].get(key) for key in keys] == [summaries[1].get(key) for key in keys]


def test_auto_keeps_the_layer_that_wins_most(undisturbed, folder):
    """The ranking is in linearize.json; the folder's model has the original's weights in the layer that was kept."""
    out = undisturbed("auto")
    summary = json.loads((out / "linearize.json").read_text())
    ranking, kept = summary["layer_choice"]["ranking"], summary["layer_choice"]["kept"]
    assert sorted(row["layer"] for row in ranking) == [0, 1]
    assert kept == [max(ranking, key=lambda row: row["score"])["layer"]]
    assert all(row["kl_gain_se"] > 0 and row["recall_gain_se"] > 0 for row in ranking)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert (
        sorted(linear_attention(model)) == summary["linear_layers"] == [layer for layer in (0, 1) if layer not in kept]
    )
    assert summary["parameters"] == sum(p.numel() for p in model.parameters())
    names = [record["stage"] for record in read_log(out)]
    assert names == ["attention transfer"] * 4 + ["distillation"] * 4 + ["long-context tuning"] * 2
    assert "auto:1" in (out / "README.md").read_text()


def test_adapters_are_merged(undisturbed, folder):
    """The folder of a LoRA run holds plain weights: those of the original have moved, and nothing of peft is left."""
    out = undisturbed("lora")
    weights, before = (load_file(place / "model.safetensors") for place in (out, folder / "model"))
    assert not any("lora" in name or "base_layer" in name for name in weights)
    name = "model.layers.0.mlp.down_proj.weight"
    assert not torch.equal(weights[name], before[name])
    for frozen in ("model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(weights[frozen], before[frozen])
    summary = json.loads((out / "linearize.json").read_text())
    assert summary["divergence"]["trained"]["mean"] < summary["divergence"]["converted"]["mean"]


def test_the_paper_preset_is_swap_and_cross_entropy(undisturbed):
    out = undisturbed("paper")
    summary = json.loads((out / "linearize.json").read_text())
    assert list(summary["stages"]) == ["cross-entropy"] and summary["calibration"] == []
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.mixer["update_rule"] == "delta" and model.config.mixer["feature_map"] == "unit_safe_exp"
    assert model.config.mixer["gate_half_life"] == 14.0
    original = summary["scores"]["original"][0]["loss"]
    first = summary["stages"]["cross-entropy"]["first_loss"]
    assert first > 0.5 * original  # a cross-entropy, no divergence
    default = LinearizeConfig(model="m", out="o", preset="paper")
    assert (default.calibration_tokens, default.gate_start) == (0, 14.0)
    assert LinearizeConfig(model="m", out="o").gate_start == "teacher"


def test_the_original_trained_on_the_same_text(folder, tmp_path):
    """--keep all --preset paper: the control of a conversion. Every layer stays, and the text is learnt."""
    out = tmp_path / "out"
    assert main(command(folder, out, "--keep", "all", "--preset", "paper", "--tokens", "1024")) == 0
    model = AutoModelForCausalLM.from_pretrained(out)
    assert not linear_attention(model) and model.config.linear_layers == []
    before = load_file(folder / "model" / "model.safetensors")
    after = load_file(out / "model.safetensors")
    assert after.keys() == before.keys() and not torch.equal(after["model.norm.weight"], before["model.norm.weight"])


def test_resuming_with_other_settings(folder, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(TrainingLog, "__call__", lambda log, record: (_ for _ in ()).throw(SystemExit(9)))
    with pytest.raises(SystemExit):
        main(command(folder, out, "--tokens", "1024"))
    monkeypatch.undo()
    for more, message in (
        (("--tokens", "2048"), "--tokens 1024, but this one has --tokens 2048"),
        (("--tokens", "1024", "--mixer", "delta"), "--mixer None, but this one has --mixer delta"),
        (("--tokens", "1024", "--gate-start", "14"), "--gate-start teacher, but this one has --gate-start 14.0"),
        (("--tokens", "1024", "--preset", "lora"), "--preset distill, but this one has --preset lora"),
    ):
        assert main(command(folder, out, *more, "--resume")) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ("auto", "--keep is 'auto'; expected a number of layers or a share, auto:7 or auto:25%"),
        ("auto:0", "--keep auto:0 keeps 0 of 2 layers; expected 1 to 1"),
        ("auto:2", "--keep auto:2 keeps 2 of 2 layers; expected 1 to 1"),
        ("auto:120%", "--keep auto:120% keeps 2 of 2 layers"),
    ],
)
def test_auto_of_too_many_layers(keep, message, folder, tmp_path, capsys):
    assert main(command(folder, tmp_path / "out", "--keep", keep, "--tokens", "1024")) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_adapters_without_peft(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("regla.runtime.install.installed", lambda package: package != "peft")
    assert main(command(folder, tmp_path / "out", "--preset", "lora", "--tokens", "1024")) == 2
    assert "preset lora needs the package peft, which is not installed" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("mixer", BASELINES)
def test_the_baselines_of_the_paper_go_through_the_same_recipe(mixer, folder, tmp_path):
    out = tmp_path / "out"
    arguments = command(folder, out, "--mixer", mixer, "--keep", "none", "--tokens", "1024", "--transfer-tokens", "512")
    place = arguments.index("--calibration-tokens")
    assert main(arguments[:place] + arguments[place + 2 :]) == 0  # none by default
    model = AutoModelForCausalLM.from_pretrained(out)
    options = model.config.mixer
    assert (options["attention_norm"], options["qk_calibration"]) == ("layernorm", False)
    assert (options["feature_map"], options["gate"], options["gate_axis"], options["gate_half_life"]) == {
        "relu": ("relu", "none", "key", None),
        "hedgehog": ("hedgehog", "none", "key", None),
        "scalar": ("relu", "scalar", "key", 14.0),
        "fast_decay": ("identity", "fast_decay", "key", 14.0),
        "paper": ("safe_exp", "refined", "value", 14.0),
    }[mixer]
    summary = json.loads((out / "linearize.json").read_text())
    assert list(summary["stages"]) == ["attention transfer", "distillation"] and summary["calibration"] == []
    if mixer == "hedgehog":
        weight = next(iter(linear_attention(model).values())).mixer.feature_map.q_weight
        assert not torch.equal(weight, torch.eye(weight.shape[-1]).expand_as(weight))  # it trains


def test_baselines_without_gates_have_no_start_and_no_calibration(folder, tmp_path, capsys):
    assert main(command(folder, tmp_path / "out", "--mixer", "relu", "--gate-start", "14")) == 2
    assert "--gate-start is given, but --mixer relu has no gate; leave it out" in capsys.readouterr().err
    assert main(command(folder, tmp_path / "out", "--mixer", "hedgehog")) == 2  # with --calibration-tokens 1024
    assert "calibration is for 'safe_exp' or 'unit_safe_exp'; go without it" in capsys.readouterr().err


def test_options_of_the_mixer_in_a_file(folder, tmp_path, capsys):
    """Controls: another feature map or gate in the mixers' place."""
    (tmp_path / "relu.json").write_text('{"feature_map": "relu", "gate": "fast_decay"}')
    options = ("--config", str(tmp_path / "relu.json"))
    assert main(command(folder, tmp_path / "out", *options)) == 2
    assert "feature_map is 'relu', and calibration is for 'safe_exp' or 'unit_safe_exp'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    without = [*command(folder, tmp_path / "out", *options)]
    without[without.index("--calibration-tokens") + 1] = "0"
    assert main(without) == 0
    mixer = json.loads((tmp_path / "out" / "config.json").read_text())["mixer"]
    assert (mixer["feature_map"], mixer["gate"], mixer["gate_half_life"]) == ("relu", "fast_decay", 14.0)
