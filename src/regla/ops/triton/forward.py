"""The forward kernel: one program runs through one head of one sequence, a chunk of tokens at a time."""

from __future__ import annotations

import triton
import triton.language as tl

from regla.ops.triton.tiles import (
    CENTRE,
    LIFT_BITS,
    LN2,
    LOG2E,
    NO_KEY,
    first_piece,
    last_row,
    load_decay,
    load_tile,
    next_piece,
    stabiliser,
    store_tile,
)


@triton.jit
def sequence_of(n, cu_ptr, T, chunks, C: tl.constexpr, VARLEN: tl.constexpr):
    """(first token, length, first chunk) of sequence n."""
    if VARLEN:
        begin = tl.load(cu_ptr + n).to(tl.int64)
        length = (tl.load(cu_ptr + n + 1) - begin).to(tl.int32)
        chunk = begin // C + n
    else:
        begin = n.to(tl.int64) * T
        length = T
        chunk = n.to(tl.int64) * chunks
    return begin, length, chunk


@triton.jit
def key_features(k, g, column, K, valid, before, DECAYING: tl.constexpr):
    """(features 2^48 e^(k - m) [C, K], m_t [C], m_{t-1} [C]) from key logits k and the slowest decays g [C], in log2."""
    top = tl.where(valid, tl.max(k, 1) * LOG2E, NO_KEY)
    step = g if DECAYING else top * 0.0
    m, m_before = stabiliser(top, tl.where(valid, step, 0.0), before)
    features = tl.exp2(k * LOG2E - m[:, None] + LIFT_BITS)
    return tl.where(valid[:, None] & (column < K)[None, :], features, 0.0), m, m_before


@triton.jit
def query_features(q, valid):
    """2^(log2e (q - max q)) [C, K]; 0 for padding."""
    phi = tl.exp2((q - tl.max(q, 1)[:, None]) * LOG2E)
    return tl.where(valid[:, None], phi, 0.0)


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, g_ptr, r_ptr, mask_ptr, cu_ptr, initial_ptr, before_ptr,
    o_ptr, final_ptr, m_ptr, lower_ptr, states_ptr, last_ptr,
    scale, T, chunks, H,
    q_step, k_step, v_step, g_step, r_step,
    G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    AXIS: tl.constexpr, GATE: tl.constexpr, SAFE_EXP: tl.constexpr, DECAYING: tl.constexpr,
    MASKED: tl.constexpr, VARLEN: tl.constexpr, INITIAL: tl.constexpr, STORE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) // H
    h = tl.program_id(0) % H
    begin, length, chunk = sequence_of(n, cu_ptr, T, chunks, C, VARLEN)
    rows = tl.arange(0, C)
    ki, vi = tl.arange(0, BK), tl.arange(0, BV)
    dtype = v_ptr.dtype.element_ty
    state_at = ki[:, None] * V + vi[None, :]
    state_mask = (ki < K)[:, None] & (vi < V)[None, :]
    causal = rows[:, None] >= rows[None, :]
    # S is 2^-CENTRE times the state.
    S = tl.zeros([BK, BV], tl.float32)
    before = tl.full([], NO_KEY, tl.float32)
    if INITIAL:
        S = tl.load(initial_ptr + (n * H + h).to(tl.int64) * K * V + state_at, mask=state_mask, other=0.0)
        S = S * tl.exp2(-CENTRE)
        if SAFE_EXP:
            before = tl.load(before_ptr + n * H + h) * LOG2E
    q_ptr += begin * q_step + h * G * K
    k_ptr += begin * k_step + h * K
    v_ptr += begin * v_step + h * V
    o_ptr += begin * (H * G * V) + h * G * V
    D: tl.constexpr = K if AXIS == "key" else V
    di = ki if AXIS == "key" else vi
    if GATE != "none":
        g_ptr += begin * g_step + h * D
    if GATE == "refined":
        r_ptr += begin * r_step + h * D
    for i in range(0, tl.cdiv(length, C)):
        t = i * C + rows
        inside = t < length
        valid = inside
        if MASKED:
            valid = inside & (tl.load(mask_ptr + begin + t, mask=inside, other=0) != 0)
        if STORE:
            at = states_ptr + ((chunk + i) * H + h) * K * V + state_at
            tl.store(at, S.to(states_ptr.dtype.element_ty), mask=state_mask)
        k = load_tile(k_ptr, t, valid, k_step, ki, K, float("-inf") if SAFE_EXP else 0.0)
        v = load_tile(v_ptr, t, valid, v_step, vi, V, 0.0)
        if GATE == "none":
            g = tl.zeros([C, BV if AXIS == "value" else BK], tl.float32)
        else:
            g = load_decay(g_ptr, r_ptr, t, valid, g_step, r_step, di, D, GATE)
        if SAFE_EXP:
            slowest = tl.max(tl.where((di < D)[None, :], g, float("-inf")), 1)
            k, m, m_before = key_features(k, slowest, ki, K, valid, before, DECAYING)
            g = tl.minimum(tl.maximum(g + (m_before - m)[:, None], -2000.0), 0.0)
            before = tl.sum(tl.where(rows == C - 1, m, 0.0), 0)
            if STORE:
                tl.store(m_ptr + (begin + t) * H + h, m, mask=inside)
        B, W, end = first_piece(g)
        E = tl.exp2(B + CENTRE)
        total = tl.exp2(last_row(B, rows))
        more = tl.min(end, 0) < C
        if AXIS == "value":
            x = (v * W).to(dtype)
            kd = k.to(dtype)
        else:
            x = v.to(dtype)
            kd = (k * W).to(dtype)
        Sd = S.to(dtype)
        for j in range(G):
            q = load_tile(q_ptr + j * K, t, valid, q_step, ki, K, float("-inf") if SAFE_EXP else 0.0)
            if SAFE_EXP:
                q = query_features(q, valid)
            qd = q.to(dtype) if AXIS == "value" else (q * E).to(dtype)
            P = tl.dot(qd, tl.trans(kd), input_precision=PRECISION)
            out = tl.dot(qd, Sd, input_precision=PRECISION)
            if AXIS == "key":
                P = tl.where(causal, P, 0.0)
                if more:
                    start = end
                    while tl.min(start, 0) < C:
                        _, E2, W2, start = next_piece(g, rows, start)
                        P2 = tl.dot((q * E2).to(dtype), tl.trans((k * W2).to(dtype)), input_precision=PRECISION)
                        P += tl.where(causal, P2, 0.0)
                out = tl.dot(P.to(dtype), x, out, input_precision=PRECISION)
            else:
                Pd = tl.where(causal, P, 0.0).to(dtype)
                out = E * tl.dot(Pd, x, out, input_precision=PRECISION)
                if more:
                    start = end
                    while tl.min(start, 0) < C:
                        _, E2, W2, start = next_piece(g, rows, start)
                        out += E2 * tl.dot(Pd, (v * W2).to(dtype), input_precision=PRECISION)
            out *= scale
            if SAFE_EXP:
                # 2^-48, or more where a head's output would vanish: see regla.ops.attention
                largest = tl.maximum(tl.max(tl.abs(out), 1), 7.888609052210118e-31)
                factor = tl.maximum(2.0**-12 / largest, 1.0) * 2.0**-48
                out *= factor[:, None]
                if STORE:
                    tl.store(lower_ptr + (begin + t) * (H * G) + h * G + j, factor, mask=inside)
            store_tile(o_ptr + j * V, t, inside, H * G * V, vi, V, out)
        S = tl.dot(tl.trans(kd), x, S, input_precision=PRECISION)
        S = S * total[None, :] if AXIS == "value" else S * total[:, None]
        if more:
            start = end
            while tl.min(start, 0) < C:
                B2, _, W2, begun = next_piece(g, rows, start)
                total = tl.where(start < C, tl.exp2(last_row(B2, rows)), 0.0)
                if AXIS == "value":
                    S += total[None, :] * tl.dot(tl.trans(kd), (v * W2).to(dtype), input_precision=PRECISION)
                else:
                    S += total[:, None] * tl.dot(tl.trans((k * W2).to(dtype)), x, input_precision=PRECISION)
                start = begun
    at = final_ptr + (n * H + h).to(tl.int64) * K * V + state_at
    tl.store(at, S * tl.exp2(CENTRE), mask=state_mask)
    if SAFE_EXP:
        tl.store(last_ptr + n * H + h, tl.where(before < -1e29, NO_KEY, before * LN2))
