"""What a mixer is unless told otherwise: for `ReGLAAttention` and, through `ReGLAConfig`, for models and `regla train`;
and the paper's own form. docs/results/defaults.md says how the defaults were chosen.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Mixer:
    """All options of a mixer, none left to a default; see `ReGLAAttention` for what each means.

    gate_half_life, gate_half_life_over: where the forget gate starts, see `regla.layers.init_linear_attention`.
    """

    update_rule: str
    beta_max: float
    feature_map: str
    gate: str
    gate_axis: str
    gate_low_rank_dim: int
    gate_half_life: float | tuple[float, float] | None
    gate_half_life_over: str
    key_max: str
    norm: str
    norm_eps: float
    conv_size: int
    conv_activation: str | None
    qk_norm: bool
    qk_calibration: bool
    output_gate: str | None
    bias: bool
    backend: str


DEFAULTS = Mixer(
    update_rule="additive",
    beta_max=1.0,
    feature_map="safe_exp",
    gate="refined",
    gate_axis="key",
    gate_low_rank_dim=16,
    gate_half_life=None,
    gate_half_life_over="channels",
    key_max="decay",
    norm="rmsnorm",
    norm_eps=1e-6,
    conv_size=0,
    conv_activation=None,
    qk_norm=True,
    qk_calibration=False,
    output_gate="silu",
    bias=False,
    backend="auto",
)

PAPER = Mixer(
    update_rule="additive",
    beta_max=1.0,
    feature_map="safe_exp",
    gate="refined",
    gate_axis="value",
    gate_low_rank_dim=16,
    gate_half_life=None,
    gate_half_life_over="channels",
    key_max="decay",
    norm="layernorm",
    norm_eps=1e-6,
    conv_size=0,
    conv_activation=None,
    qk_norm=False,
    qk_calibration=False,
    output_gate=None,
    bias=False,
    backend="auto",
)
"""The paper's equations and no more: safe exponential, refined gate on the value axis (F_t 1^T read literally), layer
norm per head. Where the paper is not causal or does not say:

- The maximum of the keys looks back only (key_max "decay"), where the paper takes that of the whole sequence, which the
  future would leak through. Outputs differ by a factor per token, which the norm forgets.
- Gates start at F = 1/2; projections have no biases; linear layers have no RoPE.
"""
