"""What a chunk reads from memory, and its features and decays."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from regla.ops.triton.norm import logits
from regla.ops.triton.tiles import (
    GRADIENT_LIFT,
    LIFT_BITS,
    LOG2E,
    LOWEST,
    NO_KEY,
    decays,
    exp2,
    largest,
    load_gate,
    load_slices,
    load_tile,
    log2,
    maximum,
    minimum,
)


class Config(NamedTuple):
    """What a kernel is compiled for, constexprs, bundled inside it: the functions that it calls take it whole."""

    G: Any  # query heads of a key head
    K: Any  # channels of a key, and of a value
    V: Any
    BK: Any  # the same, padded to powers of two
    BV: Any
    C: Any  # tokens of a chunk
    KEY: Any  # kind of gate on the key axis and on the value axis: "none", "log" or "refined"
    VALUE: Any
    KEYED: Any  # whether the key axis decays, if only with the stabiliser; whether the value axis does
    VALUED: Any
    SAFE_EXP: Any  # q and k are logits of the safe exponential, else features
    NORM: Any  # RMS norm of q and k
    INITIAL: Any  # there is a state before the first token
    PRECISION: Any  # of products of float32
    SLICES: Any  # of a state's columns, taken one after the other


@triton.jit
def query_features(q, norm, valid, cfg: tl.constexpr):
    """e^(q - max q) [C, BK] of the logits that are in memory as q; 0 for padding."""
    to_log2: tl.constexpr = 1.0 if cfg.NORM else LOG2E
    q = logits(q, norm[0], norm[2], valid, cfg.K, cfg.NORM)
    return exp2((q - maximum(largest(q, 1), NO_KEY)[:, None]) * to_log2)


@triton.jit
def key_features(k, m, cfg: tl.constexpr):
    """2^LIFT_BITS e^k 2^-m [C, BK] of the keys' `logits`, m to the base 2."""
    to_log2: tl.constexpr = 1.0 if cfg.NORM else LOG2E
    return exp2(k * to_log2 - (m - LIFT_BITS)[:, None])


@triton.jit
def relative_decays(gk, gv, m, m_before, ki, vi, cfg: tl.constexpr):
    """The log2-decays [C, BK] and [C, BV] of both axes, relative to the stabiliser: their sum is as before plus
    m_{t-1} - m_t, and each is at most 0. With one axis that takes the difference. With both, the key axis' are relative
    to its slowest channel, whose decay and the difference the value axis takes."""
    rescale = (m_before - m)[:, None]  # [C, 1]
    if not cfg.INITIAL:  # what comes before the first key is nothing, which need not decay by 2^-1e30
        rescale = tl.where(m_before[:, None] > 0.5 * NO_KEY, rescale, 0.0)
    if cfg.KEY != "none" and cfg.VALUED:
        slowest = maximum(largest(tl.where((ki < cfg.K)[None, :], gk, LOWEST), 1), LOWEST)[:, None]
        gk = gk - slowest
        gv = gv + (rescale + slowest)
    elif cfg.VALUED:
        gv = gv + rescale
    else:
        gk = gk + rescale
    return minimum(gk, 0.0), minimum(gv, 0.0)


@triton.jit
def load_keys_and_gates(
    k_ptr, gk_ptr, rk_ptr, gv_ptr, rv_ptr, t, valid, k_step, gk_step, rk_step, gv_step, rv_step, cfg: tl.constexpr,
):  # fmt: skip
    """(k [C, K], gate and refine of the key axis, of the value axis) as they are in memory."""
    ki, vi = tl.arange(0, cfg.BK), tl.arange(0, cfg.BV)
    gk, rk = load_gate(gk_ptr, rk_ptr, t, valid, gk_step, rk_step, ki, cfg.K, cfg.KEY)
    gv, rv = load_gate(gv_ptr, rv_ptr, t, valid, gv_step, rv_step, vi, cfg.V, cfg.VALUE)
    k = load_tile(k_ptr, t, valid, k_step, ki, cfg.K, float("-inf") if cfg.SAFE_EXP and not cfg.NORM else 0.0)
    return k, gk, rk, gv, rv


@triton.jit
def load_query(q_ptr, j, t, valid, q_step, cfg: tl.constexpr):
    """q of the j-th head of the group, as it is in memory."""
    empty: tl.constexpr = float("-inf") if cfg.SAFE_EXP and not cfg.NORM else 0.0
    return load_tile(q_ptr + j * cfg.K, t, valid, q_step, tl.arange(0, cfg.BK), cfg.K, empty)


@triton.jit
def load_chunk(
    q_ptr, k_ptr, v_ptr, gk_ptr, rk_ptr, gv_ptr, rv_ptr, norm, t, valid, q_step, k_step, v_step, gk_step, rk_step,
    gv_step, rv_step, cfg: tl.constexpr,
):  # fmt: skip
    """(q of the first head as it is in memory, `logits` of k, v, log2-decays of both axes), all loads issued first."""
    k, gk, rk, gv, rv = load_keys_and_gates(
        k_ptr, gk_ptr, rk_ptr, gv_ptr, rv_ptr, t, valid, k_step, gk_step, rk_step, gv_step, rv_step, cfg,
    )  # fmt: skip
    v = load_tile(v_ptr, t, valid, v_step, tl.arange(0, cfg.BV), cfg.V, 0.0)  # [C, BV]
    q = load_query(q_ptr, 0, t, valid, q_step, cfg)  # [C, BK]
    gk = decays(gk, rk, t.shape[0], cfg.BK, cfg.KEY)
    gv = decays(gv, rv, t.shape[0], cfg.BV, cfg.VALUE)
    return q, logits(k, norm[1], norm[2], valid, cfg.K, cfg.NORM), v.to(tl.float32), gk, gv  # [C, BK] or [C, BV]


@triton.jit
def query_operand(q, Ek, norm, valid, dtype: tl.constexpr, cfg: tl.constexpr):
    """(features of q, and these in the factors E and in `dtype`)."""
    q = query_features(q, norm, valid, cfg) if cfg.SAFE_EXP else q.to(tl.float32)
    return q, (q * Ek).to(dtype) if cfg.KEYED else q.to(dtype)


@triton.jit
def gradient_operand(do, factor, Ev, scale, dtype: tl.constexpr, cfg: tl.constexpr):
    """(d_o as the state's gradient is scaled, and that in the factors E and in `dtype`)."""
    do = do.to(tl.float32)
    if cfg.SAFE_EXP:
        do *= (tl.abs(factor) * (scale * 2.0**GRADIENT_LIFT))[:, None]
    else:
        do *= scale
    return do, (do * Ev).to(dtype) if cfg.VALUED else do.to(dtype)


@triton.jit
def exponent(do):
    """[C, 1]: of a token's largest |do|, to the base 2, an integer from 0 to 120."""
    return tl.minimum(tl.maximum(tl.ceil(log2(tl.max(tl.abs(do), 1))), 0.0), 120.0)[:, None]


@triton.jit
def with_state(q, do, Bk, Ev, up, dtype: tl.constexpr, cfg: tl.constexpr):
    """(E of the key axis [C, K], q E [C, K], d [C, V]) as they meet the state over the tree, 2^up of d's with E: behind
    an outlier one is tiny and the other huge, and d S by itself could leave float32. up [C, 1]: `exponent` of all
    slices of d; unless VALUED, where it is taken here, with the value axis' E [C, V] in d."""
    if cfg.VALUED:
        do *= Ev
        up = exponent(do)
    Ek = exp2(Bk + up)
    return Ek, (q * Ek).to(dtype), (do * exp2(-up)).to(dtype)


@triton.jit
def load_factor(factors_ptr, t, inside, begin, h, j, H, cfg: tl.constexpr):
    """The factors of the outputs of the j-th head of the group, [C]; 1 without the safe exponential."""
    factor = 1.0
    if cfg.SAFE_EXP:
        factor = tl.load(factors_ptr + (begin + t) * (H * cfg.G) + h * cfg.G + j, mask=inside, other=0.0)
    return factor


@triton.jit
def load_queries(
    q_ptr, do_ptr, factors_ptr, norm, j, t, inside, valid, Ek, Ev, begin, h, scale, H, q_step, dtype: tl.constexpr, BV:
    tl.constexpr, cfg: tl.constexpr,
):  # fmt: skip
    """(`query_operand`, `gradient_operand`) of the j-th head of the group."""
    q = load_query(q_ptr, j, t, valid, q_step, cfg)
    do = load_tile(do_ptr + j * cfg.V, t, valid, H * cfg.G * cfg.V, tl.arange(0, BV), cfg.V, 0.0)  # [C, BV]
    factor = load_factor(factors_ptr, t, inside, begin, h, j, H, cfg)
    q, qd = query_operand(q, Ek, norm, valid, dtype, cfg)
    do, d = gradient_operand(do, factor, Ev, scale, dtype, cfg)
    return q, do, qd, d


@triton.jit
def load_state(states_ptr, at, s, BS: tl.constexpr, cfg: tl.constexpr):
    """Columns s BS .. of the state before the chunk, as they are in memory."""
    ki, vi = tl.arange(0, cfg.BK), tl.arange(0, BS) + s * BS
    state_mask = (ki < cfg.K)[:, None] & (vi < cfg.V)[None, :]
    # Four in a row at most, as of the float32 gradient that is passed on: the same layout over the threads.
    state_at = tl.max_contiguous(ki[:, None] * cfg.V + vi[None, :], [1, 4])
    return tl.load(states_ptr + at + state_at, mask=state_mask, other=0.0)


@triton.jit
def load_for_backward(
    q_ptr, k_ptr, v_ptr, gk_ptr, rk_ptr, gv_ptr, rv_ptr, m_ptr, factors_ptr, states_ptr, do_ptr, before, t, inside,
    valid, begin, h, past, at, H, q_step, k_step, v_step, gk_step, rk_step, gv_step, rv_step, cfg: tl.constexpr,
):  # fmt: skip
    """What a chunk reads from memory, as it is there: (q of the first head, d_o of it in slices, factor of its outputs,
    first slice of the state before the chunk, k, v in slices, gate and refine of the key axis, of the value axis,
    stabilisers m_t and m_{t-1}). past: chunks of the sequence before this one."""
    k, gk, rk, gv, rv = load_keys_and_gates(
        k_ptr, gk_ptr, rk_ptr, gv_ptr, rv_ptr, t, valid, k_step, gk_step, rk_step, gv_step, rv_step, cfg,
    )  # fmt: skip
    vs = load_slices(v_ptr, t, valid, v_step, cfg.V, cfg.BV, cfg.SLICES)
    m, m_before = 0.0, 0.0
    if cfg.SAFE_EXP:
        m = tl.load(m_ptr + t * H, mask=inside, other=0.0)  # [C]
        earlier = tl.load(m_ptr + (t - 1) * H, mask=inside & (t + past > 0), other=0.0)
        m_before = tl.where(inside, tl.where(t + past > 0, earlier, before), 0.0)
    q = load_query(q_ptr, 0, t, valid, q_step, cfg)  # [C, BK]
    dos = load_slices(do_ptr, t, valid, H * cfg.G * cfg.V, cfg.V, cfg.BV, cfg.SLICES)
    factor = load_factor(factors_ptr, t, inside, begin, h, 0, H, cfg)
    S = load_state(states_ptr, at, 0, cfg.BV // cfg.SLICES, cfg)  # [BK, BV / SLICES]
    return q, dos, factor, S, k, vs, gk, rk, gv, rv, m, m_before


@triton.jit
def features_and_decays(k, gk, rk, gv, rv, m, m_before, norm, valid, cfg: tl.constexpr):
    """(features of k, log2-decays of both axes relative to the stabiliser), of what `load_for_backward` gave."""
    gk = decays(gk, rk, k.shape[0], cfg.BK, cfg.KEY)
    gv = decays(gv, rv, k.shape[0], cfg.BV, cfg.VALUE)
    k = logits(k, norm[1], norm[2], valid, cfg.K, cfg.NORM)
    if cfg.SAFE_EXP:
        k = key_features(k, m, cfg)
        gk, gv = relative_decays(gk, gv, m, m_before, tl.arange(0, cfg.BK), tl.arange(0, cfg.BV), cfg)
    return k, gk, gv
