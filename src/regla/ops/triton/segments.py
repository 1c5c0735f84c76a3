"""Long sequences of few heads, cut into segments that are computed side by side.

A chunk waits for the state from the chunk before it. Where there are many sequences and heads, other CTAs work
meanwhile; where there are few, the pass is bound by the latency of this chain. So a sequence is cut into segments, and
these into pieces, one CTA each: `state_kernel` computes what each piece adds to an empty state and by how much the
piece decays a state, `chain_kernel` the state before each segment, and the forward kernel then takes segments as
sequences. Backward does the same with the gradient of the state (`gradient_kernel`).

The state [K, V] that a piece leaves of an empty one is, with R_t the log-decay of a channel over (t, end] (R^v measured
from that of the slowest value channel, f_t) and m the stabiliser at the piece's end,

    S_kv = sum_t 2^(k_t + R^k_t + f_t - m) v_t 2^(R^v_t)

and its gradient, with B_t the log-decay from the piece's beginning on (B^k measured from that of the slowest key
channel, b_t), sum_t (q_t 2^(B^k_t)) (d_t 2^(b_t + B^v_t)). No exponent is above 0; sums run from the end where
R is wanted.

Behind an outlier of e^100 what follows is 2^-144 of the outlier, and what is left of it matters until it, too, has
decayed so far, beyond what float32 has below 1. So both factors of a product are lifted, and what decays further than
that is multiplied in two steps (`times_exp2`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from regla.ops.triton.inputs import Config, load_keys_and_gates, query_features, relative_decays
from regla.ops.triton.norm import load_norm, logits
from regla.ops.triton.tiles import (
    GRADIENT_LIFT,
    LIFT_BITS,
    LOG2E,
    NO_KEY,
    decays,
    exp2,
    floored,
    gate_at,
    largest,
    later,
    load_gate,
    load_tile,
    maximum,
    minimum,
    sums,
)

LIFT = tl.constexpr(44.0)  # bits that the factor without a lift gets: with float32's least, 2^-126, down to 2^-170


@triton.jit
def later_steps(step):
    """Sums [C] of step [C] over the tokens after each."""
    rows = tl.arange(0, step.shape[0])
    return tl.sum(tl.where(rows[:, None] < rows[None, :], step[None, :], 0.0), 1)


@triton.jit
def slowest(g, width):
    """(g [C, D], none lower than LOWEST; the largest of each token's first `width` channels, [C])."""
    return floored(g), largest(tl.where((tl.arange(0, g.shape[1]) < width)[None, :], g, float("-inf")), 1)


@triton.jit
def times_exp2(x, exponent):
    """x 2^exponent, also where 2^exponent by itself would be 0."""
    half = exp2(0.5 * exponent)
    return x * half * half


@triton.jit(do_not_specialize=["T", "L", "pieces", "last"])
def state_kernel(
    k_ptr, v_ptr, gk_ptr, rk_ptr, gv_ptr, rv_ptr, qw_ptr, kw_ptr, mask_ptr, states_ptr, decay_k_ptr, decay_v_ptr, m_ptr,
    eps, T, L, pieces, last, H, k_step, v_step, gk_step, rk_step, gv_step, rv_step,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    KEY: tl.constexpr, VALUE: tl.constexpr, SAFE_EXP: tl.constexpr, NORM: tl.constexpr, DECAYING: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, ONE_PATH: tl.constexpr,
):  # fmt: skip
    """For a piece of L tokens: the state [K, V] that it leaves of an empty one, the log2-decay of every channel over it
    [K] and [V], and (A, M) of the stabiliser, which is max(m + A, M) after the piece if it is m before. Pieces from the
    token `last` of a sequence on, where its last segment begins, are not computed: no segment follows them."""
    h, n = tl.program_id(0), tl.program_id(1)
    past = (n % pieces) * L
    if past < last:
        KEYED: tl.constexpr = KEY != "none" or (SAFE_EXP and VALUE == "none")
        VALUED: tl.constexpr = VALUE != "none"
        cfg: tl.constexpr = Config(1, K, V, BK, BV, C, KEY, VALUE, KEYED, VALUED, SAFE_EXP, NORM, True, PRECISION, 1)
        lift: tl.constexpr = LIFT if SAFE_EXP and VALUED else 0.0  # of the values; keys have theirs
        ki, vi = tl.arange(0, BK), tl.arange(0, BV)
        dtype = v_ptr.dtype.element_ty
        begin = (n // pieces).to(tl.int64) * T + past
        k_ptr += h * K
        v_ptr += h * V
        state = tl.zeros([BK, BV], tl.float32)
        decay_k = tl.zeros([BK], tl.float32)
        decay_v = tl.zeros([BV], tl.float32)  # beyond that of the slowest channel
        fall = tl.full([], 0.0, tl.float32)  # of the slowest value channel
        steps = tl.full([], 0.0, tl.float32)
        m = tl.full([], NO_KEY, tl.float32)
        _qw, kw = load_norm(qw_ptr, kw_ptr, K, BK, NORM)
        to_log2: tl.constexpr = 1.0 if NORM else LOG2E
        t = tl.arange(0, C)
        for j in tl.range(L // C, num_stages=2):  # the next chunk is loaded meanwhile
            start = begin + (L - (j + 1) * C)
            valid = t >= 0
            if MASKED:
                valid = tl.load(mask_ptr + start + t) != 0
            gk_at, rk_at = gate_at(gk_ptr, rk_ptr, start, h, gk_step, rk_step, K, KEY)
            gv_at, rv_at = gate_at(gv_ptr, rv_ptr, start, h, gv_step, rv_step, V, VALUE)
            k, gk, rk, gv, rv = load_keys_and_gates(
                k_ptr + start * k_step, gk_at, rk_at, gv_at, rv_at, t, valid, k_step, gk_step, rk_step, gv_step,
                rv_step, cfg,
            )  # fmt: skip
            v = load_tile(v_ptr + start * v_step, t, valid, v_step, vi, V, 0.0)
            k, v = logits(k, kw, eps, valid, K, NORM), v.to(tl.float32)
            step = tl.zeros([C], tl.float32)
            to_end = tl.zeros([C], tl.float32)
            exponent = tl.zeros([C, BK], tl.float32)
            if KEY != "none":
                gk, slow = slowest(decays(gk, rk, C, BK, KEY), K)
                step += slow
                exponent = later(gk, PRECISION) + decay_k[None, :]
                decay_k += tl.sum(gk, 0)
            if VALUE != "none":
                gv, slow = slowest(decays(gv, rv, C, BV, VALUE), V)
                step += slow
                slow = floored(slow)
                to_end = later_steps(slow) + fall
                fall += tl.sum(slow, 0)
                gv = minimum(gv - slow[:, None], 0.0)
                v *= exp2(later(gv, PRECISION) + (decay_v + lift)[None, :])
                decay_v += tl.sum(gv, 0)
            exponent += to_end[:, None]
            if SAFE_EXP:
                top = tl.where(valid, largest(k, 1) * to_log2, NO_KEY)
                if DECAYING:
                    top += later_steps(step) + steps
                    steps += tl.sum(step, 0)
                higher = maximum(m, largest(top, 0))
                state = times_exp2(state, m - higher)
                m = higher
                k = exp2(k * to_log2 + (exponent - (m - LIFT_BITS)))
            else:
                k *= exp2(exponent)
            state = tl.dot(tl.trans(k.to(dtype)), v.to(dtype), state, input_precision=PRECISION)
        head = n * H + h
        at = head.to(tl.int64) * K * V + (ki[:, None] * V + vi[None, :])
        tl.store(states_ptr + at, state * 2.0 ** (-lift), mask=(ki < K)[:, None] & (vi < V)[None, :])
        tl.store(decay_k_ptr + head * K + ki, decay_k, mask=ki < K)
        tl.store(decay_v_ptr + head * V + vi, decay_v + fall, mask=vi < V)
        tl.store(m_ptr + head * 2, steps)
        tl.store(m_ptr + head * 2 + 1, m)


@triton.jit(do_not_specialize=["T", "L", "pieces", "first"])
def gradient_kernel(
    q_ptr, gk_ptr, rk_ptr, gv_ptr, rv_ptr, qw_ptr, kw_ptr, mask_ptr, m_ptr, factors_ptr, do_ptr,
    states_ptr, decay_k_ptr, decay_v_ptr,
    scale, eps, T, L, pieces, first, H, q_step, gk_step, rk_step, gv_step, rv_step,
    G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    KEY: tl.constexpr, VALUE: tl.constexpr, SAFE_EXP: tl.constexpr, NORM: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr, ONE_PATH: tl.constexpr,
):  # fmt: skip
    """What a piece's outputs give to the state before it, [K, V], with SAFE_EXP lifted as backward has it, and the
    log2-decay of every channel, relative to the stabiliser. Not up to the token `first` of a sequence, where its second
    segment begins: those the backward kernel passes on. What is left of a last segment may be nothing."""
    h, n = tl.program_id(0), tl.program_id(1)
    past = (n % pieces) * L
    if past >= first:
        KEYED: tl.constexpr = KEY != "none" or (SAFE_EXP and VALUE == "none")
        VALUED: tl.constexpr = VALUE != "none"
        cfg: tl.constexpr = Config(G, K, V, BK, BV, C, KEY, VALUE, KEYED, VALUED, SAFE_EXP, NORM, True, PRECISION, 1)
        lift: tl.constexpr = LIFT if SAFE_EXP else 0.0  # of the queries; d_o the less, for a product as backward has it
        rest: tl.constexpr = GRADIENT_LIFT - LIFT
        empty: tl.constexpr = float("-inf") if SAFE_EXP and not NORM else 0.0
        qw, kw = load_norm(qw_ptr, kw_ptr, K, BK, NORM)
        ki, vi = tl.arange(0, BK), tl.arange(0, BV)
        dtype = do_ptr.dtype.element_ty
        begin = (n // pieces).to(tl.int64) * T + past
        length = tl.maximum(tl.minimum(L, T - past), 0)
        q_ptr += h * G * K
        do_ptr += h * G * V
        state = tl.zeros([BK, BV], tl.float32)
        decay_k = tl.zeros([BK], tl.float32)
        decay_v = tl.zeros([BV], tl.float32)
        t = tl.arange(0, C)
        for j in tl.range((length + C - 1) // C, num_stages=2):
            start = begin + j * C
            inside = t < length - j * C
            valid = inside
            if MASKED:
                valid = inside & (tl.load(mask_ptr + start + t, mask=inside, other=0) != 0)
            gk_at, rk_at = gate_at(gk_ptr, rk_ptr, start, h, gk_step, rk_step, K, KEY)
            gv_at, rv_at = gate_at(gv_ptr, rv_ptr, start, h, gv_step, rv_step, V, VALUE)
            gk, rk = load_gate(gk_at, rk_at, t, valid, gk_step, rk_step, ki, K, KEY)
            gv, rv = load_gate(gv_at, rv_at, t, valid, gv_step, rv_step, vi, V, VALUE)
            gk = decays(gk, rk, C, BK, KEY)
            gv = decays(gv, rv, C, BV, VALUE)
            if SAFE_EXP:
                at = (start + t) * H + h
                m = tl.load(m_ptr + at, mask=inside, other=0.0)
                m_before = tl.load(m_ptr + at - H, mask=inside, other=0.0)
                gk, gv = relative_decays(gk, gv, m, m_before, ki, vi, cfg)
            Ek = 2.0**lift
            Bv = tl.zeros([C, BV], tl.float32)
            if KEYED:
                gk = floored(gk)
                Bk = sums(gk, 1.0, False, ONE_PATH) + decay_k[None, :]
                b = largest(tl.where((ki < K)[None, :], Bk, float("-inf")), 1)
                Ek = exp2(minimum(Bk - b[:, None], 0.0) + lift)
                Bv += b[:, None]
                decay_k += tl.sum(gk, 0)
            if VALUED:
                gv = floored(gv)
                Bv += sums(gv, 1.0, False, ONE_PATH) + decay_v[None, :]
                decay_v += tl.sum(gv, 0)
            for i in range(G):
                q = load_tile(q_ptr + start * q_step + i * K, t, valid, q_step, ki, K, empty)
                do_step = H * G * V
                do = load_tile(do_ptr + start * do_step + i * V, t, valid, do_step, vi, V, 0.0).to(tl.float32)
                if SAFE_EXP:
                    q = query_features(q, (qw, kw, eps), valid, cfg)
                    factor = tl.abs(tl.load(factors_ptr + (start + t) * (H * G) + h * G + i, mask=inside, other=0.0))
                    do *= (factor * (scale * 2.0**rest))[:, None]
                else:
                    q = q.to(tl.float32)
                    do *= scale
                qd, d = (q * Ek).to(dtype), times_exp2(do, Bv).to(dtype)
                state = tl.dot(tl.trans(qd), d, state, input_precision=PRECISION)
        head = n * H + h
        at = head.to(tl.int64) * K * V + (ki[:, None] * V + vi[None, :])
        tl.store(states_ptr + at, state, mask=(ki < K)[:, None] & (vi < V)[None, :])
        tl.store(decay_k_ptr + head * K + ki, decay_k, mask=ki < K)
        tl.store(decay_v_ptr + head * V + vi, decay_v, mask=vi < V)


@triton.jit
def of_piece(
    head, asked, states_ptr, decay_k_ptr, decay_v_ptr, m_ptr, at, mask, ki, vi,
    K: tl.constexpr, V: tl.constexpr, MOVING: tl.constexpr,
):  # fmt: skip
    """(what a piece leaves, the decay of every number of a state over it, of the stabiliser A and M)."""
    left = tl.load(states_ptr + head.to(tl.int64) * K * V + at, mask=mask & asked, other=0.0)
    decay = tl.load(decay_k_ptr + head * K + ki, mask=(ki < K) & asked, other=0.0)[:, None]
    decay += tl.load(decay_v_ptr + head * V + vi, mask=(vi < V) & asked, other=0.0)[None, :]
    step, top = 0.0, 0.0
    if MOVING:
        step = tl.load(m_ptr + head * 2, mask=asked, other=0.0)
        top = tl.load(m_ptr + head * 2 + 1, mask=asked, other=0.0)
    return left, decay, step, top


@triton.jit(do_not_specialize=["parts", "cut"])
def chain_kernel(
    initial_ptr, before_ptr, states_ptr, decay_k_ptr, decay_v_ptr, m_ptr, chained_ptr, chained_m_ptr, parts, cut, H,
    K: tl.constexpr, V: tl.constexpr, R: tl.constexpr, BV: tl.constexpr,
    MOVING: tl.constexpr, INITIAL: tl.constexpr, REVERSE: tl.constexpr, LIFT: tl.constexpr,
):  # fmt: skip
    """The state before every segment (REVERSE: the gradient of the one after it), R rows of it, from what its pieces,
    `cut` of a segment, leave of nothing and let decay; MOVING: and the stabiliser, to the base 2. The first is read
    times 2^LIFT."""
    h, sequence = tl.program_id(0), tl.program_id(1)
    ki, vi = tl.program_id(2) * R + tl.arange(0, R), tl.arange(0, BV)
    at = ki[:, None] * V + vi[None, :]
    mask = (ki < K)[:, None] & (vi < V)[None, :]
    x = tl.zeros([R, BV], tl.float32)
    m = tl.full([], NO_KEY, tl.float32)
    if INITIAL:
        head = sequence * H + h
        x = tl.load(initial_ptr + head.to(tl.int64) * K * V + at, mask=mask, other=0.0) * 2.0**LIFT
        if MOVING:
            m = tl.load(before_ptr + head) * LOG2E
    last = (parts - 1) * cut  # pieces to be read
    ahead: tl.constexpr = 4  # at once: one after the other, they would be waited for one by one
    for j in range(0, last + 1, ahead):
        some = ()
        for i in tl.static_range(ahead):
            s = parts * cut - 1 - (j + i) if REVERSE else j + i
            head = (sequence * parts * cut + s) * H + h
            asked = j + i < last
            piece = of_piece(
                head, asked, states_ptr, decay_k_ptr, decay_v_ptr, m_ptr, at, mask, ki, vi, K, V, MOVING
            )  # fmt: skip
            some += (piece,)  # type: ignore[assignment]
        for i in tl.static_range(ahead):
            left, decay, step, top = some[i]  # type: ignore[var-annotated]
            done = (j + i) // cut
            here = (j + i == done * cut) & (done < parts)
            segment = parts - 1 - done if REVERSE else done
            head = (sequence * parts + segment) * H + h
            tl.store(chained_ptr + head.to(tl.int64) * K * V + at, x, mask=mask & here)
            if MOVING:
                tl.store(chained_m_ptr + head, m, mask=here & (tl.program_id(2) == 0))
                higher = maximum(m + step, top)
                x = times_exp2(x, decay + (m - higher)) + times_exp2(left, top - higher)
                m = higher
            else:
                x = times_exp2(x, decay) + left
