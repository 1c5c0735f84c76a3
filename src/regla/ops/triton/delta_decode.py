"""The decode kernel of the delta rule: one token of every sequence in one launch, the state updated where it lies.

    S' = Diag(a) S        S = S' + beta k (v - S'^T k)^T        o = norm(scale * S^T q)

The floor is the state read once and written once, as of `regla.ops.triton.decode`. One CTA holds the state of a head in
registers and serves all query heads that share it.

Shape legend: N sequences, H state heads, G queries per state head, K key channels, V value channels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from regla.ops.triton.decode import head_norm
from regla.ops.triton.delta_inputs import SHORTEST
from regla.ops.triton.norm import load_norm
from regla.ops.triton.tiles import LN2, LOG2E, LOWEST, largest, log2_refined, maximum


@triton.jit
def token_features(
    ptr, ki, real, weight, eps, K: tl.constexpr, FEATURES: tl.constexpr, NORM: tl.constexpr
):  # fmt: skip
    """[BK] float32, 0 for padding: what is in memory, "given", or e / |e| of it, behind an RMS norm with NORM, whose
    `weight` is times log2(e); e = exp(x - max x) of "unit_safe_exp", e = silu(x) of "unit_silu"."""
    inside = (ki < K) & real
    x = tl.load(ptr + ki, mask=inside, other=0.0).to(tl.float32)
    if FEATURES != "given":
        if NORM:
            x *= tl.rsqrt(maximum(tl.sum(x * x, 0) * (1 / K) + eps, 1e-36)) * weight
        if FEATURES == "unit_silu":
            if NORM:
                x *= LN2
            e = x * tl.sigmoid(x)
            square = maximum(tl.sum(e * e, 0), SHORTEST)
        else:
            if not NORM:
                x *= LOG2E
            x = tl.where(inside, x, float("-inf"))
            e = tl.exp2(x - tl.where(real, largest(x, 0), 0.0))
            square = tl.sum(e * e, 0)
        x = e * tl.where(real, tl.rsqrt(square), 0.0)
    return x


@triton.jit
def token_decays(g_ptr, r_ptr, ki, real, STEP: tl.constexpr, K: tl.constexpr, GATE: tl.constexpr):
    """What the channels [BK] decay by. GATE: "none", "log" (natural logarithms) or "refined" (logits); STEP 0: one for
    all channels."""
    inside = (ki < K) & real
    g = tl.load(g_ptr + ki * STEP, mask=inside, other=0.0).to(tl.float32)
    if GATE == "refined":
        g = log2_refined(g, tl.load(r_ptr + ki * STEP, mask=inside, other=0.0).to(tl.float32))
        g = tl.where(inside, g, 0.0)
    else:
        g *= LOG2E
    return tl.exp2(maximum(g, LOWEST))


@triton.jit
def delta_decode_kernel(
    q_ptr, k_ptr, v_ptr, g_ptr, r_ptr, beta_ptr, mask_ptr, q_weight_ptr, k_weight_ptr, S_ptr, weight_ptr, bias_ptr,
    o_ptr,
    scale, qk_eps, limit, eps, H,
    q_row, k_row, v_row, g_row, r_row, beta_row, mask_row, q_head, k_head, v_head, g_head, r_head, beta_head,
    G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, GATE: tl.constexpr,
    STEP: tl.constexpr, FEATURES: tl.constexpr, QK_NORM: tl.constexpr, LOGITS: tl.constexpr, MASKED: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    cta = tl.program_id(0)
    n, h = (cta // H).to(tl.int64), cta % H
    ki, vi = tl.arange(0, BK), tl.arange(0, BV)
    state_at = S_ptr + cta.to(tl.int64) * K * V + ki[:, None] * V + vi[None, :]
    state_mask = (ki < K)[:, None] & (vi < V)[None, :]
    S = tl.load(state_at, mask=state_mask, other=0.0)
    real = tl.full([], 1, tl.int1)
    if MASKED:
        real = tl.load(mask_ptr + n * mask_row) != 0
    # A padding token reads nothing: its key, value and beta are 0, and nothing decays.
    q_weight, k_weight = load_norm(q_weight_ptr, k_weight_ptr, K, BK, QK_NORM)
    k = token_features(k_ptr + n * k_row + h * k_head, ki, real, k_weight, qk_eps, K, FEATURES, QK_NORM)
    v = tl.load(v_ptr + n * v_row + h * v_head + vi, mask=(vi < V) & real, other=0.0).to(tl.float32)
    beta = tl.load(beta_ptr + n * beta_row + h * beta_head, mask=real, other=0.0).to(tl.float32)
    if LOGITS:
        beta = tl.where(real, limit * tl.sigmoid(beta), 0.0)
    if GATE != "none":
        r_at = r_ptr
        if GATE == "refined":
            r_at = r_ptr + (n * r_row + h * r_head)
        S *= token_decays(g_ptr + (n * g_row + h * g_head), r_at, ki, real, STEP, K, GATE)[:, None]
    S += (beta * k)[:, None] * (v - tl.sum(S * k[:, None], 0))[None, :]
    for j in range(G):
        query = h * G + j
        q = token_features(q_ptr + n * q_row + query * q_head, ki, real, q_weight, qk_eps, K, FEATURES, QK_NORM)
        weight, bias = 0.0, 0.0
        if NORM != "none":
            weight = tl.load(weight_ptr + query * V + vi, mask=vi < V, other=0.0).to(tl.float32)
        if NORM == "layernorm":
            bias = tl.load(bias_ptr + query * V + vi, mask=vi < V, other=0.0).to(tl.float32)
        out = head_norm(scale * tl.sum(S * q[:, None], 0), weight, bias, eps, vi, V, NORM)
        tl.store(o_ptr + (n * H * G + query) * V + vi, out.to(o_ptr.dtype.element_ty), mask=vi < V)
    tl.store(state_at, S, mask=state_mask)
