"""Figures of what a model does inside, against values known beforehand."""

import json
import math
from dataclasses import replace

import pytest
import torch

from regla.cli import main
from regla.data.embedded import embedded_text
from regla.data.tokenizer import train_tokenizer
from regla.eval.inspection import look_inside
from regla.layers.defaults import ADDITIVE, DELTA
from regla.models import ReGLAConfig, ReGLAForCausalLM
from regla.models.configuration import mixer_arguments

L, F = "linear_attention", "full_attention"


def make(layer_types=(L, L), **options) -> ReGLAForCausalLM:
    torch.manual_seed(0)
    config = ReGLAConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=len(layer_types),
        num_attention_heads=2,
        layer_types=list(layer_types),
        **mixer_arguments(ADDITIVE) | options,
    )
    return ReGLAForCausalLM(config).eval()


IDS = torch.randint(300, (1, 90), generator=torch.Generator().manual_seed(0))


def constant_gate(model: ReGLAForCausalLM, F: float) -> None:
    """Every forget gate F, whatever the input: of a plain gate, sigmoid(bias)."""
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.gate.proj.weight)
        torch.nn.init.constant_(layer.self_attn.gate.proj.bias, math.log(F / (1 - F)))


@pytest.mark.parametrize(("F", "low", "high"), [(0.51, 0, 0), (0.995, 0, 1), (0.005, 1, 0)])
def test_gates_that_are_known(F: float, low: int, high: int) -> None:
    model = make(gate="sigmoid")
    constant_gate(model, F)
    for layer in look_inside(model, IDS, chunk=32):
        assert (layer.saturated_low["key"], layer.saturated_high["key"]) == (low, high)
        assert layer.half_lives["key"] == [pytest.approx(math.log(2) / -math.log(F), rel=1e-4)] * 2
        assert sum(layer.histogram["key"]) == pytest.approx(1)
        assert layer.histogram["key"].index(max(layer.histogram["key"])) == int(F * 50)


def test_the_half_life_a_model_starts_with() -> None:
    """The start of refined gates, both of whose logits count."""
    (layer, _) = look_inside(make(gate_half_life=100, initializer_range=1e-4), IDS)
    assert layer.half_lives["key"] == [pytest.approx(100, rel=0.02)] * 2


def test_features_in_use() -> None:
    """Keys of zero use all features alike; one large channel is one feature; two that take turns are two."""
    for gains, effective in (([0.0] * 16, 16), ([40.0] + [0.0] * 15, None)):
        model = make()
        for layer in model.model.layers:
            layer.self_attn.k_norm.weight.data = torch.tensor(gains)
        found = look_inside(model, IDS)[0].effective_features
        if effective is not None:
            assert found == [pytest.approx(effective)] * 2
        else:  # a channel that is now far above, now far below the others: one feature and 15, half of the time each
            assert all(2 < value < 12 for value in found)


def test_the_norm_is_that_of_the_state() -> None:
    model = make()
    out = model(IDS, use_cache=True)
    for number, layer in enumerate(look_inside(model, IDS, chunk=90)):
        state = out.past_key_values.layers[number].read()
        assert layer.state_norms == [
            (90, pytest.approx(float((state.S * state.m.exp()[..., None, None]).norm()), rel=1e-4))
        ]


@pytest.mark.parametrize(
    "options",
    [
        {"gate_axis": "both"},
        {"qk_norm": False, "linear_conv_kernel_dim": 3},
        {"qk_calibration": True},
        {"num_key_value_heads": 1},
        {"gate": "none"},
        {"gate": "scalar"},
        {"gate": "fast_decay"},
        {"feature_map": "relu", "attention_norm": "sum"},
        mixer_arguments(DELTA),
        mixer_arguments(replace(DELTA, gate="mamba2", gate_half_life=None, feature_map="unit_identity")),
        {"layer_types": (L, F, L)},
    ],
    ids=str,
)
def test_every_kind_of_layer(options: dict) -> None:
    """Chunks add up to the whole, and nothing stays behind in the model."""
    model = make(**options)
    whole, parts = look_inside(model, IDS, chunk=90), look_inside(model, IDS, chunk=16)
    for one, other in zip(whole, parts, strict=True):
        assert one.saturated_low == other.saturated_low
        assert one.effective_features == pytest.approx(other.effective_features, rel=1e-3)
        assert bool(one.effective_features) == ("safe_exp" in options.get("feature_map", "safe_exp"))
        assert [tokens for tokens, _ in other.state_norms] == [16, 32, 48, 64, 80, 90]
        assert one.state_norms[-1][1] == pytest.approx(other.state_norms[-1][1], rel=1e-3)
        assert set(one.half_lives) == {
            "none": set(), "scalar": {"key"}, "fast_decay": {"key", "value"}
        }.get(options.get("gate"), {"key", "value"} if options.get("gate_axis") == "both" else {"key"})  # fmt: skip
    assert [layer.layer for layer in whole] == [n for n, kind in enumerate(model.config.layer_types) if kind == L]
    assert not any(module._forward_hooks for module in model.modules() if "Attention" in type(module).__name__)


def save(model: ReGLAForCausalLM, folder) -> str:
    model.save_pretrained(folder)
    train_tokenizer(embedded_text().documents[:3], 300).save_pretrained(folder)
    return str(folder)


def test_the_command(tmp_path, capsys) -> None:
    folder = save(make((L, F), gate_axis="both"), tmp_path / "model")
    assert main(["inspect", folder, "--tokens", "700", "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "1 linear layers over 700 tokens of text." in shown and "| 0 | key | 0.0% |" in shown
    assert "![Gates, half-lives, features and states](inspection.png)" in (tmp_path / "out/inspection.md").read_text()
    assert (tmp_path / "out/inspection.png").stat().st_size > 10_000
    (layer,) = json.loads((tmp_path / "out/inspection.json").read_text())["layers"]
    assert layer["heads"] == 2 and [tokens for tokens, _ in layer["state_norms"]] == [512, 700]


def test_bad_input(tmp_path, capsys) -> None:
    folder = save(make((F,)), tmp_path / "softmax")
    assert main(["inspect", folder]) == 2
    assert "has no linear layers to look into; give a model with ReGLA layers" in capsys.readouterr().err
    assert main(["inspect", folder, "--tokens", "1"]) == 2
    assert "--tokens is 1, expected 2 or more" in capsys.readouterr().err
