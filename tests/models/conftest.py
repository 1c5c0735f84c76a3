"""Small models whose gates, features and positions matter: with the usual start every output is near an average."""

import pytest
import torch
from torch import nn

from regla.layers.defaults import ADDITIVE
from regla.models import ReGLAConfig, ReGLAForCausalLM
from regla.models.configuration import mixer_arguments

TINY = {
    **mixer_arguments(ADDITIVE),
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}

L, F, W = "linear_attention", "full_attention", "sliding_attention"

VARIANTS = {
    "pure": {},
    "pure, delta": {
        "update_rule": "delta",
        "feature_map": "unit_safe_exp",
        "gate": "refined_low_rank",
        "gate_low_rank_dim": 4,
        "num_key_value_heads": 2,
        "linear_conv_kernel_dim": 4,
        "linear_conv_activation": "silu",
    },
    "pure, branch": {
        "linear_rope": True,
        "linear_conv_kernel_dim": 4,
        "value_head_dim": 10,
        "window_branch": 5,
        "window_sinks": 2,
    },
    "pure, rope": {"linear_rope": True, "qk_norm": False, "output_gate": None},
    "pure, 3 heads, both axes": {
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "value_head_dim": 10,
        "gate_axis": "both",
        "linear_conv_kernel_dim": 4,
        "attention_norm": "layernorm",
        "attention_bias": True,
    },
    "hybrid": {
        "num_hidden_layers": 4,
        "layer_types": [L, F, L, F],
        "linear_conv_kernel_dim": 4,
        "qk_norm": False,
    },
    "hybrid, rope": {
        "layer_types": [F, L],
        "linear_rope": True,
        "gate_axis": "key",
        "qk_norm": False,
        "qk_calibration": True,
        "attention_bias": True,
        "attention_out_bias": False,
    },
    "hybrid, sum": {
        "num_hidden_layers": 3,
        "layer_types": [L, L, F],
        "linear_rope": True,
        "linear_conv_kernel_dim": 3,
        "attention_norm": "sum",
        "output_gate": "sigmoid",
    },
    "hybrid, extras": {
        "layer_types": [L, F],
        "qk_initializer_range": 0.2,
        "gate_half_life": [2, 32],
        "softmax_conv_kernel_dim": 3,
        "softmax_output_gate": "silu",
    },
    "hybrid, delta": {
        "layer_types": [L, F],
        "update_rule": "delta",
        "feature_map": "unit_identity",
        "beta_max": 2.0,
        "gate": "mamba2",
        "value_head_dim": 7,
        "softmax_rope": False,
    },
    "window": {"layer_types": [W, W], "sliding_window": 8},
    "hybrid, window": {
        "num_hidden_layers": 3,
        "layer_types": [L, W, F],
        "sliding_window": 5,
        "softmax_conv_kernel_dim": 3,
    },
    "softmax, extras": {
        "layer_types": [F, F],
        "softmax_conv_kernel_dim": 4,
        "softmax_qk_norm": True,
        "softmax_output_gate": "sigmoid",
        "softmax_output_norm": True,
    },
}


def stir(model: nn.Module) -> nn.Module:
    """Parameters large enough that forgetting, features and positions all show in the logits."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
            elif "embed_tokens" in name:
                parameter.normal_()
            elif parameter.ndim == 1:
                parameter.normal_(std=0.5)
            else:
                parameter.normal_(std=0.25)
    return model


@pytest.fixture
def build():
    """`build("pure", bias=...)`: a stirred tiny model in eval mode, the same at every call with the same arguments."""

    def make(variant: str = "pure", **overrides) -> ReGLAForCausalLM:
        torch.manual_seed(7)
        config = ReGLAConfig(**{**TINY, **VARIANTS[variant], **overrides})
        return stir(ReGLAForCausalLM(config)).eval()

    return make


@pytest.fixture(params=VARIANTS)
def variant(request) -> str:
    return request.param


@pytest.fixture
def model(variant, build) -> ReGLAForCausalLM:
    return build(variant)


@pytest.fixture
def assert_same():
    """Equal within 1e-4 of the largest logit."""

    def check(actual: torch.Tensor, expected: torch.Tensor) -> None:
        assert actual.shape == expected.shape
        error = (actual - expected).abs().max() / expected.abs().max()
        assert error <= 1e-4, f"relative error {error:.1e}"  # a NaN fails too

    return check
