"""The backward kernel: one program runs back through one head of one sequence, a chunk of tokens at a time.

Everything but the states before each chunk and the stabiliser is computed again. With d the gradient of a chunk's
output times E, U that of the chunk's state before its decay (value axis; the key axis is the mirror image):

    d_P = tril(d x^T)        d_x = P^T d + k U        d_q = d_P k + d S^T        d_k = d_P^T q + x U^T
    d_S = U + q^T d          d_v = d_x W              d_B = out d_out - x d_x    d_g = sum of d_B from t to the end

and, at the chunk's last token, what the state after it is worth: sum_K U S + sum_s x_s (k U)_s. Both sides of each
difference come from the same rounded factors, so that what must cancel does. Gradients are 2^48 times what they are,
as the keys' features are, lest small ones vanish where E is small.
"""

from __future__ import annotations

import triton
import triton.language as tl

from regla.ops.triton.forward import query_features, sequence_of
from regla.ops.triton.tiles import (
    CENTRE,
    LIFT_BITS,
    LOG2E,
    NO_KEY,
    first_piece,
    last_row,
    load_decay,
    load_tile,
    next_piece,
    refined_gradient,
    store_tile,
)


@triton.jit
def backward_kernel(
    q_ptr, k_ptr, v_ptr, g_ptr, r_ptr, mask_ptr, cu_ptr, before_ptr,
    m_ptr, lower_ptr, states_ptr, do_ptr, d_final_ptr,
    dq_ptr, dk_ptr, dv_ptr, dg_ptr, dr_ptr, d_initial_ptr,
    scale, T, chunks, H,
    q_step, k_step, v_step, g_step, r_step,
    G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    AXIS: tl.constexpr, GATE: tl.constexpr, SAFE_EXP: tl.constexpr,
    MASKED: tl.constexpr, VARLEN: tl.constexpr, INITIAL: tl.constexpr, D_FINAL: tl.constexpr,
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
    here = (n * H + h).to(tl.int64) * K * V + state_at
    LIFTED: tl.constexpr = LIFT_BITS if SAFE_EXP else 0.0
    dS = tl.zeros([BK, BV], tl.float32)
    if D_FINAL:
        dS = tl.load(d_final_ptr + here, mask=state_mask, other=0.0) * tl.exp2(CENTRE + LIFTED)
    before = tl.full([], NO_KEY, tl.float32)
    if SAFE_EXP and INITIAL:
        before = tl.load(before_ptr + n * H + h) * LOG2E
    D: tl.constexpr = K if AXIS == "key" else V
    di = ki if AXIS == "key" else vi
    q_ptr += begin * q_step + h * G * K
    k_ptr += begin * k_step + h * K
    v_ptr += begin * v_step + h * V
    if GATE != "none":
        g_ptr += begin * g_step + h * D
    if GATE == "refined":
        r_ptr += begin * r_step + h * D
    do_ptr += begin * (H * G * V) + h * G * V
    dq_ptr += begin * (H * G * K) + h * G * K
    dk_ptr += begin * (H * K) + h * K
    dv_ptr += begin * (H * V) + h * V
    dg_ptr += begin * (H * D) + h * D
    dr_ptr += begin * (H * D) + h * D
    last = tl.cdiv(length, C) - 1
    for i_from_last in range(0, last + 1):
        i = last - i_from_last
        t = i * C + rows
        inside = t < length
        valid = inside
        if MASKED:
            valid = inside & (tl.load(mask_ptr + begin + t, mask=inside, other=0) != 0)
        k = load_tile(k_ptr, t, valid, k_step, ki, K, 0.0)
        v = load_tile(v_ptr, t, valid, v_step, vi, V, 0.0)
        S = tl.load(states_ptr + ((chunk + i) * H + h) * K * V + state_at, mask=state_mask, other=0.0)
        if GATE == "none":
            g = tl.zeros([C, BV if AXIS == "value" else BK], tl.float32)
        else:
            g = load_decay(g_ptr, r_ptr, t, valid, g_step, r_step, di, D, GATE)
        if SAFE_EXP:
            m = tl.load(m_ptr + (begin + t) * H + h, mask=inside, other=0.0)
            earlier = tl.load(m_ptr + (begin + t - 1) * H + h, mask=inside & (t > 0), other=0.0)
            m_before = tl.where(t > 0, earlier, before)
            k = tl.exp2(k * LOG2E - m[:, None] + LIFT_BITS)
            k = tl.where(valid[:, None] & (ki < K)[None, :], k, 0.0)
            unit = tl.where(inside, m_before - m, 0.0)
            g = tl.minimum(tl.maximum(g + unit[:, None], -2000.0), 0.0)
        B, W, end = first_piece(g)
        E = tl.exp2(B + CENTRE)
        total = tl.exp2(last_row(B, rows))
        more = tl.min(end, 0) < C
        if AXIS == "value":
            x = (v * W).to(dtype)
            kd = k.to(dtype)
            U = dS * total[None, :]
        else:
            x = v.to(dtype)
            kd = (k * W).to(dtype)
            U = dS * total[:, None]
        Ud = U.to(dtype)
        dx = tl.dot(kd, Ud, input_precision=PRECISION)
        dk = tl.dot(x, tl.trans(Ud), input_precision=PRECISION)
        # d_v: the gradients of v from other pieces than the first; d_f: those of the key features (key axis).
        dv = tl.zeros([C, BV], tl.float32)
        df = tl.zeros([C, BK], tl.float32)
        if AXIS == "value":
            at_end = tl.sum(Ud.to(tl.float32) * S.to(tl.float32), 0) + tl.sum(x.to(tl.float32) * dx, 0)
        else:
            at_end = tl.sum(Ud.to(tl.float32) * S.to(tl.float32), 1) + tl.sum(kd.to(tl.float32) * dk, 0)
        dB = tl.where((rows == C - 1)[:, None], at_end[None, :], 0.0)
        if more:
            start = end
            while tl.min(start, 0) < C:
                B2, _, W2, begun = next_piece(g, rows, start)
                total = tl.where(start < C, tl.exp2(last_row(B2, rows)), 0.0)
                if AXIS == "value":
                    x2 = (v * W2).to(dtype)
                    U2 = (dS * total[None, :]).to(dtype)
                    dx2 = tl.dot(kd, U2, input_precision=PRECISION)
                    dk += tl.dot(x2, tl.trans(U2), input_precision=PRECISION)
                    dv += dx2 * W2
                    worth = x2.to(tl.float32) * dx2
                else:
                    k2 = (k * W2).to(dtype)
                    U2 = (dS * total[:, None]).to(dtype)
                    dx += tl.dot(k2, U2, input_precision=PRECISION)
                    dk2 = tl.dot(x, tl.trans(U2), input_precision=PRECISION)
                    df += dk2 * W2
                    worth = k2.to(tl.float32) * dk2
                dB += tl.where((rows == C - 1)[:, None], tl.sum(worth, 0)[None, :], 0.0) - worth
                start = begun
        dS = U
        for j in range(G):
            q = load_tile(q_ptr + j * K, t, valid, q_step, ki, K, float("-inf") if SAFE_EXP else 0.0)
            if SAFE_EXP:
                q = query_features(q, valid)
            do = load_tile(do_ptr + j * V, t, valid, H * G * V, vi, V, 0.0) * scale
            if SAFE_EXP:
                factor = tl.load(lower_ptr + (begin + t) * (H * G) + h * G + j, mask=inside, other=0.0)
                do *= factor[:, None] * 2.0**48
            if AXIS == "value":
                qd = q.to(dtype)
                d = (do * E).to(dtype)
                P = tl.dot(qd, tl.trans(kd), input_precision=PRECISION)
                Pd = tl.where(causal, P, 0.0).to(dtype)
                out = tl.dot(qd, S, input_precision=PRECISION)
                out = tl.dot(Pd, x, out, input_precision=PRECISION)
                dB += out * d.to(tl.float32)
                dP = tl.dot(d, tl.trans(x), input_precision=PRECISION)
                dx = tl.dot(tl.trans(Pd), d, dx, input_precision=PRECISION)
                if more:
                    start = end
                    while tl.min(start, 0) < C:
                        _, E2, W2, start = next_piece(g, rows, start)
                        x2 = (v * W2).to(dtype)
                        d2 = (do * E2).to(dtype)
                        dP += tl.dot(d2, tl.trans(x2), input_precision=PRECISION)
                        dx2 = tl.dot(tl.trans(Pd), d2, input_precision=PRECISION)
                        dv += dx2 * W2
                        dB += tl.dot(Pd, x2, input_precision=PRECISION) * d2.to(tl.float32) - x2.to(tl.float32) * dx2
                dPd = tl.where(causal, dP, 0.0).to(dtype)
                dq = tl.dot(d, tl.trans(S), input_precision=PRECISION)
                dq = tl.dot(dPd, kd, dq, input_precision=PRECISION)
                dk = tl.dot(tl.trans(dPd), qd, dk, input_precision=PRECISION)
                dS = tl.dot(tl.trans(qd), d, dS, input_precision=PRECISION)
            else:
                qd = (q * E).to(dtype)
                d = do.to(dtype)
                P = tl.where(causal, tl.dot(qd, tl.trans(kd), input_precision=PRECISION), 0.0)
                dP = tl.dot(d, tl.trans(x), input_precision=PRECISION)
                dPd = tl.where(causal, dP, 0.0).to(dtype)
                dq = tl.dot(d, tl.trans(S), input_precision=PRECISION)
                dq = tl.dot(dPd, kd, dq, input_precision=PRECISION)
                dk = tl.dot(tl.trans(dPd), qd, dk, input_precision=PRECISION)
                dS = tl.dot(tl.trans(qd), d, dS, input_precision=PRECISION)
                dB += qd.to(tl.float32) * dq
                dq *= E
                if more:
                    start = end
                    while tl.min(start, 0) < C:
                        _, E2, W2, start = next_piece(g, rows, start)
                        q2 = (q * E2).to(dtype)
                        k2 = (k * W2).to(dtype)
                        P2 = tl.dot(q2, tl.trans(k2), input_precision=PRECISION)
                        P += tl.where(causal, P2, 0.0)
                        dq2 = tl.dot(dPd, k2, input_precision=PRECISION)
                        dk2 = tl.dot(tl.trans(dPd), q2, input_precision=PRECISION)
                        dq += dq2 * E2
                        df += dk2 * W2
                        dB += q2.to(tl.float32) * dq2 - k2.to(tl.float32) * dk2
                dx = tl.dot(tl.trans(P.to(dtype)), d, dx, input_precision=PRECISION)
            if SAFE_EXP:
                dq *= q
            store_tile(dq_ptr + j * K, t, inside, H * G * K, ki, K, dq * tl.exp2(-LIFTED))
        if AXIS == "value":
            dB -= x.to(tl.float32) * dx
            dv += dx * W
        else:
            dB -= kd.to(tl.float32) * dk
            dk = df + dk * W
            dv = dx
        if SAFE_EXP:
            dk *= k
        store_tile(dk_ptr, t, inside, H * K, ki, K, tl.where(valid[:, None], dk * tl.exp2(-LIFTED), 0.0))
        store_tile(dv_ptr, t, inside, H * V, vi, V, tl.where(valid[:, None], dv * tl.exp2(-LIFTED), 0.0))
        if GATE != "none":
            dg = tl.where(valid[:, None], tl.cumsum(dB, 0, reverse=True) * tl.exp2(-LIFTED), 0.0)
            if GATE == "refined":
                a = load_tile(g_ptr, t, valid, g_step, di, D, 0.0)
                c = load_tile(r_ptr, t, valid, r_step, di, D, 0.0)
                dg, dr = refined_gradient(a, c, dg)
                store_tile(dr_ptr, t, inside, H * D, di, D, dr)
            store_tile(dg_ptr, t, inside, H * D, di, D, dg)
    tl.store(d_initial_ptr + here, dS * tl.exp2(-CENTRE - LIFTED), mask=state_mask)
