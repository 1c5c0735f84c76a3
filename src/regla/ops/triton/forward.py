"""The forward kernel: one program runs through one head of one sequence, a chunk of tokens at a time."""

from __future__ import annotations

import triton
import triton.language as tl

from regla.ops.triton.tiles import (
    CENTRE,
    LIFT_BITS,
    LN2,
    LOG2E,
    LOWEST,
    NO_KEY,
    first_piece,
    last_row,
    load_decay,
    load_tile,
    next_piece,
    stabiliser,
    store_tile,
    to_the_end,
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
    """(features 2^48 e^(k - m) [C, K], m_t, m_{t-1} [C]) from key logits k and the slowest decays g [C], in log2."""
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
def relative_decays(gk, gv, m, m_before, K, V, ki, vi, KEY: tl.constexpr, VALUE: tl.constexpr):
    """The decays of both axes in units of the stabiliser: each at most 0 by itself, their sum as it was plus
    m_{t-1} - m_t. With both axes the key axis' are relative to its slowest channel."""
    unit = (m_before - m)[:, None]
    if KEY and VALUE:
        slowest = tl.max(tl.where((ki < K)[None, :], gk, LOWEST), 1)[:, None]
        gk = gk - slowest
        gv = gv + (unit + slowest)
    elif VALUE:
        gv = gv + unit
    else:
        gk = gk + unit
    return tl.minimum(tl.maximum(gk, LOWEST), 0.0), tl.minimum(tl.maximum(gv, LOWEST), 0.0)


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, gk_ptr, rk_ptr, gv_ptr, rv_ptr, mask_ptr, cu_ptr, initial_ptr, before_ptr,
    o_ptr, final_ptr, m_ptr, lower_ptr, states_ptr, last_ptr,
    scale, T, chunks, H,
    q_step, k_step, v_step, gk_step, rk_step, gv_step, rv_step,
    G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    KEY: tl.constexpr, VALUE: tl.constexpr, SAFE_EXP: tl.constexpr, DECAYING: tl.constexpr,
    MASKED: tl.constexpr, VARLEN: tl.constexpr, INITIAL: tl.constexpr, STORE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    # The stabiliser's change of unit is a decay too, of the key axis where the value axis has none.
    KEYED: tl.constexpr = KEY != "none" or (SAFE_EXP and VALUE == "none")
    VALUED: tl.constexpr = VALUE != "none"
    n = tl.program_id(0) // H
    h = tl.program_id(0) % H
    begin, length, chunk = sequence_of(n, cu_ptr, T, chunks, C, VARLEN)
    rows = tl.arange(0, C)
    ki, vi = tl.arange(0, BK), tl.arange(0, BV)
    dtype = v_ptr.dtype.element_ty
    state_at = ki[:, None] * V + vi[None, :]
    state_mask = (ki < K)[:, None] & (vi < V)[None, :]
    causal = rows[:, None] >= rows[None, :]
    # S is the state times 2^-CENTRE for each axis that decays.
    centre: tl.constexpr = CENTRE * ((1 if KEYED else 0) + (1 if VALUED else 0))
    S = tl.zeros([BK, BV], tl.float32)
    before = tl.full([], NO_KEY, tl.float32)
    if INITIAL:
        S = tl.load(initial_ptr + (n * H + h).to(tl.int64) * K * V + state_at, mask=state_mask, other=0.0)
        S = S * tl.exp2(-centre)
        if SAFE_EXP:
            before = tl.load(before_ptr + n * H + h) * LOG2E
    q_ptr += begin * q_step + h * G * K
    k_ptr += begin * k_step + h * K
    v_ptr += begin * v_step + h * V
    o_ptr += begin * (H * G * V) + h * G * V
    if KEY != "none":
        gk_ptr += begin * gk_step + h * K
    if KEY == "refined":
        rk_ptr += begin * rk_step + h * K
    if VALUE != "none":
        gv_ptr += begin * gv_step + h * V
    if VALUE == "refined":
        rv_ptr += begin * rv_step + h * V
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
        gk = load_decay(gk_ptr, rk_ptr, t, valid, gk_step, rk_step, ki, K, KEY)
        gv = load_decay(gv_ptr, rv_ptr, t, valid, gv_step, rv_step, vi, V, VALUE)
        if SAFE_EXP:
            slowest = tl.zeros([C], tl.float32)
            if KEY != "none":
                slowest += tl.max(tl.where((ki < K)[None, :], gk, float("-inf")), 1)
            if VALUE != "none":
                slowest += tl.max(tl.where((vi < V)[None, :], gv, float("-inf")), 1)
            k, m, m_before = key_features(k, slowest, ki, K, valid, before, DECAYING)
            gk, gv = relative_decays(gk, gv, m, m_before, K, V, ki, vi, KEY != "none", VALUE != "none")
            before = tl.sum(tl.where(rows == C - 1, m, 0.0), 0)
            if STORE:
                tl.store(m_ptr + (begin + t) * H + h, m, mask=inside)
        kd, x, k_end, v_end = k.to(dtype), v.to(dtype), k, v
        more_k, more_v = False, False
        if KEYED:
            Bk, Wk, ends_k = first_piece(gk)
            Ek = tl.exp2(Bk + CENTRE)
            more_k = tl.min(ends_k, 0) < C
            kd = (k * Wk).to(dtype)
            k_end, _to_end_k = to_the_end(k, gk, rows, Bk, Wk, ends_k, more_k)
        if VALUED:
            Bv, Wv, ends_v = first_piece(gv)
            Ev = tl.exp2(Bv + CENTRE)
            more_v = tl.min(ends_v, 0) < C
            x = (v * Wv).to(dtype)
            v_end, _to_end_v = to_the_end(v, gv, rows, Bv, Wv, ends_v, more_v)
        Sd = S.to(dtype)
        for j in range(G):
            q = load_tile(q_ptr + j * K, t, valid, q_step, ki, K, float("-inf") if SAFE_EXP else 0.0)
            if SAFE_EXP:
                q = query_features(q, valid)
            qd = (q * Ek).to(dtype) if KEYED else q.to(dtype)
            P = tl.where(causal, tl.dot(qd, tl.trans(kd), input_precision=PRECISION), 0.0)
            if KEYED:  # noqa: SIM102 - known when the kernel is compiled
                if more_k:
                    start = ends_k
                    while tl.min(start, 0) < C:
                        _Bk, E2, W2, start = next_piece(gk, rows, start)
                        P2 = tl.dot((q * E2).to(dtype), tl.trans((k * W2).to(dtype)), input_precision=PRECISION)
                        P += tl.where(causal, P2, 0.0)
            Pd = P.to(dtype)
            out = tl.dot(qd, Sd, input_precision=PRECISION)
            out = tl.dot(Pd, x, out, input_precision=PRECISION)
            if VALUED:
                out *= Ev
                if more_v:
                    start = ends_v
                    while tl.min(start, 0) < C:
                        _Bv, E2, W2, start = next_piece(gv, rows, start)
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
        if KEYED:
            S *= tl.exp2(last_row(Bk, rows))[:, None]
        if VALUED:
            S *= tl.exp2(last_row(Bv, rows))[None, :]
        S = tl.dot(tl.trans(k_end.to(dtype)), v_end.to(dtype), S, input_precision=PRECISION)
    at = final_ptr + (n * H + h).to(tl.int64) * K * V + state_at
    tl.store(at, S * tl.exp2(centre), mask=state_mask)
    if SAFE_EXP:
        tl.store(last_ptr + n * H + h, tl.where(before < -1e29, NO_KEY, before * LN2))
