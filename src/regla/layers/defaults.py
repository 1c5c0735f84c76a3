"""Mixers with all their options, and the one that is meant unless told otherwise: by `ReGLAAttention` and, through
`ReGLAConfig`, by models and `regla train`. docs/results/defaults.md says how it was chosen.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any


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
    gate_low_rank_dim: int | None
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
    window_branch: int
    window_sinks: int
    window_dropout: float
    bias: bool
    backend: str

    def of_layer(self) -> dict[str, Any]:
        """The arguments of `ReGLAAttention` that make it this mixer; where its gate starts is another's business."""
        return {name: value for name, value in asdict(self).items() if name not in _STARTS}


_STARTS = ("gate_half_life", "gate_half_life_over")

ADDITIVE = Mixer(
    update_rule="additive",
    beta_max=1.0,
    feature_map="safe_exp",
    gate="refined",
    gate_axis="key",
    gate_low_rank_dim=None,
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
    window_branch=0,
    window_sinks=0,
    window_dropout=0.0,
    bias=False,
    backend="auto",
)
"""The additive rule at its best: the paper's with the gate on the key axis, an RMS norm, and extras."""

DELTA = replace(
    ADDITIVE,
    update_rule="delta",
    feature_map="unit_silu",
    gate="refined_low_rank",
    gate_half_life=(1, 256),
    conv_size=4,
    conv_activation="silu",
)
"""The delta rule at its best: over features of silu of unit length (docs/results/memory.md)."""

PAPER = replace(ADDITIVE, gate_axis="value", norm="layernorm", qk_norm=False, output_gate=None)
"""The paper's equations and no more: safe exponential, refined gate on the value axis (F_t 1^T read literally), layer
norm per head. Where the paper is not causal or does not say:

- The maximum of the keys looks back only (key_max "decay"), where the paper takes that of the whole sequence, which the
  future would leak through. Outputs differ by a factor per token, which the norm forgets.
- Gates start at F = 1/2; projections have no biases; linear layers have no RoPE.
"""

DEFAULTS = ADDITIVE
