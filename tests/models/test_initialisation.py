"""Every parameter of the model by name, and the distribution it starts from."""

import re
from dataclasses import replace

import pytest
import torch

from regla.layers.defaults import ADDITIVE, DELTA
from regla.models import ReGLAConfig, ReGLAForCausalLM
from regla.models.configuration import mixer_arguments

STD = 0.03
QK_STD = 0.125  # of the linear layer, which is the first

BIASED_DELTA = replace(DELTA, gate_half_life=None)

# The first pattern that matches a name decides.
DISTRIBUTIONS = {
    r"model\.embed_tokens\.weight": ("normal", STD),
    r"lm_head\.weight": ("normal", STD),
    r"model\.norm\.weight": ("constant", 1.0),
    r"model\.layers\.\d\.(input|post_attention)_layernorm\.weight": ("constant", 1.0),
    r"model\.layers\.\d\.mlp\.(gate|up|down)_proj\.weight": ("normal", STD),
    r"model\.layers\.\d\.mlp\.(gate|up|down)_proj\.bias": ("constant", 0.0),
    r"model\.layers\.0\.self_attn\.[qk]_proj\.weight": ("normal", QK_STD),
    r"model\.layers\.\d\.self_attn\.[qkvo]_proj\.weight": ("normal", STD),
    r"model\.layers\.\d\.self_attn\.[qkvo]_proj\.bias": ("constant", 0.0),
    r"model\.layers\.\d\.self_attn\.conv\.weight": ("normal", STD),
    r"model\.layers\.\d\.self_attn\.output_gate\.weight": ("normal", STD),
    r"model\.layers\.\d\.self_attn\.[qk]_norm\.weight": ("constant", 1.0),
    r"model\.layers\.\d\.self_attn\.qk_calibration\.[qk]_mean": ("constant", 0.0),
    r"model\.layers\.\d\.self_attn\.qk_calibration\.[qk]_scale": ("constant", 1.0),
    r"model\.layers\.\d\.self_attn\.norm\.weight": ("constant", 1.0),
    r"model\.layers\.\d\.self_attn\.norm\.bias": ("constant", 0.0),
    r"model\.layers\.\d\.self_attn\.rule\.beta_proj\.weight": ("normal", STD),
    r"model\.layers\.\d\.self_attn\.rule\.beta_proj\.bias": ("constant", 0.0),
    r"model\.layers\.\d\.self_attn\.gate\.refine_proj\.bias": ("constant", 0.75),
    r"model\.layers\.\d\.self_attn\.gate\.\w+\.bias": ("constant", -1.25),
    r"model\.layers\.\d\.self_attn\.gate\.\w+\.weight": ("normal", STD),
}


def build(mixer=ADDITIVE, **overrides):
    config = ReGLAConfig(
        **mixer_arguments(mixer) | {"gate_bias": -1.25, "refine_bias": 0.75} | overrides,
        vocab_size=400,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["linear_attention", "full_attention"],
        initializer_range=STD,
        qk_initializer_range=QK_STD,
        pad_token_id=3,
    )
    torch.manual_seed(0)
    return ReGLAForCausalLM(config)


def check(name, parameter):
    kind, value = next((d for pattern, d in DISTRIBUTIONS.items() if re.fullmatch(pattern, name)), (None, None))
    assert kind is not None, f"{name} is not in the list"
    parameter = parameter.detach()
    if kind == "constant":
        assert torch.equal(parameter, torch.full_like(parameter, value)), name
        return
    # 4.5 standard errors of a normal sample's mean and standard deviation, and no value beyond 5.5 of them.
    n = parameter.numel()
    assert abs(parameter.mean().item()) < 4.5 * value / n**0.5, name
    assert abs(parameter.std().item() / value - 1) < 4.5 / (2 * n) ** 0.5, name
    assert parameter.abs().max() < 5.5 * value, name
    assert parameter.unique().numel() > 0.9 * n, name


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"qk_norm": True, "attention_norm": "layernorm", "attention_bias": True, "mlp_bias": True, "gate_axis": "both"},
        {"gate": "sigmoid", "linear_conv_kernel_dim": 4, "qk_norm": False, "output_gate": None},
        {"gate": "fast_decay", "output_gate": "sigmoid"},
        {"gate": "gla"},
        {"gate": "scalar", "attention_norm": "sum"},
        {"gate": "none", "attention_norm": "none", "qk_calibration": True},
        {
            "softmax_conv_kernel_dim": 4,
            "softmax_qk_norm": True,
            "softmax_output_gate": "silu",
            "softmax_output_norm": True,
        },
        {"tie_word_embeddings": True},
        {"mixer": BIASED_DELTA},
    ],
    ids=lambda overrides: (
        "delta" if "mixer" in overrides else ", ".join(f"{k}={v}" for k, v in overrides.items()) or "default"
    ),
)
def test_every_parameter_starts_where_the_list_says(overrides):
    model = build(**overrides)
    for name, parameter in model.named_parameters():
        check(name, parameter)


def test_the_list_has_no_name_too_many():
    names = [
        name
        for overrides in (
            {"linear_conv_kernel_dim": 4, "attention_norm": "layernorm", "attention_bias": True, "mlp_bias": True},
            {"qk_calibration": True},
            {"mixer": BIASED_DELTA},
        )
        for name, _ in build(**overrides).named_parameters()
    ]
    for pattern in DISTRIBUTIONS:
        assert any(re.fullmatch(pattern, name) for name in names), pattern


def test_a_wrong_start_is_noticed():
    for name, spoil in {
        "model.layers.0.self_attn.gate.proj.bias": lambda p: p.add_(1e-3),
        "model.layers.0.self_attn.q_proj.weight": lambda p: p.mul_(1.2),
        "model.layers.0.mlp.up_proj.weight": lambda p: p.add_(0.01),
    }.items():
        parameter = build().get_parameter(name)
        with torch.no_grad():
            spoil(parameter)
        with pytest.raises(AssertionError):
            check(name, parameter)


def spread(**overrides):
    """The biases of the forget gate of each linear layer."""
    layers = ["linear_attention", "full_attention", "linear_attention", "linear_attention"]
    config = ReGLAConfig(
        **mixer_arguments(ADDITIVE) | {"gate_axis": "both"} | overrides,
        vocab_size=40,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        layer_types=layers,
    )
    model = ReGLAForCausalLM(config)
    return [layer.self_attn.gate.proj.bias.detach() for layer in model.model.layers if layer.is_linear]


def bias_of(half_life):
    """logit(2^(-1/n))."""
    return torch.logit(2 ** (-1 / torch.as_tensor(half_life, dtype=torch.float64))).float()


def test_half_lives_over_channels_or_one_for_all():
    for bias in spread(gate_half_life=[2, 128]):
        torch.testing.assert_close(bias, bias_of([2 * 64 ** (i / 15) for i in range(16)]).repeat(4))
    for bias in spread(gate_half_life=5):
        torch.testing.assert_close(bias, bias_of(5).expand(64))


def test_the_same_seed_gives_the_same_model():
    for (name, one), other in zip(build().named_parameters(), build().parameters(), strict=True):
        assert torch.equal(one, other), name
