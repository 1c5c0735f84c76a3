"""Pure tensor functions: gated linear attention and ReGLA, equal in every backend. Needs torch alone."""

from regla.ops.attention import gate_decays, gated_linear_attention, regla_attention, safe_exp_attention
from regla.ops.call import QKNorm
from regla.ops.delta import gated_delta_attention, regla_delta_attention
from regla.ops.features import safe_exp_key, safe_exp_query, variance_reduction
from regla.ops.gates import log_refined_gate

__all__ = [
    "QKNorm",
    "gate_decays",
    "gated_delta_attention",
    "gated_linear_attention",
    "log_refined_gate",
    "regla_attention",
    "regla_delta_attention",
    "safe_exp_attention",
    "safe_exp_key",
    "safe_exp_query",
    "variance_reduction",
]
