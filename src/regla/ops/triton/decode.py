"""The decode kernel: one token of every sequence in one launch, the state updated where it lies.

Bytes. A state of K x V float32 is read once and written once: 8 K V bytes per sequence and state head are the floor,
32 KiB at K = V = 64 and 128 KiB at K = V = 128. What else a token needs adds 2 % at 64 and 1 % at 128: in bfloat16,
with a refined gate of the value axis and as many query heads as state heads, q, k, v, the logits of the gate and the
output are 4 K + 8 V bytes, m is 8.

One CTA holds the state of a head in registers and serves all query heads that share it. The state is not split
over CTAs: whether it is empty, its stabiliser m, and the norm concern all of it, and m too is overwritten in place,
no second CTA could then read.

Shape legend: N sequences, H state heads, G queries per state head, HQ = G H, K key channels, V value channels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from regla.ops.triton.tiles import LIFT_BITS, LN2, LOG2E, LOWEST, NO_KEY, largest, log2_refined, maximum, minimum


@triton.jit
def axis_decays(g_ptr, r_ptr, column, width, real, GATE: tl.constexpr):
    """(log2-decays [D] <= 0, the slowest). GATE: "log" (natural logarithms), "refined" (logits), "none" (zeros)."""
    inside = (column < width) & real
    g = tl.zeros([column.shape[0]], tl.float32)
    if GATE != "none":
        g = tl.load(g_ptr + column, mask=inside, other=0.0).to(tl.float32)
        if GATE == "refined":
            g = log2_refined(g, tl.load(r_ptr + column, mask=inside, other=0.0).to(tl.float32))
            g = tl.where(inside, g, 0.0)
        else:
            g = g * LOG2E
        g = maximum(g, LOWEST)
    return g, largest(tl.where(column < width, g, LOWEST), 0)


@triton.jit
def load_query(
    q_ptr, weight_ptr, bias_ptr, n, query, q_row, q_head, inside, ki, vi, V: tl.constexpr, NORM: tl.constexpr
):
    """What belongs to a query head by itself: (q, weight and bias of the norm)."""
    q = tl.load(q_ptr + n * q_row + query * q_head + ki, mask=inside, other=float("-inf")).to(tl.float32)
    weight, bias = 0.0, 0.0
    if NORM != "none":
        weight = tl.load(weight_ptr + query * V + vi, mask=vi < V, other=0.0).to(tl.float32)
    if NORM == "layernorm":
        bias = tl.load(bias_ptr + query * V + vi, mask=vi < V, other=0.0).to(tl.float32)
    return q, weight, bias


@triton.jit
def head_norm(out, weight, bias, eps, vi, V: tl.constexpr, NORM: tl.constexpr):
    """The norm of an output [BV] of one head: `regla.layers.norms`."""
    if NORM != "none":
        size = largest(tl.abs(out), 0)
        out = out / tl.where(size < 1.1754943508222875e-38, 1.0, size)
        if NORM == "layernorm":
            out = tl.where(vi < V, out - tl.sum(out, 0) / V, 0.0)
        out *= tl.rsqrt(tl.sum(out * out, 0) / V + eps)
        out *= weight
        if NORM == "layernorm":
            out += bias
    return out


@triton.jit
def decode_kernel(
    q_ptr, k_ptr, v_ptr, gk_ptr, rk_ptr, gv_ptr, rv_ptr, mask_ptr, S_ptr, m_ptr, weight_ptr, bias_ptr, o_ptr,
    scale, eps, H,
    q_row, k_row, v_row, gk_row, rk_row, gv_row, rv_row, mask_row,
    q_head, k_head, v_head, gk_head, rk_head, gv_head, rv_head,
    G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    KEY: tl.constexpr, VALUE: tl.constexpr, DECAYING: tl.constexpr, MASKED: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    cta = tl.program_id(0)
    n, h = (cta // H).to(tl.int64), cta % H
    ki, vi = tl.arange(0, BK), tl.arange(0, BV)
    state_at = S_ptr + cta.to(tl.int64) * K * V + ki[:, None] * V + vi[None, :]
    state_mask = (ki < K)[:, None] & (vi < V)[None, :]
    S = tl.load(state_at, mask=state_mask, other=0.0)
    m_old = tl.load(m_ptr + cta)
    real = tl.full([], 1, tl.int1)
    if MASKED:
        real = tl.load(mask_ptr + n * mask_row) != 0
    # A padding token reads nothing: its keys are -inf, its value and its decays 0, so S and m come out as they were.
    key_inside, value_inside = (ki < K) & real, (vi < V) & real
    k = tl.load(k_ptr + n * k_row + h * k_head + ki, mask=key_inside, other=float("-inf")).to(tl.float32)
    v = tl.load(v_ptr + n * v_row + h * v_head + vi, mask=value_inside, other=0.0).to(tl.float32)
    # Before the state is written: the compiler moves no read ahead of a write.
    q, weight, bias = load_query(
        q_ptr, weight_ptr, bias_ptr, n, h * G, q_row, q_head, key_inside, ki, vi, V, NORM
    )  # fmt: skip
    gk, slowest_k = axis_decays(
        gk_ptr + (n * gk_row + h * gk_head) if KEY != "none" else gk_ptr,
        rk_ptr + (n * rk_row + h * rk_head) if KEY == "refined" else rk_ptr,
        ki, K, real, KEY,
    )  # fmt: skip
    gv, slowest_v = axis_decays(
        gv_ptr + (n * gv_row + h * gv_head) if VALUE != "none" else gv_ptr,
        rv_ptr + (n * rv_row + h * rv_head) if VALUE == "refined" else rv_ptr,
        vi, V, real, VALUE,
    )  # fmt: skip

    # m is kept in natural units: rounded to base 2 and back at every token, it would drift from the scale of S.
    is_empty = tl.max(tl.max((S != 0).to(tl.int32), 1), 0) == 0
    before = tl.where(is_empty, NO_KEY, m_old)
    m = before
    if DECAYING:
        m = before + (slowest_k + slowest_v) * LN2
    m = maximum(m, largest(k, 0))
    rescale = (before - m) * LOG2E
    phi_k = tl.exp2((k - m) * LOG2E + LIFT_BITS)
    # The change of the stabiliser goes to one axis, such that what each axis decays by stays <= 1 by itself.
    if VALUE != "none":
        gk = gk - slowest_k
        gv = gv + (rescale + slowest_k)
    else:
        gk = gk + rescale
    S *= tl.exp2(minimum(maximum(gk, LOWEST), 0.0))[:, None]
    if VALUE != "none":
        S *= tl.exp2(minimum(maximum(gv, LOWEST), 0.0))[None, :]
    S += phi_k[:, None] * v[None, :]
    tl.store(state_at, S, mask=state_mask)
    tl.store(m_ptr + cta, tl.where(real, m, m_old))

    for j in range(G):
        query = h * G + j
        phi_q = tl.where(key_inside, tl.exp2((q - largest(q, 0)) * LOG2E), 0.0)
        out = scale * tl.sum(S * phi_q[:, None], 0)
        # 2^-48, or more where a head's output would vanish: see regla.ops.attention
        size = maximum(largest(tl.abs(out), 0), 7.888609052210118e-31)
        out *= tl.where(size == size, maximum(2.0**-12 / size, 1.0), 1.0) * 2.0**-48  # a NaN stays in its channel
        out = head_norm(out, weight, bias, eps, vi, V, NORM)
        tl.store(o_ptr + (n * H * G + query) * V + vi, out.to(o_ptr.dtype.element_ty), mask=vi < V)
        if j + 1 < G:
            q, weight, bias = load_query(
                q_ptr, weight_ptr, bias_ptr, n, query + 1, q_row, q_head, key_inside, ki, vi, V, NORM
            )  # fmt: skip


def num_warps(BK: int, BV: int) -> int:
    """As many as keep a state in registers: up to 64 numbers a thread, beyond 128 x 128 with some of the rest spilt."""
    return min(max(BK * BV // 2048, 4), 32)
