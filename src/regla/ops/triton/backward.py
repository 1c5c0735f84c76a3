"""The backward kernel: one CTA for each chunk of tokens of each head, in one launch, the last chunks first.

The gradient of the state passes from chunk to chunk as the state does in the forward kernel. A chunk passes on the
gradient of the state before it as soon as it can. Then it computes the gradients of its values and after them those of
its keys, so that neither part holds registers during the other.

Everything but the states before each chunk, the stabiliser and the factors of the outputs is computed again. In a
chunk, with x = v W [C, V], k W [C, K], q E [C, K] in the factors of regla.ops.triton.tiles (below just k and q), and
d = d_out E [C, V],

    d_P = tril(d x^T)    d_x = P^T d    d_q = d_P k + d S^T    d_k = d_P^T q    d_S += q^T d

In a chunk with tokens out of range all of it goes over the tree, except for the products with S and d_S, and E = 2^B.
Through the state after the chunk, with U [K, V] its gradient and k_end, v_end the keys and values decayed to the
chunk's end,

    d_v_end = k_end U    d_k_end = v_end U^T    d_S += U decayed

The gradient of B_t, the cumulative log-decay of an axis, is what row t read minus what token t wrote (q d_q - k d_k, or
out d - x d_x) and, at the last token, the gradient through the decay of the state: the sums of S d_S and of
k_end d_k_end. The gradient of a token's log-decay is the sum of these from the token to the chunk's end. Both sides of
each difference come from the same rounded factors, so that what must cancel does.

With a norm of q and k, d_q and d_k are those of the normalised logits, and regla.ops.triton.norm continues from there.
Gradients are kept 2^16 times their size. That is a compromise: the small ones of a long batch must not vanish where E
is small, and those behind an outlier of e^100 must not overflow.

Names are those of regla.ops.triton.forward. A `d` as the last letter of kd, qd, Pd, Sd, Ud: as an operand of products,
factors included, in the dtype of the inputs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from regla.ops.triton.forward import assign_chunk
from regla.ops.triton.inputs import (
    Config,
    exponent,
    features_and_decays,
    gradient_operand,
    load_for_backward,
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
    cumulative,
    decays,
    exp2,
    factors,
    finite,
    gate_at,
    in_load_layout,
    load_gate,
    lowest_decay,
    materialised,
    may_leave_range,
    nan_or,
    store_gate_gradient,
    store_tile,
    sums,
    to_the_end,
    too_small,
)
from regla.ops.triton.tree import chunk_scores, read_over_tree, score_over_tree


@triton.jit
def value_side(
    q_ptr, do_ptr, factors_ptr, norm, short, cap, t, inside, valid, q, do, qd, d, P, k, v, gk, gv, Bk, Ek, Ev, kd, x,
    S, begin, h, scale, H, q_step, BS: tl.constexpr, SLICED: tl.constexpr, TREE: tl.constexpr, cfg: tl.constexpr,
):  # fmt: skip
    """Gradients through the outputs of a chunk, summed over the query heads: (of x [C, BS], or with TREE of v; of Bv
    [C, BS]; with TREE and a value axis that decays of the last head's scores [C, C]). P: the scores, where SLICED."""
    dtype = S.dtype
    dx = tl.zeros([cfg.C, BS], tl.float32)
    dBv = tl.zeros([cfg.C, BS], tl.float32)
    dP = tl.zeros([cfg.C, cfg.C], tl.float32)
    for j in range(cfg.G):
        if cfg.G > 1:
            q, do, qd, d = load_queries(
                q_ptr, do_ptr, factors_ptr, norm, j, t, inside, valid, Ek, Ev, begin, h, scale, H, q_step, dtype, BS,
                cfg,
            )  # fmt: skip
            if TREE and cfg.KEYED and cfg.VALUED:
                _Ek, qd, d = with_state(q, do, Bk, Ev, 0.0, dtype, cfg)
        Pd = P if SLICED else chunk_scores(q, qd, k, kd, gk, short, cfg.KEYED, cfg.VALUED, cfg.PRECISION, TREE)
        if cfg.VALUED:
            out = tl.dot(qd, S, input_precision=cfg.PRECISION)
            if not TREE:
                out = tl.dot(Pd, x, out, input_precision=cfg.PRECISION)
            dBv += out * d.to(tl.float32)
        if cfg.VALUED and TREE:
            dx, dBv, dP = read_over_tree(Pd, do, v, gv, dx, dBv, short, cap, cfg.PRECISION, not cfg.KEYED)
        else:
            dx = tl.dot(tl.trans(Pd), d, dx, input_precision=cfg.PRECISION)
    if cfg.VALUED and not TREE:
        dBv -= x.to(tl.float32) * dx
    return dx, dBv, dP


@triton.jit
def key_side(
    q_ptr, do_ptr, factors_ptr, dq_ptr, norm, short, cap, t, inside, valid, q, do, qd, d, ds, k, v, gk, gv, Bk, Ek, Ev,
    kd, x, S, dP_given, dq_read, begin, h, scale, H, q_step, dq_step, BS: tl.constexpr, SLICED: tl.constexpr, TREE:
    tl.constexpr, cfg: tl.constexpr,
):  # fmt: skip
    """Gradients through the outputs of a chunk, summed over the query heads: (of kd [C, BK], or with TREE of k; of Bk
    [C, BK]). Writes dq. dP_given: the gradient of the scores [C, C], where SLICED or over the tree of the values;
    dq_read: the gradient of qd through the state, where SLICED."""
    rows = tl.arange(0, cfg.C)
    ki = tl.arange(0, cfg.BK)
    causal = rows[:, None] >= rows[None, :]
    dtype = kd.dtype
    lift: tl.constexpr = GRADIENT_LIFT if cfg.SAFE_EXP else 0.0
    SCALED: tl.constexpr = TREE and cfg.KEYED
    dkd = tl.zeros([cfg.C, cfg.BK], tl.float32)
    dBk = tl.zeros([cfg.C, cfg.BK], tl.float32)
    for j in range(cfg.G):
        if cfg.G > 1:
            q, do, qd, d = load_queries(
                q_ptr, do_ptr, factors_ptr, norm, j, t, inside, valid, Ek, Ev, begin, h, scale, H, q_step, dtype, BS,
                cfg,
            )  # fmt: skip
            ds = d
            if SCALED:
                Ek, qd, ds = with_state(q, do, Bk, Ev, exponent(do), dtype, cfg)
        if SLICED:
            dP = dP_given
        elif cfg.VALUED and TREE:
            if cfg.G > 1:  # of this head; the other results are not used
                none = tl.zeros([cfg.C, cfg.C], dtype)
                _dv, _dBv, dP_given = read_over_tree(none, do, v, gv, v, v, short, cap, cfg.PRECISION, not cfg.KEYED)
            dP = dP_given
        else:
            dP = tl.dot(d, tl.trans(x), input_precision=cfg.PRECISION)
        dPd = tl.where(causal, dP, 0.0).to(dtype)
        dq = dq_read if SLICED else tl.dot(ds, tl.trans(S), input_precision=cfg.PRECISION)
        if not (cfg.KEYED and TREE):
            dq = tl.dot(dPd, kd, dq, input_precision=cfg.PRECISION)
            dkd = tl.dot(tl.trans(dPd), qd, dkd, input_precision=cfg.PRECISION)
        if TREE:
            dq = finite(dq, cap)
        read = qd.to(tl.float32) * dq  # without TREE also the gradient of q's logits: neither q nor E is kept for it
        if cfg.KEYED:
            dBk += read
            dq *= Ek
            if TREE:
                dq, dkd, dBk = score_over_tree(dPd, q, k, gk, dq, dkd, dBk, short, cap, cfg.PRECISION, not cfg.VALUED)
        if cfg.SAFE_EXP:
            dq = dq * q if TREE else read
        store_tile(dq_ptr + j * cfg.K, t, inside, dq_step, ki, cfg.K, dq * (2.0 ** (-lift)))
    if cfg.KEYED and not TREE:
        dBk -= kd.to(tl.float32) * dkd
    return dkd, dBk


@triton.jit
def compute_chunk(
    q_ptr, gk_ptr, rk_ptr, gv_ptr, rv_ptr, do_ptr, factors_ptr, states_ptr, d_final_ptr, dq_ptr, dk_ptr, dv_ptr,
    dgk_ptr, drk_ptr, dgv_ptr, drv_ptr, d_initial_ptr, passed_ptr, q, dos, factor, S_next, k, vs, gk, gv, norm, t,
    inside, valid, begin, head, h, i, count, at, scale, H, q_step, gk_step, rk_step, gv_step, rv_step, dq_step,
    dk_step, dv_step, dgk_step, drk_step, dgv_step, drv_step, D_FINAL: tl.constexpr, TREE: tl.constexpr, cfg:
    tl.constexpr,
):  # fmt: skip
    """All gradients of the chunk, and pass on that of the state before it.

    vs, dos: v and d_o of the first head in slices [C, BV / SLICES]. S_next: the first slice [BK, BV / SLICES] of the
    state before the chunk; `at` is where that is in memory, for the others. SLICES: of the state's columns, taken one
    after the other; what all of them give queries and keys is summed up meanwhile.
    D_FINAL: whether that of the state after the last chunk is "none", "given", or 2^lift times as large
    ("lifted").
    """
    SLICED: tl.constexpr = cfg.SLICES > 1
    SCALED: tl.constexpr = TREE and cfg.KEYED
    tl.static_assert(not SLICED or (cfg.G == 1 and not cfg.VALUED))
    BS: tl.constexpr = cfg.BV // cfg.SLICES
    lift: tl.constexpr = GRADIENT_LIFT if cfg.SAFE_EXP else 0.0
    unlift: tl.constexpr = 2.0 ** (-lift)
    ki = tl.arange(0, cfg.BK)
    dtype = S_next.dtype
    EXACT: tl.constexpr = dtype == tl.float32
    Ek, Wk = 0.0, 0.0
    kd = k.to(dtype)
    Bk, up = 0.0, 0.0
    short = False  # whether the tree may end early: `tree.read_and_write`
    if TREE and cfg.SAFE_EXP and cfg.KEYED != cfg.VALUED:
        v = vs[0].to(tl.float32)
        weak = too_small(k, v, valid, cfg.K, cfg.VALUED)
        if cfg.VALUED:  # nothing but zeros as values may be outputs of zero, whose gradients are huge
            weak |= valid & (tl.max(tl.abs(v), 1) == 0)
        short = tl.max(weak.to(tl.int32), 0) == 0
    if cfg.KEYED:
        Bk, total_k = cumulative(gk, EXACT, TREE)
        if TREE:
            Ek = exp2(Bk)
        else:
            Ek, Wk, ck = factors(Bk, total_k, 0, EXACT, False)
            kd = (k * Wk).to(dtype)
    worth_k = tl.zeros([cfg.BK], tl.float32)
    P, dq_read, dP_sum, dk_end = 0.0, 0.0, 0.0, 0.0
    passed_ptr += head.to(tl.int64) * 2 * cfg.BK * cfg.BV
    passing = count - 1 - i
    cap = tl.full([], 1e37, tl.float32)  # of `finite`
    for s in tl.static_range(cfg.SLICES):
        v, do, S = vs[s].to(tl.float32), dos[s], S_next
        vi = tl.arange(0, BS) + s * BS
        here = head.to(tl.int64) * cfg.K * cfg.V + ki[:, None] * cfg.V + vi[None, :]
        state_mask = (ki < cfg.K)[:, None] & (vi < cfg.V)[None, :]
        Ev, Wv = 0.0, 0.0
        x = v.to(dtype)
        if cfg.VALUED:
            Bv, total_v = cumulative(gv, EXACT, TREE)
            if TREE:
                Ev = exp2(Bv)
            else:
                Ev, Wv, cv = factors(Bv, total_v, 0, EXACT, False)
                x = (v * Wv).to(dtype)
        if s == 0:  # not before the values' factors: the compiler would need more instructions
            q, qd = query_operand(q, Ek, norm, valid, dtype, cfg)
            if SCALED and not cfg.VALUED:
                up = tl.zeros([cfg.C, 1], tl.float32)
                for other in tl.static_range(cfg.SLICES):
                    raw, _d = gradient_operand(dos[other], factor, 0.0, scale, dtype, cfg)
                    up = tl.maximum(up, exponent(raw))
            if SLICED:
                P = chunk_scores(q, qd, k, kd, gk, short, cfg.KEYED, cfg.VALUED, cfg.PRECISION, TREE)
                dq_read = tl.zeros([cfg.C, cfg.BK], tl.float32)
                dP_sum = tl.zeros([cfg.C, cfg.C], tl.float32)
                dk_end = tl.zeros([cfg.C, cfg.BK], tl.float32)
        do, d = gradient_operand(do, factor, Ev, scale, dtype, cfg)
        ds = d
        if SCALED:
            Ek, qd, ds = with_state(q, do, Bk, Ev, up, dtype, cfg)
            if cfg.VALUED:  # over the tree d meets nothing else
                d = ds
        # The gradient of the state before the chunk, for the chunk before: it waits for nothing else.
        dS = tl.dot(tl.trans(qd), ds, input_precision=cfg.PRECISION)
        for j in range(1, cfg.G):
            q2, do2, qd2, d2 = load_queries(
                q_ptr, do_ptr, factors_ptr, norm, j, t, inside, valid, Ek, Ev, begin, h, scale, H, q_step, dtype, BS,
                cfg,
            )  # fmt: skip
            if SCALED:
                _E2, qd2, d2 = with_state(q2, do2, Bk, Ev, exponent(do2), dtype, cfg)
            dS = tl.dot(tl.trans(qd2), d2, dS, input_precision=cfg.PRECISION)
        if cfg.KEYED and not TREE:  # q E and d_o E are 2^c too large
            dS *= exp2(-ck)[:, None]
        if cfg.VALUED and not TREE:
            dS *= exp2(-cv)[None, :]
        passed_at = passed_ptr + s * BS
        laid_out = numbers_at(passed_at, cfg.BK, BS, cfg.BV)
        if not (cfg.KEYED and cfg.VALUED):  # with both that costs registers which there are not
            dS = in_load_layout(dS, laid_out)
        nothing = tl.zeros([cfg.BK, BS], tl.float32)
        if cfg.KEYED:
            keep_k = in_load_layout(exp2(total_k)[:, None] + nothing, laid_out)
        if cfg.VALUED:
            keep_v = in_load_layout(exp2(total_v)[None, :] + nothing, laid_out)
        U = nothing
        if D_FINAL == "none":
            if tl.program_id(0) >= 0:  # always, see the forward kernel
                U = take_state(passed_at, passing, cfg.BK, BS, cfg.BV, EXACT)
        elif i + 1 == count:
            U = tl.load(d_final_ptr + here, mask=state_mask, other=0.0)
            U *= 2.0 ** (0.0 if D_FINAL == "lifted" else lift)
        else:
            U = take_state(passed_at, passing, cfg.BK, BS, cfg.BV, EXACT)
        # U times keep is computed again below: held until then, it would cost registers.
        if cfg.KEYED and cfg.VALUED:
            dS = tl.fma(U * keep_k, keep_v, dS)
        elif cfg.KEYED:
            dS = tl.fma(U, keep_k, dS)
        elif cfg.VALUED:
            dS = tl.fma(U, keep_v, dS)
        else:
            dS += U
        if i > 0:
            pass_state(passed_at, passing + 1, dS, cfg.BV, EXACT)
        else:
            tl.store(d_initial_ptr + here, untagged(dS, EXACT) * unlift, mask=state_mask)
        if s + 1 < cfg.SLICES:
            S_next = load_state(states_ptr, at, s + 1, BS, cfg)
        S = materialised(S.to(tl.float32))
        kept = U  # for the gradient of the decay. U S before the decay may be infinite where the decay is 0
        if cfg.KEYED:
            kept *= keep_k
        if cfg.VALUED:
            kept *= keep_v
        kept *= S
        if cfg.KEYED:
            worth_k += tl.sum(kept, 1)
            if not TREE:
                S *= exp2(-ck)[:, None]
        if cfg.VALUED:
            worth_v = tl.sum(kept, 0)
            if not TREE:
                S *= exp2(-cv)[None, :]
        if TREE:  # with the safe exponential a NaN in k, v, the gates or S is one in the factors, and so in d
            cap = nan_or(tl.sum(tl.sum(dS, 1), 0), cap)
            if not cfg.SAFE_EXP:
                cap = nan_or(tl.sum(tl.sum(k, 1), 0) + tl.sum(tl.sum(v, 1), 0) + tl.sum(tl.sum(kept, 1), 0), cap)
        Sd = S.to(dtype)
        # The forward kernel's k_end and v_end, and of U the factor that v_end lacks without TREE.
        k_end, v_end = kd, x  # for each slice again: held, it would cost registers
        if cfg.KEYED:
            if TREE:
                to_end_k = to_the_end(gk, cfg.PRECISION)
                k_end = (k * to_end_k).to(dtype)
            else:
                k_end = (kd.to(tl.float32) * exp2(total_k + ck)[None, :]).to(dtype)
        if cfg.VALUED and TREE:
            to_end_v = to_the_end(gv, cfg.PRECISION)
            v_end = (v * to_end_v).to(dtype)
        if cfg.VALUED and not TREE:
            U *= exp2(total_v + cv)[None, :]
        Ud = U.to(dtype)
        if SLICED:
            dq_read = tl.dot(ds, tl.trans(Sd), dq_read, input_precision=cfg.PRECISION)
            dk_end = tl.dot(v_end, tl.trans(Ud), dk_end, input_precision=cfg.PRECISION)
            dP_sum = tl.dot(d, tl.trans(x), dP_sum, input_precision=cfg.PRECISION)
        dv, dBv, dP = value_side(
            q_ptr, do_ptr, factors_ptr, norm, short, cap, t, inside, valid, q, do, qd, d, P, k, v, gk, gv, Bk, Ek, Ev,
            kd, x, Sd, begin, h, scale, H, q_step, BS, SLICED, TREE, cfg,
        )  # fmt: skip
        gate, refine = load_gate(gv_ptr, rv_ptr, t, valid, gv_step, rv_step, vi, cfg.V, cfg.VALUE)
        dv_end = tl.dot(k_end, Ud, input_precision=cfg.PRECISION)
        if TREE:
            dv_end = finite(dv_end, cap)
        if cfg.VALUED:
            written = v_end.to(tl.float32) * dv_end
            after = (worth_v + tl.sum(written, 0)) * unlift
            dgv = sums(dBv - written, unlift, True, EXACT) + after[None, :]
            store_gate_gradient(
                dgv_ptr, drv_ptr, t, inside, valid, dgv_step, drv_step, vi, cfg.V, gate, refine, dgv, cfg.VALUE
            )
        if cfg.VALUED and TREE:
            dv += dv_end * to_end_v
        else:
            dv += dv_end
            if cfg.VALUED:  # dv is that of x so far
                dv *= Wv
        store_tile(dv_ptr, t, inside, dv_step, vi, cfg.V, dv * unlift)
    dk, dBk = key_side(
        q_ptr, do_ptr, factors_ptr, dq_ptr, norm, short, cap, t, inside, valid, q, do, qd, d, ds, k, v, gk, gv, Bk, Ek,
        Ev, kd, x, Sd, dP_sum if SLICED else dP, dq_read, begin, h, scale, H, q_step, dq_step, BS, SLICED, TREE, cfg,
    )  # fmt: skip
    gate, refine = load_gate(gk_ptr, rk_ptr, t, valid, gk_step, rk_step, ki, cfg.K, cfg.KEY)
    if not SLICED:
        dk_end = tl.dot(v_end, tl.trans(Ud), input_precision=cfg.PRECISION)
    if TREE:
        dk_end = finite(dk_end, cap)
    if cfg.KEYED:
        if TREE:
            written = k_end.to(tl.float32) * dk_end
            dk_end *= to_end_k
        else:
            dk_end *= exp2(total_k + ck)[None, :]
            written = kd.to(tl.float32) * dk_end
        after = (worth_k + tl.sum(written, 0)) * unlift
        dgk = sums(dBk - written, unlift, True, EXACT) + after[None, :]
        store_gate_gradient(
            dgk_ptr, drk_ptr, t, inside, valid, dgk_step, drk_step, ki, cfg.K, gate, refine, dgk, cfg.KEY
        )
    dk += dk_end
    if not TREE:  # dk is that of kd so far
        if cfg.KEYED and not cfg.SAFE_EXP:
            dk *= Wk
        k = kd.to(tl.float32)
    if cfg.SAFE_EXP:
        dk *= k
    store_tile(dk_ptr, t, inside, dk_step, ki, cfg.K, dk * unlift)


@triton.jit(noinline=True)
def compute_over_tree(
    q_ptr, k_ptr, v_ptr, gk_ptr, rk_ptr, gv_ptr, rv_ptr, qw_ptr, kw_ptr, mask_ptr, m_ptr, factors_ptr, states_ptr,
    do_ptr, d_final_ptr, dq_ptr, dk_ptr, dv_ptr, dgk_ptr, drk_ptr, dgv_ptr, drv_ptr, d_initial_ptr, passed_ptr, before,
    begin, length, past, head, h, i, count, at, scale, eps, H, q_step, k_step, v_step, gk_step, rk_step, gv_step,
    rv_step, dq_step, dk_step, dv_step, dgk_step, drk_step, dgv_step, drv_step, MASKED: tl.constexpr, D_FINAL:
    tl.constexpr, cfg: tl.constexpr,
):  # fmt: skip
    """`compute_chunk` of a chunk with tokens out of range; see the one of the forward kernel."""
    t = tl.arange(0, cfg.C)
    inside = t < length - i * cfg.C
    valid = inside
    if MASKED:
        valid = inside & (tl.load(mask_ptr + begin + t, mask=inside, other=0) != 0)
    q, dos, factor, S, k, vs, gk, rk, gv, rv, m, m_before = load_for_backward(
        q_ptr, k_ptr, v_ptr, gk_ptr, rk_ptr, gv_ptr, rv_ptr, m_ptr, factors_ptr, states_ptr, do_ptr, before, t, inside,
        valid, begin, h, past + i, at, H, q_step, k_step, v_step, gk_step, rk_step, gv_step, rv_step, cfg,
    )  # fmt: skip
    qw, kw = load_norm(qw_ptr, kw_ptr, cfg.K, cfg.BK, cfg.NORM)
    norm = qw, kw, eps
    k, gk, gv = features_and_decays(k, gk, rk, gv, rv, m, m_before, norm, valid, cfg)
    compute_chunk(
        q_ptr, gk_ptr, rk_ptr, gv_ptr, rv_ptr, do_ptr, factors_ptr, states_ptr, d_final_ptr, dq_ptr, dk_ptr, dv_ptr,
        dgk_ptr, drk_ptr, dgv_ptr, drv_ptr, d_initial_ptr, passed_ptr, q, dos, factor, S, k, vs, gk, gv, norm, t,
        inside, valid, begin, head, h, i, count, at, scale, H, q_step, gk_step, rk_step, gv_step, rv_step, dq_step,
        dk_step, dv_step, dgk_step, drk_step, dgv_step, drv_step, D_FINAL, True, cfg,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T", "chunks", "part", "parts", "segments"])
def backward_kernel(
    q_ptr, k_ptr, v_ptr, gk_ptr, rk_ptr, gv_ptr, rv_ptr, qw_ptr, kw_ptr, mask_ptr, cu_ptr, slot_ptr, before_ptr,
    m_ptr, factors_ptr, states_ptr, do_ptr, d_final_ptr,
    dq_ptr, dk_ptr, dv_ptr, dgk_ptr, drk_ptr, dgv_ptr, drv_ptr, d_initial_ptr, passed_ptr,
    scale, eps, T, chunks, part, parts, segments, H,
    q_step, k_step, v_step, gk_step, rk_step, gv_step, rv_step,
    dq_step, dk_step, dv_step, dgk_step, drk_step, dgv_step, drv_step,
    G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    KEY: tl.constexpr, VALUE: tl.constexpr, SAFE_EXP: tl.constexpr, NORM: tl.constexpr,
    MASKED: tl.constexpr, VARLEN: tl.constexpr, SPLIT: tl.constexpr, INITIAL: tl.constexpr, D_FINAL: tl.constexpr,
    PRECISION: tl.constexpr, SLICES: tl.constexpr, ONE_PATH: tl.constexpr,
):  # fmt: skip
    KEYED: tl.constexpr = KEY != "none" or (SAFE_EXP and VALUE == "none")
    VALUED: tl.constexpr = VALUE != "none"
    cfg: tl.constexpr = Config(
        G, K, V, BK, BV, C, KEY, VALUE, KEYED, VALUED, SAFE_EXP, NORM, INITIAL, PRECISION, SLICES
    )
    n, h, i, count, begin, length, past, slot = assign_chunk(
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
        q, dos, factor, S, k, vs, gk, rk, gv, rv, m, m_before = load_for_backward(
            q_ptr, k_ptr, v_ptr, gk_at, rk_at, gv_at, rv_at, m_ptr, factors_ptr, states_ptr, do_ptr, before, t, inside,
            valid, begin, h, past + i, at, H, q_step, k_step, v_step, gk_step, rk_step, gv_step, rv_step, cfg,
        )  # fmt: skip
        over_tree = False
        if not ONE_PATH:
            if SAFE_EXP:  # by the sign of the factors that the forward kernel stored
                lowest = factor
                for j in range(1, G):
                    at_head = factors_ptr + (begin + t) * (H * G) + h * G + j
                    lowest = tl.minimum(lowest, tl.load(at_head, mask=inside, other=0.0))
                over_tree = tl.min(lowest, 0) < 0
            else:
                lowest = lowest_decay(decays(gk, rk, C, BK, KEY), decays(gv, rv, C, BV, VALUE))
                over_tree = may_leave_range(lowest, RANGE)
        if over_tree:
            compute_over_tree(
                q_ptr, k_ptr, v_ptr, gk_at, rk_at, gv_at, rv_at, qw_ptr, kw_ptr, mask_ptr, m_ptr, factors_ptr,
                states_ptr, do_ptr, d_final_ptr, dq_ptr, dk_ptr, dv_ptr, dgk_at, drk_at, dgv_at, drv_at, d_initial_ptr,
                passed_ptr, before, begin, length, past, head, h, i, count, at, scale, eps, H, q_step, k_step, v_step,
                gk_step, rk_step, gv_step, rv_step, dq_step, dk_step, dv_step, dgk_step, drk_step, dgv_step, drv_step,
                MASKED, D_FINAL, cfg,
            )  # fmt: skip
        else:
            qw, kw = load_norm(qw_ptr, kw_ptr, K, BK, NORM)
            norm = qw, kw, eps
            features, decays_k, decays_v = features_and_decays(k, gk, rk, gv, rv, m, m_before, norm, valid, cfg)
            compute_chunk(
                q_ptr, gk_at, rk_at, gv_at, rv_at, do_ptr, factors_ptr, states_ptr, d_final_ptr, dq_ptr, dk_ptr,
                dv_ptr, dgk_at, drk_at, dgv_at, drv_at, d_initial_ptr, passed_ptr, q, dos, factor, S, features, vs,
                decays_k, decays_v, norm, t, inside, valid, begin, head, h, i, count, at, scale, H, q_step, gk_step,
                rk_step, gv_step, rv_step, dq_step, dk_step, dv_step, dgk_step, drk_step, dgv_step, drv_step, D_FINAL,
                ONE_PATH, cfg,
            )  # fmt: skip
