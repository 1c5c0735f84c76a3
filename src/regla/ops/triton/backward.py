"""The backward kernel: one program for each chunk of tokens of each head, in one launch, the last chunks first.

The gradient of the state passes from chunk to chunk as the state does in the forward kernel: a chunk passes on that of
the state before it as soon as it can, and then works on its values and its keys, one after the other, so that neither
holds registers while it is the other's turn.

Everything but the states before each chunk and the stabiliser is computed again. Of a chunk, with x = v W, k = k W,
q = q E in the factors of regla.ops.triton.tiles and d = d_out E,

    d_P = tril(d x^T)    d_x = P^T d    d_q = d_P k + d S^T    d_k = d_P^T q    d_S += q^T d

(in a chunk with far tokens all but what meets the state over the tree, and E = 2^B), and through the state after it,
with U its gradient and both operands decayed to the chunk's end,

    d_v_end = k_end U    d_k_end = v_end U^T    d_S += U decayed

An axis' log-decays take, summed from each token to the chunk's end, what every row read minus what every token wrote
(q d_q - k d_k, or out d - x d_x), and at the last token what the state after it is worth (the sums of S d_S and
k_end d_k_end). Both sides of each difference come from the same rounded factors, so that what must cancel does.
With a norm of q and k, d_q and d_k are those of the normalised logits; regla.ops.triton.norm takes them from there.
Gradients are kept 2^16 times what they are: so many powers of two lie between the small ones of a long batch, which
must not vanish where E is small, and those behind an outlier of e^100, which must not overflow.
"""

from __future__ import annotations

import triton
import triton.language as tl

from regla.ops.triton.forward import place
from regla.ops.triton.inputs import (
    ask_for_chunk,
    exponent,
    features_and_decays,
    gradient_operand,
    load_queries,
    load_state,
    query_operand,
    with_state,
)
from regla.ops.triton.norm import load_norm
from regla.ops.triton.passing import numbers_at, pass_state, take_state, untagged
from regla.ops.triton.tiles import (
    GRADIENT_LIFT,
    LOG2E,
    NO_KEY,
    RANGE,
    as_read,
    cumulative,
    decays,
    exp2,
    factors,
    faint,
    finite,
    gate_at,
    load_gate,
    lowest_decay,
    may_reach,
    nan_or,
    once,
    store_gate_gradient,
    store_tile,
    sums,
    to_the_end,
)
from regla.ops.triton.tree import chunk_scores, read_over_tree, score_over_tree


@triton.jit
def value_side(
    q_ptr, do_ptr, lower_ptr, norm, short, most, t, inside, valid, q, do, qd, d, P, k, v, gk, gv, Bk, Ek, Ev, kd, x, S,
    begin, h, scale, H, q_step,
    G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BS: tl.constexpr, C: tl.constexpr,
    KEYED: tl.constexpr, VALUED: tl.constexpr, SAFE_EXP: tl.constexpr, NORM: tl.constexpr,
    PRECISION: tl.constexpr, SLICED: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    """What the outputs of a chunk give to x (over the tree to v), to Bv, and, over the tree, to the last head's
    scores. P: the scores, where SLICED."""
    dtype = S.dtype
    dx = tl.zeros([C, BS], tl.float32)
    dBv = tl.zeros([C, BS], tl.float32)
    dP = tl.zeros([C, C], tl.float32)
    for j in range(G):
        if G > 1:
            q, do, qd, d = load_queries(
                q_ptr, do_ptr, lower_ptr, norm, j, t, inside, valid, Ek, Ev, begin, h, scale, H, q_step,
                dtype, G, K, V, BK, BS, KEYED, VALUED, SAFE_EXP, NORM,
            )  # fmt: skip
            if FAR and KEYED and VALUED:
                _Ek, qd, d = with_state(q, do, Bk, Ev, 0.0, dtype, VALUED)
        Pd = P if SLICED else chunk_scores(q, qd, k, kd, gk, short, KEYED, VALUED, PRECISION, FAR)
        if VALUED:
            out = tl.dot(qd, S, input_precision=PRECISION)
            if not FAR:
                out = tl.dot(Pd, x, out, input_precision=PRECISION)
            dBv += out * d.to(tl.float32)
        if VALUED and FAR:
            dx, dBv, dP = read_over_tree(Pd, do, v, gv, dx, dBv, short, most, PRECISION, not KEYED)
        else:
            dx = tl.dot(tl.trans(Pd), d, dx, input_precision=PRECISION)
    if VALUED and not FAR:
        dBv -= x.to(tl.float32) * dx
    return dx, dBv, dP


@triton.jit
def key_side(
    q_ptr, do_ptr, lower_ptr, dq_ptr, norm, short, most, t, inside, valid, q, do, qd, d, ds, k, v, gk, gv, Bk, Ek, Ev,
    kd, x, S, dP_given, dq_read, begin, h, scale, H, q_step, dq_step,
    G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BS: tl.constexpr, C: tl.constexpr,
    KEYED: tl.constexpr, VALUED: tl.constexpr, SAFE_EXP: tl.constexpr, NORM: tl.constexpr,
    PRECISION: tl.constexpr, SLICED: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    """What the outputs of a chunk give to kd (over the tree to k) and to Bk, and dq, written. dP_given: what the
    scores get, where SLICED, and over the tree of the values; dq_read: what qd gets of the state, where SLICED."""
    rows = tl.arange(0, C)
    ki = tl.arange(0, BK)
    causal = rows[:, None] >= rows[None, :]
    dtype = kd.dtype
    lift: tl.constexpr = GRADIENT_LIFT if SAFE_EXP else 0.0
    SCALED: tl.constexpr = FAR and KEYED
    dkd = tl.zeros([C, BK], tl.float32)
    dBk = tl.zeros([C, BK], tl.float32)
    for j in range(G):
        if G > 1:
            q, do, qd, d = load_queries(
                q_ptr, do_ptr, lower_ptr, norm, j, t, inside, valid, Ek, Ev, begin, h, scale, H, q_step,
                dtype, G, K, V, BK, BS, KEYED, VALUED, SAFE_EXP, NORM,
            )  # fmt: skip
            ds = d
            if SCALED:
                Ek, qd, ds = with_state(q, do, Bk, Ev, exponent(do), dtype, VALUED)
        if SLICED:
            dP = dP_given
        elif VALUED and FAR:
            if G > 1:  # of this head; the other results are not used
                none = tl.zeros([C, C], dtype)
                _dv, _dBv, dP_given = read_over_tree(none, do, v, gv, v, v, short, most, PRECISION, not KEYED)
            dP = dP_given
        else:
            dP = tl.dot(d, tl.trans(x), input_precision=PRECISION)
        dPd = tl.where(causal, dP, 0.0).to(dtype)
        dq = dq_read if SLICED else tl.dot(ds, tl.trans(S), input_precision=PRECISION)
        if not (KEYED and FAR):
            dq = tl.dot(dPd, kd, dq, input_precision=PRECISION)
            dkd = tl.dot(tl.trans(dPd), qd, dkd, input_precision=PRECISION)
        if FAR:
            dq = finite(dq, most)
        read = qd.to(tl.float32) * dq  # without FAR the gradient of q's logits, too: neither q nor E is kept for it
        if KEYED:
            dBk += read
            dq *= Ek
            if FAR:
                dq, dkd, dBk = score_over_tree(dPd, q, k, gk, dq, dkd, dBk, short, most, PRECISION, not VALUED)
        if SAFE_EXP:
            dq = dq * q if FAR else read
        store_tile(dq_ptr + j * K, t, inside, dq_step, ki, K, dq * (2.0 ** (-lift)))
    if KEYED and not FAR:
        dBk -= kd.to(tl.float32) * dkd
    return dkd, dBk


@triton.jit
def finish(
    q_ptr, gk_ptr, rk_ptr, gv_ptr, rv_ptr, do_ptr, lower_ptr, states_ptr, d_final_ptr,
    dq_ptr, dk_ptr, dv_ptr, dgk_ptr, drk_ptr, dgv_ptr, drv_ptr, d_initial_ptr, passed_ptr,
    q, dos, factor, S_next, k, vs, gk, gv, norm, t, inside, valid, begin, head, h, i, count, at, scale, H,
    q_step, gk_step, rk_step, gv_step, rv_step,
    dq_step, dk_step, dv_step, dgk_step, drk_step, dgv_step, drv_step,
    G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    KEY: tl.constexpr, VALUE: tl.constexpr, SAFE_EXP: tl.constexpr, NORM: tl.constexpr, D_FINAL: tl.constexpr,
    PRECISION: tl.constexpr, SLICES: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    """All gradients of the chunk, and pass on that of the state before it.

    vs, dos: v and d_o of the first head in slices [C, BV / SLICES]. S_next: the first slice [BK, BV / SLICES] of the
    state before the chunk; `at` is where that is in memory, for the others. SLICES: of the state's columns, taken one
    after the other; what all of them give queries and keys is summed up meanwhile.
    D_FINAL: whether that of the state after the last chunk is "none", "given", or 2^lift times as large
    ("lifted").
    """
    KEYED: tl.constexpr = KEY != "none" or (SAFE_EXP and VALUE == "none")
    VALUED: tl.constexpr = VALUE != "none"
    SLICED: tl.constexpr = SLICES > 1
    SCALED: tl.constexpr = FAR and KEYED
    tl.static_assert(not SLICED or (G == 1 and not VALUED))
    BS: tl.constexpr = BV // SLICES
    lift: tl.constexpr = GRADIENT_LIFT if SAFE_EXP else 0.0
    unit: tl.constexpr = 2.0 ** (-lift)
    ki = tl.arange(0, BK)
    dtype = S_next.dtype
    EXACT: tl.constexpr = dtype == tl.float32
    Ek, Wk = 0.0, 0.0
    kd = k.to(dtype)
    Bk, up = 0.0, 0.0
    short = False  # whether the tree may be, see there
    if FAR and SAFE_EXP and KEYED != VALUED:
        v = vs[0].to(tl.float32)
        weak = faint(k, v, valid, K, VALUED)
        if VALUED:  # nothing but zeros as values may be outputs of zero, whose gradients are huge
            weak |= valid & (tl.max(tl.abs(v), 1) == 0)
        short = tl.max(weak.to(tl.int32), 0) == 0
    if KEYED:
        Bk, total_k = cumulative(gk, EXACT, FAR)
        if FAR:
            Ek = exp2(Bk)
        else:
            Ek, Wk, ck = factors(Bk, total_k, 0, EXACT, False)
            kd = (k * Wk).to(dtype)
    worth_k = tl.zeros([BK], tl.float32)
    P, dq_read, dP_sum, dk_end = 0.0, 0.0, 0.0, 0.0
    passed_ptr += head.to(tl.int64) * 2 * BK * BV
    passing = count - 1 - i
    most = tl.full([], 1e37, tl.float32)  # of `finite`
    for s in tl.static_range(SLICES):
        v, do, S = vs[s].to(tl.float32), dos[s], S_next
        vi = tl.arange(0, BS) + s * BS
        here = head.to(tl.int64) * K * V + ki[:, None] * V + vi[None, :]
        state_mask = (ki < K)[:, None] & (vi < V)[None, :]
        Ev, Wv = 0.0, 0.0
        x = v.to(dtype)
        if VALUED:
            Bv, total_v = cumulative(gv, EXACT, FAR)
            if FAR:
                Ev = exp2(Bv)
            else:
                Ev, Wv, cv = factors(Bv, total_v, 0, EXACT, False)
                x = (v * Wv).to(dtype)
        if s == 0:  # not before the values' factors: the compiler would need more instructions
            q, qd = query_operand(q, Ek, norm, valid, dtype, K, KEYED, SAFE_EXP, NORM)
            if SCALED and not VALUED:
                up = tl.zeros([C, 1], tl.float32)
                for other in tl.static_range(SLICES):
                    raw, _d = gradient_operand(dos[other], factor, 0.0, scale, dtype, False, SAFE_EXP)
                    up = tl.maximum(up, exponent(raw))
            if SLICED:
                P = chunk_scores(q, qd, k, kd, gk, short, KEYED, VALUED, PRECISION, FAR)
                dq_read = tl.zeros([C, BK], tl.float32)
                dP_sum = tl.zeros([C, C], tl.float32)
                dk_end = tl.zeros([C, BK], tl.float32)
        do, d = gradient_operand(do, factor, Ev, scale, dtype, VALUED, SAFE_EXP)
        ds = d
        if SCALED:
            Ek, qd, ds = with_state(q, do, Bk, Ev, up, dtype, VALUED)
            if VALUED:  # over the tree d meets nothing else
                d = ds
        # The gradient of the state before the chunk, for the chunk before: it waits for nothing else.
        dS = tl.dot(tl.trans(qd), ds, input_precision=PRECISION)
        for j in range(1, G):
            q2, do2, qd2, d2 = load_queries(
                q_ptr, do_ptr, lower_ptr, norm, j, t, inside, valid, Ek, Ev, begin, h, scale, H, q_step,
                dtype, G, K, V, BK, BS, KEYED, VALUED, SAFE_EXP, NORM,
            )  # fmt: skip
            if SCALED:
                _E2, qd2, d2 = with_state(q2, do2, Bk, Ev, exponent(do2), dtype, VALUED)
            dS = tl.dot(tl.trans(qd2), d2, dS, input_precision=PRECISION)
        if KEYED and not FAR:  # q E and d_o E are 2^c too large
            dS *= exp2(-ck)[:, None]
        if VALUED and not FAR:
            dS *= exp2(-cv)[None, :]
        passed_at = passed_ptr + s * BS
        laid_out = numbers_at(passed_at, BK, BS, BV)
        if not (KEYED and VALUED):  # with both that costs registers which there are not
            dS = as_read(dS, laid_out)
        nothing = tl.zeros([BK, BS], tl.float32)
        if KEYED:
            keep_k = as_read(exp2(total_k)[:, None] + nothing, laid_out)
        if VALUED:
            keep_v = as_read(exp2(total_v)[None, :] + nothing, laid_out)
        U = nothing
        if D_FINAL == "none":
            if tl.program_id(0) >= 0:  # always, see the forward kernel
                U = take_state(passed_at, passing, BK, BS, BV, EXACT)
        elif i + 1 == count:
            U = tl.load(d_final_ptr + here, mask=state_mask, other=0.0)
            U *= 2.0 ** (0.0 if D_FINAL == "lifted" else lift)
        else:
            U = take_state(passed_at, passing, BK, BS, BV, EXACT)
        # Not by way of what is kept, which is wanted again below: held until then, it would cost registers.
        if KEYED and VALUED:
            dS = tl.fma(U * keep_k, keep_v, dS)
        elif KEYED:
            dS = tl.fma(U, keep_k, dS)
        elif VALUED:
            dS = tl.fma(U, keep_v, dS)
        else:
            dS += U
        if i > 0:
            pass_state(passed_at, passing + 1, dS, BV, EXACT)
        else:
            tl.store(d_initial_ptr + here, untagged(dS, EXACT) * unit, mask=state_mask)
        if s + 1 < SLICES:
            S_next = load_state(states_ptr, at, s + 1, K, V, BK, BS)
        S = once(S.to(tl.float32))
        kept = U  # what the state's decay is worth. U S alone may be infinite where what is kept of it is nothing
        if KEYED:
            kept *= keep_k
        if VALUED:
            kept *= keep_v
        kept *= S
        if KEYED:
            worth_k += tl.sum(kept, 1)
            if not FAR:
                S *= exp2(-ck)[:, None]
        if VALUED:
            worth_v = tl.sum(kept, 0)
            if not FAR:
                S *= exp2(-cv)[None, :]
        if FAR:  # with the safe exponential a NaN in k, v, the gates or S is one in the factors, and so in d
            most = nan_or(tl.sum(tl.sum(dS, 1), 0), most)
            if not SAFE_EXP:
                most = nan_or(tl.sum(tl.sum(k, 1), 0) + tl.sum(tl.sum(v, 1), 0) + tl.sum(tl.sum(kept, 1), 0), most)
        Sd = S.to(dtype)
        # The forward kernel's k_end and v_end, and of U the factor that v_end lacks where no token is far.
        k_end, v_end = kd, x  # for each slice again: held, it would cost registers
        if KEYED:
            if FAR:
                to_end_k = to_the_end(gk, PRECISION)
                k_end = (k * to_end_k).to(dtype)
            else:
                k_end = (kd.to(tl.float32) * exp2(total_k + ck)[None, :]).to(dtype)
        if VALUED and FAR:
            to_end_v = to_the_end(gv, PRECISION)
            v_end = (v * to_end_v).to(dtype)
        if VALUED and not FAR:
            U *= exp2(total_v + cv)[None, :]
        Ud = U.to(dtype)
        if SLICED:
            dq_read = tl.dot(ds, tl.trans(Sd), dq_read, input_precision=PRECISION)
            dk_end = tl.dot(v_end, tl.trans(Ud), dk_end, input_precision=PRECISION)
            dP_sum = tl.dot(d, tl.trans(x), dP_sum, input_precision=PRECISION)
        dv, dBv, dP = value_side(
            q_ptr, do_ptr, lower_ptr, norm, short, most, t, inside, valid, q, do, qd, d, P, k, v, gk, gv, Bk, Ek, Ev,
            kd, x, Sd, begin, h, scale, H, q_step,
            G, K, V, BK, BS, C, KEYED, VALUED, SAFE_EXP, NORM, PRECISION, SLICED, FAR,
        )  # fmt: skip
        gate, refine = load_gate(gv_ptr, rv_ptr, t, valid, gv_step, rv_step, vi, V, VALUE)
        dv_end = tl.dot(k_end, Ud, input_precision=PRECISION)
        if FAR:
            dv_end = finite(dv_end, most)
        if VALUED:
            written = v_end.to(tl.float32) * dv_end
            after = (worth_v + tl.sum(written, 0)) * unit
            dgv = sums(dBv - written, unit, True, EXACT) + after[None, :]
            store_gate_gradient(dgv_ptr, drv_ptr, t, inside, valid, dgv_step, drv_step, vi, V, gate, refine, dgv, VALUE)
        if VALUED and FAR:
            dv += dv_end * to_end_v
        else:
            dv += dv_end
            if VALUED:  # of x so far
                dv *= Wv
        store_tile(dv_ptr, t, inside, dv_step, vi, V, dv * unit)
    dk, dBk = key_side(
        q_ptr, do_ptr, lower_ptr, dq_ptr, norm, short, most, t, inside, valid, q, do, qd, d, ds, k, v, gk, gv, Bk, Ek,
        Ev, kd, x, Sd,
        dP_sum if SLICED else dP, dq_read,
        begin, h, scale, H, q_step, dq_step,
        G, K, V, BK, BS, C, KEYED, VALUED, SAFE_EXP, NORM, PRECISION, SLICED, FAR,
    )  # fmt: skip
    gate, refine = load_gate(gk_ptr, rk_ptr, t, valid, gk_step, rk_step, ki, K, KEY)
    if not SLICED:
        dk_end = tl.dot(v_end, tl.trans(Ud), input_precision=PRECISION)
    if FAR:
        dk_end = finite(dk_end, most)
    if KEYED:
        if FAR:
            written = k_end.to(tl.float32) * dk_end
            dk_end *= to_end_k
        else:
            dk_end *= exp2(total_k + ck)[None, :]
            written = kd.to(tl.float32) * dk_end
        after = (worth_k + tl.sum(written, 0)) * unit
        dgk = sums(dBk - written, unit, True, EXACT) + after[None, :]
        store_gate_gradient(dgk_ptr, drk_ptr, t, inside, valid, dgk_step, drk_step, ki, K, gate, refine, dgk, KEY)
    dk += dk_end
    if not FAR:  # of kd so far
        if KEYED and not SAFE_EXP:
            dk *= Wk
        k = kd.to(tl.float32)
    if SAFE_EXP:
        dk *= k
    store_tile(dk_ptr, t, inside, dk_step, ki, K, dk * unit)


@triton.jit(noinline=True)
def finish_with_tree(
    q_ptr, k_ptr, v_ptr, gk_ptr, rk_ptr, gv_ptr, rv_ptr, qw_ptr, kw_ptr, mask_ptr, m_ptr, lower_ptr, states_ptr, do_ptr,
    d_final_ptr,
    dq_ptr, dk_ptr, dv_ptr, dgk_ptr, drk_ptr, dgv_ptr, drv_ptr, d_initial_ptr, passed_ptr,
    before, begin, length, past, head, h, i, count, at, scale, eps, H,
    q_step, k_step, v_step, gk_step, rk_step, gv_step, rv_step,
    dq_step, dk_step, dv_step, dgk_step, drk_step, dgv_step, drv_step,
    G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    KEY: tl.constexpr, VALUE: tl.constexpr, SAFE_EXP: tl.constexpr, NORM: tl.constexpr,
    MASKED: tl.constexpr, INITIAL: tl.constexpr, D_FINAL: tl.constexpr, PRECISION: tl.constexpr,
    SLICES: tl.constexpr,
):  # fmt: skip
    """`finish` of a chunk with far tokens; see the one of the forward kernel."""
    t = tl.arange(0, C)
    inside = t < length - i * C
    valid = inside
    if MASKED:
        valid = inside & (tl.load(mask_ptr + begin + t, mask=inside, other=0) != 0)
    q, dos, factor, S, k, vs, gk, rk, gv, rv, m, m_before = ask_for_chunk(
        q_ptr, k_ptr, v_ptr, gk_ptr, rk_ptr, gv_ptr, rv_ptr, m_ptr, lower_ptr, states_ptr, do_ptr, before,
        t, inside, valid, begin, h, past + i, at, H, q_step, k_step, v_step, gk_step, rk_step, gv_step, rv_step,
        G, K, V, BK, BV, SLICES, KEY, VALUE, SAFE_EXP, NORM,
    )  # fmt: skip
    qw, kw = load_norm(qw_ptr, kw_ptr, K, BK, NORM)
    norm = qw, kw, eps
    k, gk, gv = features_and_decays(
        k, gk, rk, gv, rv, m, m_before, norm, valid, K, V, BK, BV, KEY, VALUE, SAFE_EXP, NORM, INITIAL
    )
    finish(
        q_ptr, gk_ptr, rk_ptr, gv_ptr, rv_ptr, do_ptr, lower_ptr, states_ptr, d_final_ptr,
        dq_ptr, dk_ptr, dv_ptr, dgk_ptr, drk_ptr, dgv_ptr, drv_ptr, d_initial_ptr, passed_ptr,
        q, dos, factor, S, k, vs, gk, gv, norm, t, inside, valid, begin, head, h, i, count, at, scale, H,
        q_step, gk_step, rk_step, gv_step, rv_step,
        dq_step, dk_step, dv_step, dgk_step, drk_step, dgv_step, drv_step,
        G, K, V, BK, BV, C, KEY, VALUE, SAFE_EXP, NORM, D_FINAL, PRECISION, SLICES, True,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T", "chunks", "part", "parts", "segments"])
def backward_kernel(
    q_ptr, k_ptr, v_ptr, gk_ptr, rk_ptr, gv_ptr, rv_ptr, qw_ptr, kw_ptr, mask_ptr, cu_ptr, slot_ptr, before_ptr,
    m_ptr, lower_ptr, states_ptr, do_ptr, d_final_ptr,
    dq_ptr, dk_ptr, dv_ptr, dgk_ptr, drk_ptr, dgv_ptr, drv_ptr, d_initial_ptr, passed_ptr,
    scale, eps, T, chunks, part, parts, segments, H,
    q_step, k_step, v_step, gk_step, rk_step, gv_step, rv_step,
    dq_step, dk_step, dv_step, dgk_step, drk_step, dgv_step, drv_step,
    G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    KEY: tl.constexpr, VALUE: tl.constexpr, SAFE_EXP: tl.constexpr, NORM: tl.constexpr,
    MASKED: tl.constexpr, VARLEN: tl.constexpr, SPLIT: tl.constexpr, INITIAL: tl.constexpr, D_FINAL: tl.constexpr,
    PRECISION: tl.constexpr, SLICES: tl.constexpr, ONE_PATH: tl.constexpr,
):  # fmt: skip
    n, h, i, count, begin, length, past, slot = place(
        passed_ptr, cu_ptr, slot_ptr, T, chunks, part, parts, segments, H, BK, BV, C, VARLEN, SPLIT, True
    )
    if n >= 0:
        head = n * H + h
        before = tl.full([], NO_KEY, tl.float32)
        if SAFE_EXP and INITIAL:
            before = tl.load(before_ptr + (n // parts * H + h if SPLIT else head)) * LOG2E
        begin += i * C
        m_ptr += begin * H + h
        q_ptr += begin * q_step + h * G * K
        k_ptr += begin * k_step + h * K
        v_ptr += begin * v_step + h * V
        do_ptr += begin * (H * G * V) + h * G * V
        dq_ptr += begin * dq_step + h * G * K
        dk_ptr += begin * dk_step + h * K
        dv_ptr += begin * dv_step + h * V
        gk_at, rk_at = gate_at(gk_ptr, rk_ptr, begin, h, gk_step, rk_step, K, KEY)
        gv_at, rv_at = gate_at(gv_ptr, rv_ptr, begin, h, gv_step, rv_step, V, VALUE)
        dgk_at, drk_at = gate_at(dgk_ptr, drk_ptr, begin, h, dgk_step, drk_step, K, KEY)
        dgv_at, drv_at = gate_at(dgv_ptr, drv_ptr, begin, h, dgv_step, drv_step, V, VALUE)
        t = tl.arange(0, C)
        inside = t < length - i * C
        valid = inside
        if MASKED:
            valid = inside & (tl.load(mask_ptr + begin + t, mask=inside, other=0) != 0)
        at = (slot * H + h) * K * V
        q, dos, factor, S, k, vs, gk, rk, gv, rv, m, m_before = ask_for_chunk(
            q_ptr, k_ptr, v_ptr, gk_at, rk_at, gv_at, rv_at, m_ptr, lower_ptr, states_ptr, do_ptr, before,
            t, inside, valid, begin, h, past + i, at, H, q_step, k_step, v_step, gk_step, rk_step, gv_step, rv_step,
            G, K, V, BK, BV, SLICES, KEY, VALUE, SAFE_EXP, NORM,
        )  # fmt: skip
        far = False
        if not ONE_PATH:
            if SAFE_EXP:  # the forward kernel has left word
                lowest = factor
                for j in range(1, G):
                    at_head = lower_ptr + (begin + t) * (H * G) + h * G + j
                    lowest = tl.minimum(lowest, tl.load(at_head, mask=inside, other=0.0))
                far = tl.min(lowest, 0) < 0
            else:
                far = may_reach(lowest_decay(decays(gk, rk, C, BK, KEY), decays(gv, rv, C, BV, VALUE)), RANGE)
        if far:
            finish_with_tree(
                q_ptr, k_ptr, v_ptr, gk_at, rk_at, gv_at, rv_at, qw_ptr, kw_ptr, mask_ptr, m_ptr, lower_ptr, states_ptr,
                do_ptr, d_final_ptr, dq_ptr, dk_ptr, dv_ptr, dgk_at, drk_at, dgv_at, drv_at,
                d_initial_ptr, passed_ptr,
                before, begin, length, past, head, h, i, count, at, scale, eps, H,
                q_step, k_step, v_step, gk_step, rk_step, gv_step, rv_step,
                dq_step, dk_step, dv_step, dgk_step, drk_step, dgv_step, drv_step,
                G, K, V, BK, BV, C, KEY, VALUE, SAFE_EXP, NORM, MASKED, INITIAL, D_FINAL, PRECISION,
                SLICES,
            )  # fmt: skip
        else:
            qw, kw = load_norm(qw_ptr, kw_ptr, K, BK, NORM)
            norm = qw, kw, eps
            features, decays_k, decays_v = features_and_decays(
                k, gk, rk, gv, rv, m, m_before, norm, valid, K, V, BK, BV, KEY, VALUE, SAFE_EXP, NORM, INITIAL
            )
            finish(
                q_ptr, gk_at, rk_at, gv_at, rv_at, do_ptr, lower_ptr, states_ptr, d_final_ptr,
                dq_ptr, dk_ptr, dv_ptr, dgk_at, drk_at, dgv_at, drv_at, d_initial_ptr, passed_ptr,
                q, dos, factor, S, features, vs, decays_k, decays_v, norm,
                t, inside, valid, begin, head, h, i, count, at, scale, H,
                q_step, gk_step, rk_step, gv_step, rv_step,
                dq_step, dk_step, dv_step, dgk_step, drk_step, dgv_step, drv_step,
                G, K, V, BK, BV, C, KEY, VALUE, SAFE_EXP, NORM, D_FINAL, PRECISION, SLICES, ONE_PATH,
            )  # fmt: skip
