"""Tokens of a chunk read over a tree of halves: exact however fast gates close. See regla.ops.triton.tiles."""

from __future__ import annotations

import triton
import triton.language as tl

from regla.ops.triton.tiles import CENTRE, RANGE, counted_sums, exp2, finite, floored, reciprocal, rounded, scores


@triton.jit
def levels(C: tl.constexpr):
    """Number of levels of the tree of C tokens: log2 C + 1, the last of which joins each token to itself."""
    tl.static_assert(C == 32 or C == 16)
    return 6 if C == 32 else 5


@triton.jit
def halves(level, C: tl.constexpr):
    """([C, C]: pairs (t, s) that this level joins; [C, C]: tokens s between t and the middle of t's block of 2 h).

    Halves have h = C / 2, C / 4, ..., 1 tokens; h = 0 is the token itself. With z = t ^ s, negative where s > t: a pair
    is joined where h <= z < 2 h, which is so where t has the bit h, s has not, and all bits above are the same. Where
    |z| < h, both are in one half, and bit h says in which: in a second half the tokens s <= t count, in a first half
    the tokens s > t.
    """
    rows = tl.arange(0, C)
    t, s = rows[:, None], rows[None, :]
    z = tl.where(s <= t, t ^ s, -(t ^ s))
    h = C >> (level + 1)
    rest = tl.maximum(h, 1) - 1
    second = (s & h) != 0
    counted = (z + tl.where(second, 0, rest)).to(tl.uint32) < tl.where(second, h, rest).to(tl.uint32)
    return (z - h).to(tl.uint32) <= rest.to(tl.uint32), counted


@triton.jit
def to_the_middle(between, g, PRECISION: tl.constexpr):
    """[C, D]: the decay over the tokens `between` [C, C], of the log-decays g [C, D]."""
    return exp2(counted_sums(between, floored(g), 1.0, PRECISION))


@triton.jit
def tree_level(level, g, PRECISION: tl.constexpr):
    """(pairs of `halves` [C, C]; X [C, D]: the decay between each token and the middle of its block). X multiplies what
    a token of a second half reads and what a token of a first half writes."""
    joined, between = halves(level, g.shape[0])
    return joined, to_the_middle(between, g, PRECISION)


@triton.jit
def read_and_write(level, X, joined, count, short):
    """(factor of reads [C, D], factor of writes [C, D], pairs [C, C], number of levels), with a shortcut for the last
    levels if `short`: at the level of halves of four tokens, if no channel decays by more than 2^-56 over a half, all
    pairs of a block of eight are joined at once, and this level is the last. A token of a first half then reads, and
    one of a second half writes, with 1 / X. Otherwise all are as given.

    For the backward pass only: in the forward pass the rounding of a first half's reads would depend on later tokens.
    """
    XR = X
    XW = X
    if short & (X.shape[0] >> (level + 1) == 4):
        if tl.min(tl.min(X, 1), 0) > 2.0 ** (CENTRE - RANGE):
            rows = tl.arange(0, X.shape[0])
            second = ((rows & 4) != 0)[:, None]
            inverse = reciprocal(X)
            XR = tl.where(second, X, inverse)
            XW = tl.where(second, inverse, X)
            joined = (rows[:, None] >= rows[None, :]) & ((rows[:, None] ^ rows[None, :]) < 8)
            count = level + 1
    return XR, XW, joined, count


@triton.jit
def level_of_scores(
    level, count, P, q, k, gk, short, dtype: tl.constexpr, PRECISION: tl.constexpr, SHORT: tl.constexpr
):
    """(scores P plus those of this level's pairs, number of levels)"""
    joined, between = halves(level, q.shape[0])
    X = gk
    if level < count:  # always true. In one basic block with the product of scores the compiler would give these
        # products its layout of four rows of warps, of which a tile of 32 tokens fills two.
        X = to_the_middle(between, gk, PRECISION)
    XR = X
    XW = X
    if SHORT:
        XR, XW, joined, count = read_and_write(level, X, joined, count, short)
    P2 = tl.dot((q * XR).to(dtype), tl.trans((k * XW).to(dtype)), input_precision=PRECISION)
    return P + tl.where(joined, P2, 0.0), count


@triton.jit
def scores_over_tree(q, k, gk, count, short, dtype: tl.constexpr, PRECISION: tl.constexpr, SHORT: tl.constexpr):
    """tril(q k^T) [C, C] under the decay of the keys: over the first `count` levels of the tree, or, with SHORT and
    `short`, fewer."""
    P = tl.zeros([q.shape[0], q.shape[0]], tl.float32)
    if SHORT:
        level, count = first_of(count)
        while level < count:
            P, count = level_of_scores(level, count, P, q, k, gk, short, dtype, PRECISION, True)
            level += 1
    else:  # a loop with a fixed end takes fewer registers
        for level in range(count):
            P, _count = level_of_scores(level, count, P, q, k, gk, short, dtype, PRECISION, False)
    return P


@triton.jit
def chunk_scores(
    q, qd, k, kd, gk, short, KEYED: tl.constexpr, VALUED: tl.constexpr, PRECISION: tl.constexpr, TREE: tl.constexpr
):
    """The scores of a chunk [C, C] as an operand; with TREE over the tree, if the key axis decays."""
    if KEYED and TREE:
        P = scores_over_tree(q, k, gk, levels(k.shape[0]), short, kd.dtype, PRECISION, not VALUED)
    else:
        P = scores(qd, kd, PRECISION)
    return P.to(kd.dtype)


@triton.jit
def first_of(count):
    """(0, count), as loop-carried variables."""
    zero = tl.full([], 0, tl.int32)
    return zero, zero + count


@triton.jit
def level_of_reading(
    level, count, Pd, do, v, gv, dv, dBv, dP, short, cap, PRECISION: tl.constexpr, SHORT: tl.constexpr
):
    """(dv, dBv, dP plus this level's part of each, number of levels)"""
    dtype = Pd.dtype
    joined, XR = tree_level(level, gv, PRECISION)
    XW = XR
    if SHORT:
        XR, XW, joined, count = read_and_write(level, XR, joined, count, short)
    P2 = tl.where(joined, Pd, 0.0).to(dtype)
    x2 = rounded(v * XW, dtype)
    d2 = rounded(do * XR, dtype)
    dP += tl.where(joined, tl.dot(d2.to(dtype), tl.trans(x2.to(dtype)), input_precision=PRECISION), 0.0)
    dx2 = finite(tl.dot(tl.trans(P2), d2.to(dtype), input_precision=PRECISION), cap)
    dv += dx2 * XW
    dBv += tl.dot(P2, x2.to(dtype), input_precision=PRECISION) * d2 - x2 * dx2
    return dv, dBv, dP, count


@triton.jit
def read_over_tree(Pd, do, v, gv, dv, dBv, short, cap, PRECISION: tl.constexpr, SHORT: tl.constexpr):
    """dv and dBv, with what the values v [C, V] and their decays get of d_o under the scores Pd [C, C]; and what the
    scores get. SHORT, short: see `scores_over_tree`; cap: `finite`."""
    dP = tl.zeros(Pd.shape, tl.float32)
    if SHORT:
        level, count = first_of(levels(Pd.shape[0]))
        while level < count:
            dv, dBv, dP, count = level_of_reading(level, count, Pd, do, v, gv, dv, dBv, dP, short, cap, PRECISION, True)
            level += 1
    else:
        for level in range(levels(Pd.shape[0])):
            dv, dBv, dP, _count = level_of_reading(level, 0, Pd, do, v, gv, dv, dBv, dP, short, cap, PRECISION, False)
    return dv, dBv, dP


@triton.jit
def level_of_scoring(
    level, count, dPd, q, k, gk, dq, dk, dBk, short, cap, PRECISION: tl.constexpr, SHORT: tl.constexpr
):
    """(dq, dk, dBk plus this level's part of each, number of levels)"""
    dtype = dPd.dtype
    joined, XR = tree_level(level, gk, PRECISION)
    XW = XR
    if SHORT:
        XR, XW, joined, count = read_and_write(level, XR, joined, count, short)
    dP2 = tl.where(joined, dPd, 0.0).to(dtype)
    q2 = rounded(q * XR, dtype)
    k2 = rounded(k * XW, dtype)
    dq2 = finite(tl.dot(dP2, k2.to(dtype), input_precision=PRECISION), cap)
    dk2 = tl.dot(tl.trans(dP2), q2.to(dtype), input_precision=PRECISION)
    dq += dq2 * XR
    dk += dk2 * XW
    dBk += q2 * dq2 - k2 * dk2
    return dq, dk, dBk, count


@triton.jit
def score_over_tree(dPd, q, k, gk, dq, dk, dBk, short, cap, PRECISION: tl.constexpr, SHORT: tl.constexpr):
    """dq, dk and dBk, with what the queries q, the keys k [C, K] and their decays get of the scores' gradient. SHORT,
    short: see `scores_over_tree`; cap: `finite`."""
    if SHORT:
        level, count = first_of(levels(dPd.shape[0]))
        while level < count:
            dq, dk, dBk, count = level_of_scoring(level, count, dPd, q, k, gk, dq, dk, dBk, short, cap, PRECISION, True)
            level += 1
    else:
        for level in range(levels(dPd.shape[0])):
            dq, dk, dBk, _count = level_of_scoring(level, 0, dPd, q, k, gk, dq, dk, dBk, short, cap, PRECISION, False)
    return dq, dk, dBk
