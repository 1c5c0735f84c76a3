"""What the forward and the backward kernel share. Logarithms are to the base 2 inside the kernels.

Shape legend: C tokens of a chunk, K key channels, V value channels, D = K or V, padded to powers of two.

Factors. Inside a chunk the decay over (s, t] is E_t * W_s with B the cumulative log-decay of a channel,

    E_t = 2^(B_t + c)      W_s = 2^(-B_s - c)

so that scores, weighted values and their gradients are plain products of matrices. Both stay inside float32 as long
as W <= 2^56: with features held 2^48 above e^(k - m), what W multiplies stays below 2^104 and sums of its products
below 2^120. c is an integer per channel. While B >= -RANGE, it is CENTRE; behind an outlier of e^100, whose followers'
features are 2^-96, products then keep all their digits. A bfloat16 chunk without such features may decay further, down
to -MAX_DECAY: c is then as large as W <= 2^56 needs (`factors`, `decay_bounds`).

In a channel that decays further, the tokens from the first one on at which B is below its bound are *out of range*: W
is zero there, and what they write is read over a tree of halves instead (regla.ops.triton.tree). Its level of halves
of h tokens joins every token t of a second half to every s of the first half beside it: with `mid` the first token of
the second, the decay over (s, t] is that over (s, mid) times that over [mid, t], neither above 1, each summed from its
own tokens alone. The last level joins a token to itself. Every pair is in one level, and nothing overflows or cancels,
however fast a gate closes.

Whether a token is out of range depends on no later one, so later tokens add exact zeros to what an earlier row reads,
and c is an integer, so that another c changes E and W by powers of two, which their products cancel: causal to the
last bit (the one exception is in docs/kernels.md under "Causality").
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
CENTRE = tl.constexpr(4.0)  # the least c: W <= 2^(RANGE - CENTRE) = 2^56
RANGE = tl.constexpr(60.0)  # bits that any channel may decay by in a chunk without the tree
ROUND = tl.constexpr(768.0)  # subtracted and added again, it rounds a number of at most 256 to a multiple of 2^-14
LIFT_BITS = tl.constexpr(48.0)  # regla.ops.features.LIFT
GRADIENT_LIFT = tl.constexpr(16.0)  # the backward kernels keep gradients 2^16 above their size
LOWEST = tl.constexpr(-2000.0)  # log2-decays are cut off here: 2^-2000 of any float32 is 0
_CLAMP = tl.constexpr(41.0)  # bits: three such factors are within float32
NO_KEY = tl.constexpr(-1e30)  # m before the first key: regla.ops.features.NO_KEY
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def maximum(a, b):
    """The larger of both, and NaN where one is NaN: PTX's max and min return the number of the two, which would hide a
    NaN of the inputs. Plain tl.maximum and tl.minimum stand where NaN cannot matter."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def minimum(a, b):
    """The smaller of both, and NaN where one is NaN."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def largest(x, axis: tl.constexpr):
    """max x over an axis, and NaN where one number is NaN."""
    if INTERPRETED:  # which reduces with a function of our own number by number
        is_nan = tl.max((x != x).to(tl.int32), axis) > 0
        return tl.where(is_nan, float("nan"), tl.max(x, axis))
    return tl.reduce(x, axis, maximum)


@triton.jit
def load_tile(ptr, token, valid, step, column, width, other):
    """[C, D] of rows `token` (stride `step`) and channels `column`, as it is in memory; `other` where a token is not
    valid or a channel not below width."""
    mask = valid[:, None] & (column < width)[None, :]
    return tl.load(ptr + (token[:, None] * step + column[None, :]), mask=mask, other=other)


@triton.jit
def load_slices(ptr, token, valid, step, width: tl.constexpr, BLOCK: tl.constexpr, SLICES: tl.constexpr):
    """`load_tile` of all channels, padded to BLOCK, in slices [C, BLOCK / SLICES]: a tuple of SLICES."""
    slices = ()
    for s in tl.static_range(SLICES):
        column = tl.arange(0, BLOCK // SLICES) + s * (BLOCK // SLICES)
        slices = slices + (load_tile(ptr, token, valid, step, column, width, 0.0),)
    return slices


@triton.jit
def store_tile(ptr, token, inside, step, column, width, x):
    """Write x [C, D] where `load_tile` reads, for tokens that are `inside`."""
    mask = inside[:, None] & (column < width)[None, :]
    tl.store(ptr + (token[:, None] * step + column[None, :]), x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def columns(x, SLICES: tl.constexpr):
    """x [C, D] in slices [C, D / SLICES], 1 or 2: a tuple."""
    tl.static_assert(SLICES == 1 or SLICES == 2)
    slices = (x,)
    if SLICES == 2:
        slices = x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1).split()
    return slices


@triton.jit
def in_load_layout(x, ptr):
    """x in the layout over the threads of a tile that is loaded from ptr.

    It is a load whose mask is always false, with x for `other`. The compiler removes it only after it has assigned
    layouts (`program_id < 0` is not folded before).

    Without it the compiler keeps the layout of a product through the sum with the state that is awaited, converts the
    state on its way in and out, and makes it the product's accumulator, so that the product starts only after the wait.
    """
    return tl.load(ptr, mask=tl.full(x.shape, 0, tl.int1) | (tl.program_id(0) < 0), other=x)


@triton.jit
def materialised(x):
    """x, behind an opaque instruction: the compiler does not compute it again for every layout in which it is used."""
    if INTERPRETED:
        return x
    return tl.inline_asm_elementwise("mov.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=False, pack=1)


@triton.jit
def exp2(x):
    """2^x in one instruction, 2 ulp, 0 below 2^-126."""
    if INTERPRETED:
        return tl.exp2(x)
    # Marked pure, it would be computed again, with its argument, for every layout in which the tile is used.
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=False, pack=1)


@triton.jit
def materialised_product(x, y):
    """`materialised` of x * y."""
    if INTERPRETED:
        return x * y
    return tl.inline_asm_elementwise("mul.f32 $0, $1, $2;", "=f,f,f", [x, y], dtype=tl.float32, is_pure=False, pack=1)


@triton.jit
def finite(x, cap):
    """x clamped to +-1e37, a NaN included: x that left float32 is multiplied by 0 next, the decay of a channel that was
    reset, and infinity times 0, like infinity less infinity, would be NaN. `cap`: 1e37, or NaN where the inputs of x
    had one, which the result then has too."""
    if INTERPRETED:  # tl.maximum returns the number where the other is NaN, but for the interpreter's
        x = tl.where(x == x, x, -1e37)
    return minimum(tl.maximum(x, -1e37), cap)


@triton.jit
def nan_or(x, number):
    """number, or NaN where x is NaN."""
    return tl.where(x == x, number, float("nan"))


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """x as `dtype` has it, in float32."""
    if INTERPRETED or dtype != tl.bfloat16:
        return x.to(dtype).to(tl.float32)
    # The compiler's own conversion takes one number at a time, at a low rate.
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 both, low, high;
        cvt.rn.bf16x2.f32 both, $3, $2;
        shl.b32 low, both, 16;
        and.b32 high, both, 0xffff0000;
        mov.b32 $0, low;
        mov.b32 $1, high;
        }""",
        "=f,=f,f,f",
        [x],
        dtype=tl.float32,
        is_pure=True,
        pack=2,
    )


@triton.jit
def log2(x):
    """log2 x in one instruction, to 2^-22 absolute within [1/2, 2] and relative elsewhere."""
    if INTERPRETED:
        return tl.log2(x)
    return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def reciprocal(x):
    """1 / x in one instruction, 1 ulp."""
    if INTERPRETED:
        return 1 / x
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def refined_parts(a, c):
    """g, r = sigmoid(a), sigmoid(c) as fractions that never overflow, p = e^-|a|, z = e^-|c|,

    g = alpha / (1 + p)    1 - g = beta / (1 + p)    2 r = gamma / (1 + z)    2 (1 - r) = delta / (1 + z)

    and x > 0 with F = alpha x / ((1 + p)^2 (1 + z)). The 1e-36 in it is nothing unless both logits are below -80, where
    F is below e^-160; there it bounds F from below, and the gradients go to zero.
    """
    p = exp2(tl.abs(a) * -LOG2E)
    z2 = exp2(tl.abs(c) * -LOG2E + 1)
    alpha = tl.where(a >= 0, 1.0, p)
    beta = tl.where(a >= 0, p, 1.0)
    gamma = tl.where(c >= 0, 2.0, z2)
    delta = tl.where(c >= 0, z2, 2.0)
    Z = 0.5 * z2 + 1
    both = beta * gamma
    return 1 + p, Z, z2, alpha, beta, both, alpha * delta, alpha * Z + (both + 1e-36)


@triton.jit
def log2_refined(a, c):
    """log2 F without cancellation: with F = alpha x / D and 1 - F = u / D, D = (1 + p)^2 (1 + z),
    log F = -2 atanh(u / (2 D - u)) where 1 - F < 1/16, the logarithm of the fraction elsewhere.
    """
    P, Z, _z2, _alpha, beta, _both, other, x = refined_parts(a, c)
    D = P * P * Z
    u = beta * (beta * Z + other)
    near_one = 16 * u < D
    r = reciprocal(tl.where(near_one, 2 * D - u, D))
    s = u * r
    near = s * (-2 * LOG2E + s * s * (-2 / 3 * LOG2E))
    elsewhere = minimum(a, 0.0) * LOG2E + log2(x * r)
    return tl.where(near_one, near, elsewhere)


@triton.jit
def refined_gradient(a, c, d):
    """Gradients of a and c from d, that of the natural log F. Every term is positive: no cancellation.

    dlog F / da = beta (alpha delta + beta gamma) / ((1 + p) x)    dlog F / dc = beta gamma delta / (2 (1 + z) x)
    """
    P, Z, z2, _alpha, beta, both, other, x = refined_parts(a, c)
    common = beta * reciprocal(P * Z * x)
    return d * (common * Z * (other + both)), d * (common * P * z2)  # gamma delta / 2 = 2 z


@triton.jit
def refined_fractions(a, c):
    """s = -a log2(e), p = e^-a, z = e^-c, neither above 2^41, and 1 + p, 1 + z, x = 1 + z + 2 p, with which

    F = x / ((1 + p)^2 (1 + z))    dlog F / da = 2 p (z + p) / ((1 + p) x)    dlog F / dc = 2 p z / ((1 + z) x)
    """
    s = a * -LOG2E
    p = exp2(minimum(s, _CLAMP))
    z = exp2(minimum(c * -LOG2E, _CLAMP))
    Z = 1 + z
    return s, p, z, 1 + p, Z, 2 * p + Z


@triton.jit
def log2_refined_to_21_bits(a, c):
    """log2 F, to about 2^-21, or 2^-20 of it where that is more, of either sign near 0: half the instructions of
    `log2_refined`, and less than what rounding a to bfloat16 does to gates that keep half for up to 2^16 tokens. Where
    a is below -28, F falls as e^a, as it does unless c is, too."""
    s, _p, _z, P, Z, x = refined_fractions(a, c)
    beyond = minimum(_CLAMP - s, 0.0)
    return log2(x * reciprocal(P * P * Z)) + beyond


@triton.jit
def refined_gradient_to_21_bits(a, c, d):
    """`refined_gradient`, of logits below -28 as if they were -28: there F keeps nothing that a gradient could come
    from."""
    _s, p, z, P, Z, x = refined_fractions(a, c)
    common = 2 * p * reciprocal(P * Z * x)
    return materialised_product(common * Z, z + p) * d, materialised_product(common * P, z) * d


@triton.jit
def gate_at(g_ptr, r_ptr, begin, h, step, refine_step, width, GATE: tl.constexpr):
    """Pointers to the gate and the refine gate of an axis, head h, from token `begin` on; 0 for one that does not exist
    (a function cannot return None)."""
    g_at = 0
    r_at = 0
    if GATE != "none":
        g_at = g_ptr + begin * step + h * width
    if GATE == "refined":
        r_at = r_ptr + begin * refine_step + h * width
    return g_at, r_at


@triton.jit
def load_gate(g_ptr, r_ptr, token, valid, step, refine_step, column, width, GATE: tl.constexpr):
    """An axis' gate as it is in memory, [C, D] each: log-decays or logits, and the refine logits. Padding has those of
    a gate that is fully open."""
    g = 0.0
    r = 0.0
    if GATE != "none":
        g = load_tile(g_ptr, token, valid, step, column, width, 1e30 if GATE == "refined" else 0.0)
    if GATE == "refined":
        r = load_tile(r_ptr, token, valid, refine_step, column, width, 0.0)
    return g, r


@triton.jit
def decays(g, r, C: tl.constexpr, D: tl.constexpr, GATE: tl.constexpr):
    """log2-decays [C, D] <= 0, but for rounding; 0 for padding. GATE: "log" (natural logarithms), "refined" (logits) or
    "none" (zeros)."""
    if GATE == "none":
        g = tl.zeros([C, D], tl.float32)
    elif GATE == "log":
        g = g.to(tl.float32) * LOG2E
    elif g.dtype == tl.bfloat16:
        g = log2_refined_to_21_bits(g.to(tl.float32), r.to(tl.float32))
    else:
        g = log2_refined(g.to(tl.float32), r.to(tl.float32))
    return g


@triton.jit
def store_gate_gradient(
    dg_ptr, dr_ptr, token, inside, valid, step, refine_step, column, width, g, r, d, GATE: tl.constexpr
):
    """Write the gradients of the decays or, of a refined gate, of its logits, from those of the log-decays d [C, D]."""
    if GATE == "log":
        d = tl.where(valid[:, None], d, 0.0)
    if GATE == "refined":  # both are 0 for padding, which is read as an open gate
        if g.dtype == tl.bfloat16:
            d, dr = refined_gradient_to_21_bits(g.to(tl.float32), r.to(tl.float32), d)
        else:
            d, dr = refined_gradient(g.to(tl.float32), r.to(tl.float32), d)
        store_tile(dr_ptr, token, inside, refine_step, column, width, dr)
    if GATE != "none":
        store_tile(dg_ptr, token, inside, step, column, width, d)


@triton.jit
def _scan(step, top, step_before, top_before, step2, top2, step2_before, top2_before):
    return (
        step + step2,
        maximum(top + step2, top2),
        step + step2_before,
        maximum(top + step2_before, top2_before),
    )


@triton.jit
def stabiliser_scan(top, step):
    """Of m_t = max(m_{t-1} + step_t, top_t): (A, M, A', M') [C], where with the m before the chunk
    m_t = max(m + A_t, M_t) and m_{t-1} = max(m + A'_t, M'_t)."""
    zero = tl.zeros_like(step)
    return tl.associative_scan((step, top, zero, zero + NO_KEY), 0, _scan)


@triton.jit
def too_small(k, v, valid, K: tl.constexpr, VALUED: tl.constexpr):
    """[C]: tokens that would underflow with the smallest factors W. They have a feature in k [C, BK] below 2^-12, which
    is 2^60 below the lift of 2^48, as behind an outlier; or, where the value axis decays, values v [C, BV] that are all
    below 2^-20 and not all zero."""
    real = (tl.arange(0, k.shape[1]) < K)[None, :]
    weak = tl.min(tl.where(real, k, 1.0), 1) < 2.0**-12
    if VALUED:
        size = tl.max(tl.abs(v), 1)
        weak |= (size > 0) & (size < 2.0**-20)
    return valid & weak


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _smaller(a, b):
    return tl.minimum(a, b)


@triton.jit
def growth(m, m_before, INITIAL: tl.constexpr):
    """[C]: the largest growth of the stabiliser, in bits, from any token of the chunk (or from before it) to any later
    one, among the tokens up to each."""
    step = m - m_before
    if not INITIAL:  # as in regla.ops.triton.inputs.relative_decays
        step = tl.where(m_before > 0.5 * NO_KEY, step, 0.0)
    change = tl.cumsum(step, 0)
    lowest = tl.minimum(tl.associative_scan(change, 0, _smaller), 0.0)
    return tl.associative_scan(change - lowest, 0, _larger)


@triton.jit
def decay_bounds(weak, m, m_before, MAX_DECAY: tl.constexpr, BOTH: tl.constexpr, INITIAL: tl.constexpr):
    """([C], [C]): the least B of the key and of the value axis with which each token is still in range. A token's bound
    depends on no later one.

    The bound is -MAX_DECAY, and -RANGE from the first token on that is `weak` (`too_small`). With BOTH axes the growth
    of the stabiliser, at an outlier, is a decay of the value axis alone, and the key axis' bound is that many bits
    nearer: float32 has no room for more than 2^-126 in E, and what is then left of the outlier may still be more than
    all that follows it.
    """
    bound_v = tl.where(tl.cumsum(weak.to(tl.int32), 0) > 0, -RANGE, -MAX_DECAY)
    bound_k = bound_v
    if BOTH:
        bound_k += growth(m, m_before, INITIAL)
    return bound_k, bound_v


@triton.jit
def lowest_decay(gk, gv):
    """The lowest log2-decay over the chunk of any channel of either axis."""
    return tl.minimum(tl.min(tl.sum(gk, 0), 0), tl.min(tl.sum(gv, 0), 0))


@triton.jit
def may_leave_range(lowest, bits):
    """Whether a token may be out of range if no channel decays below `lowest`. The bit of margin covers B, which is
    summed in another order."""
    return lowest < 1 - bits


@triton.jit
def counted_sums(counted, x, weight: tl.constexpr, PRECISION: tl.constexpr):
    """Row t: the sum of x [C, D] over the tokens s with counted[t, s], times weight, a power of two. It is a product:
    in float32 where PRECISION is "tf32x3", else of x split into two bfloat16 numbers, to 2^-16 of each term."""
    if PRECISION == "tf32x3":
        return tl.dot(tl.where(counted, weight, 0.0), x, input_precision=PRECISION)
    weights = tl.where(counted, weight, 0.0).to(tl.bfloat16)
    # The upper half of the bits, not rounded: a conversion has a low rate.
    high = (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    low = (x - high).to(tl.bfloat16)
    return tl.dot(weights, low, tl.dot(weights, high.to(tl.bfloat16)))


@triton.jit
def sums(x, weight: tl.constexpr, REVERSE: tl.constexpr, EXACT: tl.constexpr):
    """Sums of x [C, D] over the tokens up to each (REVERSE: from each on), times weight, a power of two: in float32,
    or, unless EXACT, as a product with the upper digits of x."""
    if EXACT:
        return tl.cumsum(x, 0, reverse=REVERSE) * weight
    rows = tl.arange(0, x.shape[0])
    counted = rows[:, None] <= rows[None, :] if REVERSE else rows[:, None] >= rows[None, :]
    return counted_sums(counted, x, weight, "tf32")


@triton.jit
def later(x, PRECISION: tl.constexpr):
    """Sums of x [C, D] over the tokens after each."""
    rows = tl.arange(0, x.shape[0])
    return counted_sums(rows[:, None] < rows[None, :], x, 1.0, PRECISION)


@triton.jit
def floored(g):
    """g, not below LOWEST: in a product with a matrix of 0 and 1, -inf times 0 would be NaN."""
    return maximum(g, LOWEST)


@triton.jit
def cumulative(g, EXACT: tl.constexpr, TREE: tl.constexpr):
    """(B [C, D], log2-decay of the whole chunk [D]), from the log2-decays g [C, D]."""
    total = tl.sum(g, 0)
    if EXACT or TREE:  # else every channel is above its bound, and none at -inf
        g = floored(g)
    return sums(g, 1.0, False, EXACT), total


@triton.jit
def factors(B, total, bound, EXACT: tl.constexpr, TREE: tl.constexpr):
    """(E [C, D], W [C, D], c [D]), W zero for tokens out of range; without TREE there are none. bound [C]:
    `decay_bounds`; total [D]: B at the end of the chunk.

    c is the least integer with W <= 2^56, at least CENTRE. It depends on later tokens, but B + c is exact, so another c
    changes E and W by powers of two only, and no bit of an earlier row.
    """
    lowest = total
    if TREE:
        in_range = bound[:, None] <= B
        lowest = tl.min(tl.where(in_range, B, 0.0), 0)
    if EXACT:
        c = tl.zeros_like(total) + CENTRE
        E = exp2(B + CENTRE)
    else:
        c = tl.maximum(tl.ceil(CENTRE - RANGE - lowest), CENTRE)
        E = exp2((B - ROUND) + (c + ROUND)[None, :])
    W = reciprocal(E)
    if TREE:
        W = tl.where(in_range, W, 0.0)
    return E, W, c


@triton.jit
def to_the_end(g, PRECISION: tl.constexpr):
    """The decay over (s, end of the chunk], [C, D]: summed from the tokens after s, so nothing cancels at any depth."""
    return exp2(later(floored(g), PRECISION))


@triton.jit
def scores(qd, kd, PRECISION: tl.constexpr):
    """tril(qd kd^T) [C, C], float32, of q E and k W [C, BK]."""
    rows = tl.arange(0, qd.shape[0])
    causal = rows[:, None] >= rows[None, :]
    return tl.where(causal, tl.dot(qd, tl.trans(kd), input_precision=PRECISION), 0.0)
