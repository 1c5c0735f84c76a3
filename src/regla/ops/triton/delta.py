"""Kernels of the gated delta rule, in chunks of C tokens. `regla.ops.triton.delta_operation` launches them.

With w_t = beta_t k_t, what token t writes to, the rule is u_t = v_t - S'_t^T k_t, S_t = S'_t + w_t u_t^T. In a chunk

    A_ts = sum_i k_ti w_si D_i(s, t]   s < t         X = (I + A)^-1
    U = X V - X (K o E) S                            O = scale * ((Q o E) S + tril(P) U)
    S <- Diag(total) S + (W o F)^T U

with D(s, t] the decay between two tokens, E that from the chunk's start to a token, F that from a token to its end, and
P as scale * A with queries in place of keys, s = t included. beta is a factor of what is written alone, so its gradient
is k_t . d_w_t.

Decays. Logarithms are to the base 2, B is the inclusive cumulative log-decay. D(s, t] = 2^B_t 2^-B_s as long as channel
i of token s has B_s > -NEAR: no factor leaves float32, and scores are one product of matrices. Pairs whose s lies
behind that are summed over a tree of halves (`regla.ops.triton.tree`). Which way a pair goes depends on s alone, so a
later token never changes an earlier row.

A chunk with such pairs is *deep*. The kernels that meet decays between tokens run twice: first for all chunks as if
none were deep, of which `delta_prepare_kernel` finds out which are; then, compiled with DEEP, for those alone, whose
results they write again.

Shape legend: C tokens of a chunk, K key channels, V value channels, G queries per state head; BK, BV padded to powers
of two. Intermediates lie by chunk: [chunks, H, C, channels] of tokens, [chunks, H, K, V] of states,
[chunks, H, G, C, C] of P.
"""

from __future__ import annotations

import triton
import triton.language as tl

from regla.ops.triton.delta_inputs import (
    NEAR,
    bounds,
    factors,
    feature_gradient,
    inverse,
    load_beta,
    load_decays,
    load_features,
    load_slice,
    put,
    real_tokens,
    statistics,
    tile,
)
from regla.ops.triton.norm import load_norm
from regla.ops.triton.tiles import exp2, gate_at, load_gate, load_tile, nan_or, store_gate_gradient, store_tile, sums
from regla.ops.triton.tree import levels, score_over_tree, scores_over_tree


@triton.jit
def delta_prepare_kernel(
    q_ptr, k_ptr, v_ptr, g_ptr, r_ptr, beta_ptr, mask_ptr, q_weight_ptr, k_weight_ptr, starts, stops,
    KE_solved, V_solved, WF, QE, P, total_ptr, is_deep, inverses,
    scale, eps, limit, T, chunks, H, q_step, k_step, v_step, g_step, r_step,
    GATE: tl.constexpr, PER_HEAD: tl.constexpr, FEATURES: tl.constexpr, NORM: tl.constexpr, LOGITS: tl.constexpr,
    MASKED: tl.constexpr, VARLEN: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr, KEEP: tl.constexpr,
    DEEP: tl.constexpr,
):  # fmt: skip
    """All of a chunk that needs no state; one CTA per chunk and state head."""
    slot, h = tl.program_id(0), tl.program_id(1)
    start, stop = bounds(slot, starts, stops, T, chunks, C, VARLEN)
    t = tl.arange(0, C)
    real = real_tokens(mask_ptr, start, start + t < stop, t, MASKED)
    index = slot * H + h
    dtype: tl.constexpr = v_ptr.dtype.element_ty
    qw, kw = load_norm(q_weight_ptr, k_weight_ptr, K, BK, NORM)
    if DEEP:
        if tl.load(is_deep + index) == 0:
            return
    k = load_features(k_ptr + start * k_step + h * K, t, real, k_step, kw, eps, K, BK, FEATURES, NORM)
    w = k * load_beta(beta_ptr, start, t, real, h, H, limit, LOGITS)[:, None]
    E, gg, alone = 1.0, 0.0, 0.0
    kE, wD, wF = k, w, w
    if GATE != "none":
        g_at, r_at = gate_at(g_ptr, r_ptr, start, h, g_step, r_step, 1 if PER_HEAD else K, GATE)
        gg = load_decays(g_at, r_at, t, real, g_step, r_step, tl.arange(0, BK), K, GATE, PER_HEAD)
        E, D, F, total, B = factors(gg, DEEP, EXACT)
        kE, wD, wF = k * E, w * D, w * F
        tl.store(total_ptr + index * BK + tl.arange(0, BK), exp2(total))
        if DEEP:
            alone = tl.where(B > -NEAR, 0.0, w)
        else:
            tl.store(is_deep + index, (tl.min(tl.min(B, 1), 0) <= -NEAR).to(tl.int32))
    put(WF, index, C, K, 0, wF, C, BK)
    kE, wD = kE.to(dtype), wD.to(dtype)
    A = tl.dot(kE, tl.trans(wD), input_precision=PRECISION)
    if DEEP:
        A += scores_over_tree(k, alone, gg, levels(C), False, dtype, PRECISION, False)
    for i in tl.static_range(G):
        q_at = q_ptr + start * q_step + (h * G + i) * K
        q = load_features(q_at, t, real, q_step, qw, eps, K, BK, FEATURES, NORM) * scale
        qE = (q * E).to(dtype)
        scores = tl.dot(qE, tl.trans(wD), input_precision=PRECISION)
        if DEEP:
            scores += scores_over_tree(q, alone, gg, levels(C), False, dtype, PRECISION, False)
        put(QE, index * G + i, C, K, 0, qE, C, BK)
        put(P, index * G + i, C, C, 0, tl.where(t[:, None] >= t[None, :], scores, 0.0), C, C)
    X = inverse(tl.where(t[:, None] > t[None, :], A, 0.0), PRECISION).to(dtype)
    put(KE_solved, index, C, K, 0, tl.dot(X, kE, input_precision=PRECISION), C, BK)
    v = load_tile(v_ptr + start * v_step + h * V, t, real, v_step, tl.arange(0, BV), V, 0.0).to(dtype)
    put(V_solved, index, C, V, 0, tl.dot(X, v, input_precision=PRECISION), C, BV)
    if KEEP:
        put(inverses, index, C, C, 0, X, C, C)


@triton.jit
def delta_state_kernel(
    KE_solved, U, WF, total, initial, states, final, firsts, chunks, H,
    GATE: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    VARLEN: tl.constexpr, INITIAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Chunk after chunk of a sequence and head, BV columns of the state: U in place of X V, and the state before
    each."""
    first_v, n, h = tl.program_id(0) * BV, tl.program_id(1) // H, tl.program_id(1) % H
    begin, end = n * chunks, n * chunks + chunks
    if VARLEN:
        begin, end = tl.load(firsts + n), tl.load(firsts + n + 1)
    dtype: tl.constexpr = U.dtype.element_ty
    at = n * H + h
    S = tl.zeros((BK, BV), tl.float32)
    if INITIAL:
        S = tile(initial, at, K, V, 0, first_v, BK, BV)
    for slot in range(begin, end):
        index = slot * H + h
        Sd = S.to(dtype)
        put(states, index, K, V, first_v, Sd, BK, BV)
        u = tile(U, index, C, V, 0, first_v, C, BV).to(tl.float32)
        u -= tl.dot(tile(KE_solved, index, C, K, 0, 0, C, BK), Sd, input_precision=PRECISION)
        ud = u.to(dtype)
        put(U, index, C, V, first_v, ud, C, BV)
        if GATE != "none":
            S *= tl.load(total + index * BK + tl.arange(0, BK))[:, None]
        S += tl.dot(tl.trans(tile(WF, index, C, K, 0, 0, C, BK)), ud, input_precision=PRECISION)
    put(final, at, K, V, first_v, S, BK, BV)


@triton.jit
def delta_output_kernel(
    QE, P, U, states, starts, stops, o, T, chunks, H,
    G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    VARLEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs of a chunk and query head."""
    slot, hq = tl.program_id(0), tl.program_id(1)
    start, stop = bounds(slot, starts, stops, T, chunks, C, VARLEN)
    t = tl.arange(0, C)
    index = slot * H + hq // G
    of_query = slot * H * G + hq
    S = tile(states, index, K, V, 0, 0, BK, BV)
    out = tl.dot(tile(QE, of_query, C, K, 0, 0, C, BK), S, input_precision=PRECISION)
    u = tile(U, index, C, V, 0, 0, C, BV)
    out = tl.dot(tile(P, of_query, C, C, 0, 0, C, C), u, out, input_precision=PRECISION)
    at = o + (start * H * G + hq) * V
    store_tile(at, t, start + t < stop, H * G * V, tl.arange(0, BV), V, out)


@triton.jit
def delta_state_gradient_kernel(
    KE_solved, WF, QE, P, total, d_o, d_final, starts, stops, firsts, d_U, d_states, d_initial, T, chunks, H,
    GATE: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr, FINAL: tl.constexpr,
):  # fmt: skip
    """The other way round: gradients of U and of the state behind each chunk, BV columns of a sequence and head."""
    first_v, n, h = tl.program_id(0) * BV, tl.program_id(1) // H, tl.program_id(1) % H
    begin, end = n * chunks, n * chunks + chunks
    if VARLEN:
        begin, end = tl.load(firsts + n), tl.load(firsts + n + 1)
    dtype: tl.constexpr = KE_solved.dtype.element_ty
    at = n * H + h
    t = tl.arange(0, C)
    column = first_v + tl.arange(0, BV)
    dS = tl.zeros((BK, BV), tl.float32)
    if FINAL:
        dS = tile(d_final, at, K, V, 0, first_v, BK, BV)
    for backwards in range(begin, end):
        slot = begin + end - 1 - backwards
        index = slot * H + h
        start, stop = bounds(slot, starts, stops, T, chunks, C, VARLEN)
        inside = start + t < stop
        dSd = dS.to(dtype)
        put(d_states, index, K, V, first_v, dSd, BK, BV)
        du = tl.dot(tile(WF, index, C, K, 0, 0, C, BK), dSd, input_precision=PRECISION)
        if GATE != "none":
            dS *= tl.load(total + index * BK + tl.arange(0, BK))[:, None]
        for i in tl.static_range(G):
            of_query = index * G + i
            of_o = d_o + (start * H * G + h * G + i) * V
            d_out = load_tile(of_o, t, inside, H * G * V, column, V, 0.0).to(dtype)
            du = tl.dot(tl.trans(tile(P, of_query, C, C, 0, 0, C, C)), d_out, du, input_precision=PRECISION)
            dS = tl.dot(tl.trans(tile(QE, of_query, C, K, 0, 0, C, BK)), d_out, dS, input_precision=PRECISION)
        dud = du.to(dtype)
        put(d_U, index, C, V, first_v, dud, C, BV)
        dS -= tl.dot(tl.trans(tile(KE_solved, index, C, K, 0, 0, C, BK)), dud, input_precision=PRECISION)
    put(d_initial, at, K, V, first_v, dS, BK, BV)


@triton.jit
def deep_gradients(d_P, x, alone, gg, d_x, d_alone, log_gradient, PRECISION: tl.constexpr):
    """The gradients of x, of `alone` and of the logarithm of E, with what the pairs of tokens out of range add."""
    everything = tl.sum(d_P.to(tl.float32), 1) + tl.sum(x + alone + gg, 1)
    cap = nan_or(tl.sum(everything, 0), 1e37)
    return score_over_tree(d_P, x, alone, gg, d_x, d_alone, log_gradient, False, cap, PRECISION, False)


@triton.jit
def delta_gradient_kernel(
    q_ptr, k_ptr, v_ptr, g_ptr, r_ptr, beta_ptr, mask_ptr, q_weight_ptr, k_weight_ptr, starts, stops,
    is_deep, inverses, U, states, d_U, d_states, o, d_o, d_q, d_k, d_v, d_g, d_r, d_beta,
    scale, eps, limit, T, chunks, H, d_slices, q_step, k_step, v_step, g_step, r_step,
    dq_step, dk_step, dv_step, dg_step, dr_step,
    GATE: tl.constexpr, PER_HEAD: tl.constexpr, FEATURES: tl.constexpr, NORM: tl.constexpr, LOGITS: tl.constexpr,
    MASKED: tl.constexpr, VARLEN: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, BS: tl.constexpr, BW: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
    DEEP: tl.constexpr,
):  # fmt: skip
    """Gradients of a chunk's inputs, from those of U and of the state behind it; one CTA per chunk, state head and
    slice of BS key channels. Of beta, and of a decay for all channels, each writes its part, d_slices numbers apart."""
    slot, h, slice = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, stop = bounds(slot, starts, stops, T, chunks, C, VARLEN)
    t = tl.arange(0, C)
    inside = start + t < stop
    real = real_tokens(mask_ptr, start, inside, t, MASKED)
    index = slot * H + h
    ki = slice * BS + tl.arange(0, BS)
    dtype: tl.constexpr = U.dtype.element_ty
    if DEEP:
        if tl.load(is_deep + index) == 0:
            return

    # What the values' channels are summed over in, BW at a time. The value that a key reads has the gradient -d_v: a
    # query of its own.
    X = tile(inverses, index, C, C, 0, 0, C, C)
    d_A, carried, along = tl.zeros((C, C), tl.float32), tl.zeros((BS,), tl.float32), tl.zeros((C,), tl.float32)
    d_key, d_written = tl.zeros((C, BS), tl.float32), tl.zeros((C, BS), tl.float32)  # of k E, of w F
    for first in range(0, V, BW):
        vi = first + tl.arange(0, BW)
        dv = tl.dot(tl.trans(X), tile(d_U, index, C, V, 0, first, C, BW), input_precision=PRECISION)
        store_tile(d_v + start * dv_step + h * V, t, inside & (slice == 0), dv_step, vi, V, dv)
        u = tile(U, index, C, V, 0, first, C, BW)
        if FEATURES != "given" and BS < BK:  # k . d of what is read, -d_v . (v - u), and of what is written, u . d_v
            v = load_tile(v_ptr + start * v_step + h * V, t, real, v_step, vi, V, 0.0).to(tl.float32)
            along += tl.sum(dv * (2 * u.to(tl.float32) - v), 1)
        dv = (-dv).to(dtype)
        S = tile(states, index, K, V, slice * BS, first, BS, BW)
        dS = tile(d_states, index, K, V, slice * BS, first, BS, BW)
        d_A = tl.dot(dv, tl.trans(u), d_A, input_precision=PRECISION)
        d_key = tl.dot(dv, tl.trans(S), d_key, input_precision=PRECISION)
        d_written = tl.dot(u, tl.trans(dS), d_written, input_precision=PRECISION)
        carried += tl.sum(S.to(tl.float32) * dS.to(tl.float32), 1)
    d_A = tl.where(t[:, None] > t[None, :], d_A, 0.0).to(dtype)

    k_at = k_ptr + start * k_step + h * K
    known = statistics(k_at, t, real, k_step, k_weight_ptr, eps, K, BK, FEATURES, NORM)
    beta = load_beta(beta_ptr, start, t, real, h, H, limit, LOGITS)
    g_at, r_at = gate_at(g_ptr, r_ptr, start, h, g_step, r_step, 1 if PER_HEAD else K, GATE)
    k, k_slope = load_slice(k_at, t, real, k_step, k_weight_ptr, known, ki, K, FEATURES, NORM)
    w = k * beta[:, None]
    E, D, F, gg, B, total, alone, d_alone = 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0
    if GATE != "none":
        gg = load_decays(g_at, r_at, t, real, g_step, r_step, ki, K, GATE, PER_HEAD)
        E, D, F, total, B = factors(gg, DEEP, EXACT)
    kE = k * E
    wD = (w * D).to(dtype)
    d_key = tl.dot(d_A, wD, d_key, input_precision=PRECISION)
    d_column = tl.dot(tl.trans(d_A), kE.to(dtype), input_precision=PRECISION)  # of w D
    log_gradient = kE * d_key  # of the natural logarithm of E
    d_key *= E
    if DEEP:
        alone = tl.where(B > -NEAR, 0.0, w)
        d_alone = tl.zeros((C, BS), tl.float32)
        d_key, d_alone, log_gradient = deep_gradients(d_A, k, alone, gg, d_key, d_alone, log_gradient, PRECISION)
    for i in tl.static_range(G):
        hq = h * G + i
        d_P, d_query = tl.zeros((C, C), tl.float32), tl.zeros((C, BS), tl.float32)
        along_q = tl.zeros((C,), tl.float32)
        for first in range(0, V, BW):
            vi = first + tl.arange(0, BW)
            of_output = (start * H * G + hq) * V
            d_out = load_tile(d_o + of_output, t, real, H * G * V, vi, V, 0.0).to(dtype)
            if FEATURES != "given" and BS < BK:  # outputs are linear in the features
                out = load_tile(o + of_output, t, real, H * G * V, vi, V, 0.0).to(tl.float32)
                along_q += tl.sum(d_out.to(tl.float32) * out, 1)
            u = tile(U, index, C, V, 0, first, C, BW)
            S = tile(states, index, K, V, slice * BS, first, BS, BW)
            d_P = tl.dot(d_out, tl.trans(u), d_P, input_precision=PRECISION)
            d_query = tl.dot(d_out, tl.trans(S), d_query, input_precision=PRECISION)
        d_P = tl.where(t[:, None] >= t[None, :], d_P, 0.0).to(dtype)
        q_at = q_ptr + start * q_step + hq * K
        of_q = statistics(q_at, t, real, q_step, q_weight_ptr, eps, K, BK, FEATURES, NORM)
        phi, q_slope = load_slice(q_at, t, real, q_step, q_weight_ptr, of_q, ki, K, FEATURES, NORM)
        qE = phi * E * scale
        d_query = tl.dot(d_P, wD, d_query, input_precision=PRECISION)
        d_column = tl.dot(tl.trans(d_P), qE.to(dtype), d_column, input_precision=PRECISION)
        log_gradient += qE * d_query
        d_query *= E
        if DEEP:
            d_query, d_alone, log_gradient = deep_gradients(
                d_P, phi * scale, alone, gg, d_query, d_alone, log_gradient, PRECISION
            )
        d_query *= scale
        if BS == BK:
            along_q = tl.sum(phi * d_query, 1)
        d_query = feature_gradient(phi, q_slope, d_query, along_q, FEATURES)
        store_tile(d_q + start * dq_step + hq * K, t, inside, dq_step, ki, K, d_query)

    d_w = d_column * D + d_written * F
    if GATE != "none":
        # F spans (t, end of the chunk]: of g_t, what the tokens before t wrote; the carried state takes every g.
        d_written *= w * F
        log_gradient -= w * D * d_column
        carried *= exp2(total)
        if EXACT:
            before = sums(d_written, 1.0, False, EXACT) - d_written
        else:  # by sums from t on: one product less
            before = 0.0
            log_gradient -= d_written
            carried += tl.sum(d_written, 0)
        if DEEP:
            d_w += tl.where(B > -NEAR, 0.0, d_alone)
        through = sums(log_gradient, 1.0, True, EXACT) + before + carried[None, :]
        if PER_HEAD:
            d = tl.where(real, tl.sum(through, 1), 0.0)
            tl.store(d_g + slice * d_slices + (start + t) * H + h, d, mask=inside)
        else:
            g, r = load_gate(g_at, r_at, t, real, g_step, r_step, ki, K, GATE)
            dg_at, dr_at = gate_at(d_g, d_r, start, h, dg_step, dr_step, K, GATE)
            store_gate_gradient(dg_at, dr_at, t, inside, real, dg_step, dr_step, ki, K, g, r, through, GATE)
    d_b = tl.sum(k * d_w, 1)
    if LOGITS:
        d_b *= beta * (1 - beta / limit)
    tl.store(d_beta + slice * d_slices + (start + t) * H + h, d_b, mask=inside)
    d_key += beta[:, None] * d_w
    if BS == BK:
        along = tl.sum(k * d_key, 1)
    d_key = feature_gradient(k, k_slope, d_key, along, FEATURES)
    store_tile(d_k + start * dk_step + h * K, t, inside, dk_step, ki, K, d_key)
