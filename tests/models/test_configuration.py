import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from regla.layers.defaults import ADDITIVE, DEFAULTS
from regla.models import ReGLAConfig, ReGLAModel, configuration
from regla.models.configuration import mixer_arguments

SHAPE = {"hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2}


def test_round_trip(tmp_path):
    config = ReGLAConfig(
        **mixer_arguments(replace(ADDITIVE, gate_axis="both", output_gate=None, gate_half_life=(2, 64.5))),
        hidden_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=3,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        value_head_dim=20,
        qk_initializer_range=0.125,
        softmax_conv_kernel_dim=4,
        softmax_output_gate="silu",
        rope_parameters={"rope_type": "default", "rope_theta": 1234.0},
        dtype="bfloat16",
    )
    config.save_pretrained(tmp_path)
    again = ReGLAConfig.from_pretrained(tmp_path)
    for name, value in config.to_dict().items():
        if name not in ("_name_or_path", "transformers_version"):
            assert again.to_dict()[name] == value, name
    assert (again.gate_axis, again.output_gate, again.value_head_dim) == ("both", None, 20)
    assert (again.gate_half_life, again.qk_initializer_range) == ([2, 64.5], 0.125)
    assert (again.softmax_conv_kernel_dim, again.softmax_output_gate) == (4, "silu")
    assert again.rope_parameters["rope_theta"] == 1234.0
    assert again.dtype == torch.bfloat16


def test_defaults():
    config = ReGLAConfig(hidden_size=48, num_attention_heads=4, num_hidden_layers=3)
    assert config.layer_types == ["linear_attention"] * 3
    assert (config.num_key_value_heads, config.head_dim, config.value_head_dim) == (4, 12, 12)
    assert (config.feature_map, config.gate, config.gate_axis, config.key_max) == (
        "safe_exp",
        "refined",
        "key",
        "decay",
    )
    assert (config.attention_norm, config.linear_conv_kernel_dim, config.output_gate) == ("rmsnorm", 0, "silu")
    assert (config.linear_rope, config.qk_norm, config.gate_bias, config.refine_bias) == (False, True, 0.0, 0.0)
    assert (config.gate_half_life, config.qk_initializer_range) == (None, None)
    assert (config.softmax_conv_kernel_dim, config.softmax_output_gate) == (0, None)
    assert (config.softmax_qk_norm, config.softmax_output_norm) == (False, False)


def test_the_defaults_are_those_of_the_layer(monkeypatch):
    config = ReGLAConfig(hidden_size=48, num_attention_heads=4, num_hidden_layers=3)
    for name, value in mixer_arguments(DEFAULTS).items():
        assert getattr(config, name) == (6 if name == "gate_low_rank_dim" else value), name  # 48 / 8
    assert ReGLAConfig(**SHAPE, gate_low_rank_dim=5).gate_low_rank_dim == 5
    mixer = replace(DEFAULTS, gate_half_life=(1, 256))
    assert mixer_arguments(mixer)["gate_half_life"] == [1, 256]
    monkeypatch.setattr(configuration, "DEFAULTS", mixer)
    assert ReGLAConfig(num_hidden_layers=1).gate_half_life == [1, 256]
    assert ReGLAConfig(num_hidden_layers=1, gate_half_life=None).gate_half_life is None


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            {"num_hidden_layers": 2, "layer_types": ["linear_attention", "chunked_attention"]},
            "layer_types[1] is 'chunked_attention'; expected one of 'linear_attention', 'full_attention', 'sliding_",
        ),
        (
            {"num_hidden_layers": 1, "layer_types": ["mamba"]},
            "layer_types[0] is 'mamba'; expected one of 'linear_attention', 'full_attention', 'sliding_attention'",
        ),
        (
            {"num_hidden_layers": 3, "layer_types": ["linear_attention"]},
            "layer_types has 1 entries; expected one for each of the 3 layers: change layer_types or num_hidden_layers",
        ),
        ({"feature_map": "exp"}, "feature_map is 'exp'; expected one of 'safe_exp', "),
        ({"gate": "forget"}, "gate is 'forget'; expected one of "),
        ({"gate_axis": "time"}, "gate_axis is 'time'; expected one of 'value', 'key', 'both'"),
        ({"key_max": "global"}, "key_max is 'global'; expected one of 'decay', 'running', 'sequence'"),
        ({"attention_norm": "batch"}, "attention_norm is 'batch'; expected one of "),
        ({"output_gate": "tanh"}, "output_gate is 'tanh'; expected one of None, 'silu', 'sigmoid'"),
        ({"backend": "cuda"}, "backend is 'cuda'; expected one of 'auto', "),
        (
            {"num_attention_heads": 4, "num_key_value_heads": 3},
            "num_attention_heads is 4; expected a multiple of num_key_value_heads = 3",
        ),
        ({"hidden_size": 0}, "hidden_size is 0; expected a whole number above 0"),
        ({"linear_conv_kernel_dim": 1}, "linear_conv_kernel_dim is 1; expected at least 2 taps, or 0 for none"),
        ({"softmax_conv_kernel_dim": -1}, "softmax_conv_kernel_dim is -1; expected at least 2 taps, or 0 for none"),
        ({"softmax_output_gate": "tanh"}, "softmax_output_gate is 'tanh'; expected one of None, 'silu', 'sigmoid'"),
        ({"qk_initializer_range": 0.0}, "qk_initializer_range is 0.0; expected a number above 0, or None for"),
        (
            {"gate_half_life_over": "layers"},
            "gate_half_life_over is 'layers', which was removed after git revision e07f40d: use regla of that revision",
        ),
        ({"gate_half_life_over": "time"}, "gate_half_life_over is 'time'; expected one of 'channels', 'heads'"),
        (
            {"gate": "sigmoid", "gate_axis": "head", "gate_half_life": [1, 8]},
            "gate_half_life is [1, 8], but a scalar gate has one channel a head: give one number of tokens",
        ),
        ({"gate": "mamba2", "gate_half_life": 8}, "gate_half_life is 8, but a Mamba2Gate has a start of its own"),
        ({"beta_max": 2}, "beta_max is 2 and update_rule 'additive', which has no beta: use update_rule='delta'"),
        (
            {"update_rule": "delta"},
            "update_rule is 'delta' and feature_map 'safe_exp', whose keys have no fixed length",
        ),
        (
            {"update_rule": "delta", "feature_map": "unit_silu", "gate_axis": "both"},
            "gate_axis is 'both', and update_rule is 'delta', which decays the key axis alone: use gate_axis='key'",
        ),
        (
            {"update_rule": "delta", "feature_map": "unit_silu", "beta_max": 3.0},
            "beta_max is 3.0; expected a number above 0 and up to 2",
        ),
        ({"gate_half_life": [1, 2, 3]}, "gate_half_life is [1, 2, 3]; expected a number of tokens above 0 or a pair"),
        (
            {"gate_half_life": 16, "gate_bias": 2.0},
            "gate_bias is 2.0 and gate_half_life 16, which sets the start itself: leave one out",
        ),
        ({"head_dim": 15, "linear_rope": True}, "head_dim is 15; RoPE turns pairs of channels: make it even"),
        (
            {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.25}},
            "partial_rotary_factor in rope_parameters is 0.25",
        ),
    ],
)
def test_bad_values(arguments, sentence):
    with pytest.raises(ValueError) as error:
        ReGLAConfig(**{**SHAPE, **mixer_arguments(ADDITIVE), **arguments})
    assert str(error.value).startswith(sentence)


def test_values_changed_later_are_checked_by_the_model(build):
    config = build("pure").config
    config.num_hidden_layers = 3
    with pytest.raises(ValueError, match="layer_types has 2 entries; expected one for each of the 3 layers"):
        ReGLAModel(config)


AUTO = "from transformers import AutoConfig, AutoModelForCausalLM"

ORDERS = {
    "regla first": f"import regla.models; {AUTO}",
    "transformers first": f"{AUTO}; import regla.models",
    "generation, which imports the Auto classes, first": f"import transformers.generation.utils, regla.models; {AUTO}",
    "by a name of the package": f"from regla import ReGLAForCausalLM; {AUTO}",
}
#: By other tests, and by the order with generation, which imports transformers first, too.
COVERED = ("regla first", "by a name of the package", "transformers first")


@pytest.mark.parametrize("order", [pytest.param(name, marks=[pytest.mark.slow] * (name in COVERED)) for name in ORDERS])
def test_importing_the_models_registers_them(order, tmp_path):
    """Whichever is imported first, Auto classes know the model type."""
    config = ReGLAConfig(hidden_size=8, num_attention_heads=1, num_hidden_layers=1, vocab_size=5, intermediate_size=8)
    (tmp_path / "config.json").write_text(json.dumps({**config.to_dict(), "dtype": "float32"}, default=str))
    program = f"""
{ORDERS[order]}
config = AutoConfig.from_pretrained({str(tmp_path)!r})
print(type(config).__module__, type(AutoModelForCausalLM.from_config(config)).__name__)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["regla.models.configuration", "ReGLAForCausalLM"], done.stderr


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("hidden_act", "siluu", "hidden_act is 'siluu'; expected an activation of transformers such as 'silu'"),
        ("initializer_range", float("nan"), "initializer_range is nan; expected a number from 0 on"),
        ("initializer_range", -1.0, "initializer_range is -1.0; expected a number from 0 on"),
    ],
)
def test_values_that_no_model_can_be_built_from(name: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ReGLAConfig(**{name: value})


def test_a_name_that_a_user_adds_is_known(monkeypatch):
    from regla.layers.feature_maps import FEATURE_MAPS, ReLU

    monkeypatch.setitem(FEATURE_MAPS, "mine", ReLU)
    assert ReGLAConfig(hidden_size=48, num_attention_heads=4, feature_map="mine").feature_map == "mine"
