"""Tokens of a chunk read over a tree of halves: exact however fast gates close. See regla.ops.triton.tiles."""

from __future__ import annotations

import triton
import triton.language as tl

from regla.ops.triton.tiles import counted_sums, exp2, finite, floored, rounded


@triton.jit
def levels(C: tl.constexpr):
    """Levels of the tree of C tokens, log2 C + 1 of them."""
    tl.static_assert(C == 32 or C == 16)
    return 6 if C == 32 else 5


@triton.jit
def halves(level, C: tl.constexpr):
    """([C, C]: pairs (t, s) that this level joins; [C, C]: tokens s between t and the middle of its block).

    Halves have h = C / 2, C / 4, ..., 1 tokens; h = 0 is the token itself. With z = t ^ s, negative where s > t: a pair
    is joined where h <= z < 2 h, which is so where t has the bit h, s has not, and all bits above are the same. Where
    |z| < h, both are in one half, whose bit h says which it is: of the second counts what is up to t, of the first what
    is behind t.
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
    """(`halves`' pairs; [C, D]: the decay between each token and the middle of its block, of what a token of a second
    half reads and of what one of a first half writes)."""
    joined, between = halves(level, g.shape[0])
    return joined, to_the_middle(between, g, PRECISION)


@triton.jit
def scores_over_tree(q, k, gk, count, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """tril(q k^T) [C, C] under the decay of the keys: over the first `count` levels of the tree."""
    P = tl.zeros([q.shape[0], q.shape[0]], tl.float32)
    for level in range(count):
        joined, between = halves(level, q.shape[0])
        X = gk
        if level < count:  # always. In one block with the product of scores the compiler would lay out all of them for
            # four rows of warps, and a tile of 32 tokens has work for two.
            X = to_the_middle(between, gk, PRECISION)
        P2 = tl.dot((q * X).to(dtype), tl.trans((k * X).to(dtype)), input_precision=PRECISION)
        P += tl.where(joined, P2, 0.0)
    return P


@triton.jit
def read_over_tree(Pd, do, v, gv, dv, dBv, PRECISION: tl.constexpr):
    """dv and dBv, with what the values v [C, V] and their decays get of d_o under the scores Pd [C, C]; and what the
    scores get."""
    dtype = Pd.dtype
    dP = tl.zeros(Pd.shape, tl.float32)
    for level in range(levels(Pd.shape[0])):
        joined, X = tree_level(level, gv, PRECISION)
        P2 = tl.where(joined, Pd, 0.0).to(dtype)
        x2 = rounded(v * X, dtype)
        d2 = rounded(do * X, dtype)
        dP += tl.where(joined, tl.dot(d2.to(dtype), tl.trans(x2.to(dtype)), input_precision=PRECISION), 0.0)
        dx2 = finite(tl.dot(tl.trans(P2), d2.to(dtype), input_precision=PRECISION))
        dv += dx2 * X
        dBv += tl.dot(P2, x2.to(dtype), input_precision=PRECISION) * d2 - x2 * dx2
    return dv, dBv, dP


@triton.jit
def score_over_tree(dPd, q, k, gk, dq, dk, dBk, PRECISION: tl.constexpr):
    """dq, dk and dBk, with what the queries q, the keys k [C, K] and their decays get of the scores' gradient."""
    dtype = dPd.dtype
    for level in range(levels(dPd.shape[0])):
        joined, X = tree_level(level, gk, PRECISION)
        dP2 = tl.where(joined, dPd, 0.0).to(dtype)
        q2 = rounded(q * X, dtype)
        k2 = rounded(k * X, dtype)
        dq2 = finite(tl.dot(dP2, k2.to(dtype), input_precision=PRECISION))
        dk2 = tl.dot(tl.trans(dP2), q2.to(dtype), input_precision=PRECISION)
        dq += dq2 * X
        dk += dk2 * X
        dBk += q2 * dq2 - k2 * dk2
    return dq, dk, dBk
