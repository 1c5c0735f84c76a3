"""What a mixer is unless told otherwise: for `ReGLAAttention` and, through `ReGLAConfig`, for models and `regla train`.

docs/results/defaults.md says how each was chosen.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MixerDefaults:
    """See `ReGLAAttention` for what each means."""

    update_rule: str = "additive"
    beta_max: float = 1.0
    feature_map: str = "safe_exp"
    gate: str = "refined"
    gate_axis: str = "key"
    gate_low_rank_dim: int = 16
    key_max: str = "decay"
    norm: str = "rmsnorm"
    norm_eps: float = 1e-6
    conv_size: int = 0
    conv_activation: str | None = None
    qk_norm: bool = True
    qk_calibration: bool = False
    output_gate: str | None = "silu"
    bias: bool = False
    backend: str = "auto"


DEFAULTS = MixerDefaults()
