"""The backward kernel: one program for each chunk of tokens of each head, in one launch, the last chunks first.

The gradient of the state passes from chunk to chunk as the state does in the forward kernel.

Everything but the states before each chunk and the stabiliser is computed again. Of a chunk, with x = v W, k = k W,
q = q E in the factors of regla.ops.triton.tiles and d = d_out E,

    d_P = tril(d x^T)    d_x = P^T d    d_q = d_P k + d S^T    d_k = d_P^T q    d_S += q^T d

and through the state after it, with U its gradient and both operands decayed to the chunk's end,

    d_v_end = k_end U    d_k_end = v_end U^T    d_S = U decayed

An axis' log-decays take, summed from each token to the chunk's end, what every row read minus what every token wrote
(q d_q - k d_k, or out d - x d_x), and at the last token what the state after it is worth (the sums of S d_S and
k_end d_k_end). Both sides of each difference come from the same rounded factors, so that what must cancel does.
Gradients are kept 2^24 times what they are: so many powers of two lie between the small ones of a long batch, which
must not vanish where E is small, and those behind an outlier of e^100, which must not overflow.
"""

from __future__ import annotations

import triton
import triton.language as tl

from regla.ops.triton.forward import load_gates, load_keys, place, query_features
from regla.ops.triton.tiles import (
    CENTRE,
    LOG2E,
    NO_KEY,
    cumulative,
    end_of_first,
    exp2,
    first_weight,
    load_tile,
    next_piece,
    publish,
    store_gate_gradient,
    store_tile,
    to_the_end,
    wait_until,
)


@triton.jit
def load_queries(
    q_ptr, do_ptr, lower_ptr, j, t, inside, valid, Bk, Bv, begin, h, scale, H, q_step,
    G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    KEYED: tl.constexpr, VALUED: tl.constexpr, SAFE_EXP: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """(query features, gradients of the outputs, the operands q E and d) of query head j of the group."""
    ki, vi = tl.arange(0, BK), tl.arange(0, BV)
    q = load_tile(q_ptr + j * K, t, valid, q_step, ki, K, float("-inf") if SAFE_EXP else 0.0)
    do = load_tile(do_ptr + j * V, t, valid, H * G * V, vi, V, 0.0)
    if SAFE_EXP:
        q = query_features(q)
        factor = tl.load(lower_ptr + (begin + t) * (H * G) + h * G + j, mask=inside, other=0.0)
        do *= (factor * (scale * 2.0**24))[:, None]
    else:
        do *= scale
    qd, d = q, do
    if KEYED:
        qd *= exp2(Bk + CENTRE)
    if VALUED:
        d *= exp2(Bv + CENTRE)
    return q, do, qd.to(dtype), d.to(dtype)


@triton.jit
def rest(
    q_ptr, k_ptr, v_ptr, gk_ptr, rk_ptr, gv_ptr, rv_ptr, lower_ptr, state_ptr, do_ptr,
    dq_ptr, dk_ptr, dv_ptr, dgk_ptr, drk_ptr, dgv_ptr, drv_ptr,
    t, inside, valid, m, m_before, Bk, Bv, total_k, total_v, worth_k, worth_v, Ud, begin, h, scale, H,
    q_step, k_step, v_step, gk_step, rk_step, gv_step, rv_step,
    G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    KEY: tl.constexpr, VALUE: tl.constexpr, SAFE_EXP: tl.constexpr, PRECISION: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Everything but the gradient of the state before the chunk, from Ud, that of the state after it.

    PIECES: whether a channel has several.
    """
    KEYED: tl.constexpr = KEY != "none" or (SAFE_EXP and VALUE == "none")
    VALUED: tl.constexpr = VALUE != "none"
    lift: tl.constexpr = 24.0 if SAFE_EXP else 0.0
    rows = tl.arange(0, C)
    ki, vi = tl.arange(0, BK), tl.arange(0, BV)
    is_last = (rows == C - 1)[:, None]
    causal = rows[:, None] >= rows[None, :]
    dtype = v_ptr.dtype.element_ty
    gk, gv = Bk, Bv
    if PIECES:
        gk, gv = load_gates(
            gk_ptr, rk_ptr, gv_ptr, rv_ptr, t, valid, m, m_before, gk_step, rk_step, gv_step, rv_step,
            K, V, BK, BV, KEY, VALUE, SAFE_EXP,
        )  # fmt: skip
    S = tl.load(state_ptr + ki[:, None] * V + vi[None, :], mask=(ki < K)[:, None] & (vi < V)[None, :], other=0.0)
    k = load_keys(k_ptr, t, valid, m, k_step, K, BK, SAFE_EXP)
    v = load_tile(v_ptr, t, valid, v_step, vi, V, 0.0)
    k_end, v_end, kd, x = k, v, k, v
    if KEYED:
        k_end *= to_the_end(gk, rows, Bk, total_k, PIECES)
        kd *= first_weight(Bk, PIECES)
    if VALUED:
        v_end *= to_the_end(gv, rows, Bv, total_v, PIECES)
        x *= first_weight(Bv, PIECES)
    k_end, v_end, kd, x = k_end.to(dtype), v_end.to(dtype), kd.to(dtype), x.to(dtype)
    tl.debug_barrier()  # keeps loads of what follows out of what precedes: registers are scarce
    # Through the outputs.
    dkd = tl.zeros([BK, C], tl.float32)
    dx = tl.zeros([BV, C], tl.float32)
    dBk = tl.zeros([C, BK], tl.float32)
    dBv = tl.zeros([C, BV], tl.float32)
    if PIECES:  # of all but the first
        dk = tl.zeros([C, BK], tl.float32)
        dv = tl.zeros([C, BV], tl.float32)
    for j in range(G):
        q, do, qd, d = load_queries(
            q_ptr, do_ptr, lower_ptr, j, t, inside, valid, Bk, Bv, begin, h, scale, H, q_step,
            G, K, V, BK, BV, KEYED, VALUED, SAFE_EXP, dtype,
        )  # fmt: skip
        P = tl.where(causal, tl.dot(qd, tl.trans(kd), input_precision=PRECISION), 0.0)
        if KEYED and PIECES:
            start = end_of_first(Bk)
            while tl.min(start, 0) < C:
                _Bk, E2, W2, start = next_piece(gk, rows, start)
                P2 = tl.dot((q * E2).to(dtype), tl.trans((k * W2).to(dtype)), input_precision=PRECISION)
                P += tl.where(causal, P2, 0.0)
        Pd = P.to(dtype)
        dP = tl.dot(d, tl.trans(x), input_precision=PRECISION)
        dx = tl.dot(tl.trans(d), Pd, dx, input_precision=PRECISION)
        if VALUED:
            out = tl.dot(tl.trans(S), tl.trans(qd), input_precision=PRECISION)
            out = tl.dot(tl.trans(x), tl.trans(Pd), out, input_precision=PRECISION)
            dBv += tl.trans(out) * d.to(tl.float32)
            if PIECES:
                start = end_of_first(Bv)
                while tl.min(start, 0) < C:
                    _Bv, E2, W2, start = next_piece(gv, rows, start)
                    x2 = (v * W2).to(dtype)
                    d2 = (do * E2).to(dtype)
                    dP += tl.dot(d2, tl.trans(x2), input_precision=PRECISION)
                    dx2 = tl.dot(tl.trans(Pd), d2, input_precision=PRECISION)
                    dv += dx2 * W2
                    read = tl.dot(Pd, x2, input_precision=PRECISION) * d2.to(tl.float32)
                    dBv += read - x2.to(tl.float32) * dx2
        dPd = tl.where(causal, dP, 0.0).to(dtype)
        dq = tl.dot(S, tl.trans(d), input_precision=PRECISION)
        dq = tl.trans(tl.dot(tl.trans(kd), tl.trans(dPd), dq, input_precision=PRECISION))
        dkd = tl.dot(tl.trans(qd), dPd, dkd, input_precision=PRECISION)
        if KEYED:
            dBk += qd.to(tl.float32) * dq
            dq *= exp2(Bk + CENTRE)
            if PIECES:
                start = end_of_first(Bk)
                while tl.min(start, 0) < C:
                    _Bk, E2, W2, start = next_piece(gk, rows, start)
                    q2 = (q * E2).to(dtype)
                    k2 = (k * W2).to(dtype)
                    dq2 = tl.dot(dPd, k2, input_precision=PRECISION)
                    dk2 = tl.dot(tl.trans(dPd), q2, input_precision=PRECISION)
                    dq += dq2 * E2
                    dk += dk2 * W2
                    dBk += q2.to(tl.float32) * dq2 - k2.to(tl.float32) * dk2
        if SAFE_EXP:
            dq *= q
        store_tile(dq_ptr + j * K, t, inside, H * G * K, ki, K, dq * (2.0 ** (-lift)))
    tl.debug_barrier()
    dkd, dx = tl.trans(dkd), tl.trans(dx)
    # Through the state after the chunk.
    dk_end = tl.trans(tl.dot(Ud, tl.trans(v_end), input_precision=PRECISION))
    dv_end = tl.trans(tl.dot(tl.trans(Ud), tl.trans(k_end), input_precision=PRECISION))
    if KEYED:
        written = k_end.to(tl.float32) * dk_end
        dBk += tl.where(is_last, (worth_k + tl.sum(written, 0))[None, :], 0.0) - written - kd.to(tl.float32) * dkd
        dk_end *= to_the_end(gk, rows, Bk, total_k, PIECES)
        dkd *= first_weight(Bk, PIECES)
        dgk = tl.cumsum(dBk, 0, reverse=True) * (2.0 ** (-lift))
        store_gate_gradient(
            gk_ptr, rk_ptr, dgk_ptr, drk_ptr, t, inside, valid, gk_step, rk_step, H * K, ki, K, dgk, KEY
        )
    if VALUED:
        written = v_end.to(tl.float32) * dv_end
        dBv += tl.where(is_last, (worth_v + tl.sum(written, 0))[None, :], 0.0) - written - x.to(tl.float32) * dx
        dv_end *= to_the_end(gv, rows, Bv, total_v, PIECES)
        dx *= first_weight(Bv, PIECES)
        dgv = tl.cumsum(dBv, 0, reverse=True) * (2.0 ** (-lift))
        store_gate_gradient(
            gv_ptr, rv_ptr, dgv_ptr, drv_ptr, t, inside, valid, gv_step, rv_step, H * V, vi, V, dgv, VALUE
        )
    dkd += dk_end
    dx += dv_end
    if PIECES:
        dkd += dk
        dx += dv
    if SAFE_EXP:
        dkd *= load_keys(k_ptr, t, valid, m, k_step, K, BK, SAFE_EXP)
    store_tile(dk_ptr, t, inside, H * K, ki, K, tl.where(valid[:, None], dkd * (2.0 ** (-lift)), 0.0))
    store_tile(dv_ptr, t, inside, H * V, vi, V, tl.where(valid[:, None], dx * (2.0 ** (-lift)), 0.0))


@triton.jit
def backward_kernel(
    q_ptr, k_ptr, v_ptr, gk_ptr, rk_ptr, gv_ptr, rv_ptr, mask_ptr, cu_ptr, slot_ptr, before_ptr,
    m_ptr, lower_ptr, states_ptr, do_ptr, d_final_ptr,
    dq_ptr, dk_ptr, dv_ptr, dgk_ptr, drk_ptr, dgv_ptr, drv_ptr, d_initial_ptr, passed_ptr, flags_ptr,
    scale, T, chunks, sequences, H,
    q_step, k_step, v_step, gk_step, rk_step, gv_step, rv_step,
    G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    KEY: tl.constexpr, VALUE: tl.constexpr, SAFE_EXP: tl.constexpr,
    MASKED: tl.constexpr, VARLEN: tl.constexpr, INITIAL: tl.constexpr, D_FINAL: tl.constexpr,
    PRECISION: tl.constexpr, ONE_PATH: tl.constexpr,
):  # fmt: skip
    KEYED: tl.constexpr = KEY != "none" or (SAFE_EXP and VALUE == "none")
    VALUED: tl.constexpr = VALUE != "none"
    lift: tl.constexpr = 24.0 if SAFE_EXP else 0.0
    centre: tl.constexpr = CENTRE * ((1 if KEYED else 0) + (1 if VALUED else 0))
    n, h, i, count, begin, length, slot = place(cu_ptr, slot_ptr, T, chunks, sequences, H, C, VARLEN, True)
    if n >= 0:
        head = n * H + h
        rows = tl.arange(0, C)
        ki, vi = tl.arange(0, BK), tl.arange(0, BV)
        dtype = v_ptr.dtype.element_ty
        state_at = ki[:, None] * V + vi[None, :]
        state_mask = (ki < K)[:, None] & (vi < V)[None, :]
        here = head.to(tl.int64) * K * V + state_at
        before = tl.full([], NO_KEY, tl.float32)
        if SAFE_EXP and INITIAL:
            before = tl.load(before_ptr + head) * LOG2E
        q_ptr += begin * q_step + h * G * K
        k_ptr += begin * k_step + h * K
        v_ptr += begin * v_step + h * V
        do_ptr += begin * (H * G * V) + h * G * V
        dq_ptr += begin * (H * G * K) + h * G * K
        dk_ptr += begin * (H * K) + h * K
        dv_ptr += begin * (H * V) + h * V
        if KEY != "none":
            gk_ptr += begin * gk_step + h * K
            dgk_ptr += begin * (H * K) + h * K
        if KEY == "refined":
            rk_ptr += begin * rk_step + h * K
            drk_ptr += begin * (H * K) + h * K
        if VALUE != "none":
            gv_ptr += begin * gv_step + h * V
            dgv_ptr += begin * (H * V) + h * V
        if VALUE == "refined":
            rv_ptr += begin * rv_step + h * V
            drv_ptr += begin * (H * V) + h * V
        t = i * C + rows
        inside = t < length
        valid = inside
        if MASKED:
            valid = inside & (tl.load(mask_ptr + begin + t, mask=inside, other=0) != 0)
        m, m_before = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
        if SAFE_EXP:
            m_ptr += begin * H + h
            m = tl.load(m_ptr + t * H, mask=inside, other=0.0)
            earlier = tl.load(m_ptr + (t - 1) * H, mask=inside & (t > 0), other=0.0)
            m_before = tl.where(inside, tl.where(t > 0, earlier, before), 0.0)
        Bk, Bv = load_gates(
            gk_ptr, rk_ptr, gv_ptr, rv_ptr, t, valid, m, m_before, gk_step, rk_step, gv_step, rv_step,
            K, V, BK, BV, KEY, VALUE, SAFE_EXP,
        )  # fmt: skip
        total_k, total_v = tl.zeros([BK], tl.float32), tl.zeros([BV], tl.float32)
        more = False
        if KEYED:
            Bk, total_k, more = cumulative(Bk)
        if VALUED:
            Bv, total_v, more_v = cumulative(Bv)
            more |= more_v
        # The gradient of the state after the chunk, and at once that of the one before it for the chunk before.
        dS = tl.zeros([BK, BV], tl.float32)
        for j in range(G):
            _q, _do, qd, d = load_queries(
                q_ptr, do_ptr, lower_ptr, j, t, inside, valid, Bk, Bv, begin, h, scale, H, q_step,
                G, K, V, BK, BV, KEYED, VALUED, SAFE_EXP, dtype,
            )  # fmt: skip
            dS = tl.dot(tl.trans(qd), d, dS, input_precision=PRECISION)
        U = tl.zeros([BK, BV], tl.float32)
        passed_at = passed_ptr + head.to(tl.int64) * 2 * K * V + state_at
        if i + 1 < count:
            wait_until(flags_ptr + head, count - 1 - i)
            U = tl.load(passed_at + i % 2 * K * V, mask=state_mask, other=0.0, cache_modifier=".cg")
        elif D_FINAL:
            U = tl.load(d_final_ptr + here, mask=state_mask, other=0.0) * 2.0 ** (centre + lift)
        kept = U
        if KEYED:
            kept *= exp2(total_k)[:, None]
        if VALUED:
            kept *= exp2(total_v)[None, :]
        dS += kept
        if i > 0:
            tl.store(passed_at + (i + 1) % 2 * K * V, dS, mask=state_mask)
            publish(flags_ptr + head, count - i)
        else:
            tl.store(d_initial_ptr + here, dS * 2.0 ** (-centre - lift), mask=state_mask)
        state_ptr = states_ptr + (slot * H + h) * K * V
        worth = tl.load(state_ptr + state_at, mask=state_mask, other=0.0).to(tl.float32) * kept  # of the state's decay
        worth_k, worth_v = tl.sum(worth, 1), tl.sum(worth, 0)
        Ud = U.to(dtype)
        tl.debug_barrier()
        if ONE_PATH or more:
            rest(
                q_ptr, k_ptr, v_ptr, gk_ptr, rk_ptr, gv_ptr, rv_ptr, lower_ptr, state_ptr, do_ptr,
                dq_ptr, dk_ptr, dv_ptr, dgk_ptr, drk_ptr, dgv_ptr, drv_ptr,
                t, inside, valid, m, m_before, Bk, Bv, total_k, total_v, worth_k, worth_v, Ud, begin, h, scale, H,
                q_step, k_step, v_step, gk_step, rk_step, gv_step, rv_step,
                G, K, V, BK, BV, C, KEY, VALUE, SAFE_EXP, PRECISION, True,
            )  # fmt: skip
        else:
            rest(
                q_ptr, k_ptr, v_ptr, gk_ptr, rk_ptr, gv_ptr, rv_ptr, lower_ptr, state_ptr, do_ptr,
                dq_ptr, dk_ptr, dv_ptr, dgk_ptr, drk_ptr, dgv_ptr, drv_ptr,
                t, inside, valid, m, m_before, Bk, Bv, total_k, total_v, worth_k, worth_v, Ud, begin, h, scale, H,
                q_step, k_step, v_step, gk_step, rk_step, gv_step, rv_step,
                G, K, V, BK, BV, C, KEY, VALUE, SAFE_EXP, PRECISION, False,
            )  # fmt: skip
