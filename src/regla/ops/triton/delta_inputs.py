"""What the kernels of the delta rule read, and what they make of it before they meet a state: features, decays and
their factors, beta, and the inverse of a chunk's triangular system. Equations and names as in
`regla.ops.triton.delta`.

Shape legend: C tokens of a chunk, K key channels padded to BK.
"""

from __future__ import annotations

import triton
import triton.language as tl

from regla.ops.triton.norm import logits, one_over_rms
from regla.ops.triton.tiles import LN2, LOG2E, decays, exp2, largest, later, load_gate, load_tile, maximum, sums

NEAR = tl.constexpr(60.0)
SHORTEST = tl.constexpr(1e-24)  # the square of the length of features below which they stay shorter than 1
LOWEST = tl.constexpr(-150.0)  # bits: what is left below is 0 in float32


@triton.jit
def bounds(slot, starts, stops, T, chunks, C: tl.constexpr, VARLEN: tl.constexpr):
    """First token of a chunk and the end of its sequence, counted over all rows."""
    if VARLEN:
        start, stop = tl.load(starts + slot), tl.load(stops + slot)
    else:
        row = slot // chunks
        start, stop = row * T + (slot % chunks) * C, row * T + T
    return start.to(tl.int64), stop.to(tl.int64)


@triton.jit
def real_tokens(mask_ptr, start, inside, t, MASKED: tl.constexpr):
    """[C]: which tokens of a chunk exist and are no padding."""
    if MASKED:
        inside = inside & (tl.load(mask_ptr + start + t, mask=inside, other=0) != 0)
    return inside


@triton.jit
def tile(ptr, index, height: tl.constexpr, width: tl.constexpr, top, first, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """[ROWS, BLOCK] of the index-th of tensors [height, width], both padded, from row `top` and column `first` on."""
    row, column = top + tl.arange(0, ROWS), first + tl.arange(0, BLOCK)
    at = ptr + index.to(tl.int64) * (height * width) + (row[:, None] * width + column[None, :])
    if height % ROWS == 0 and width % BLOCK == 0:
        x = tl.load(at)
    else:
        x = tl.load(at, mask=(row < height)[:, None] & (column < width)[None, :], other=0.0)
    return x


@triton.jit
def put(ptr, index, height: tl.constexpr, width: tl.constexpr, first, x, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Write x where `tile` reads."""
    row, column = tl.arange(0, ROWS), first + tl.arange(0, BLOCK)
    at = ptr + index.to(tl.int64) * (height * width) + (row[:, None] * width + column[None, :])
    x = x.to(ptr.dtype.element_ty)
    if height % ROWS == 0 and width % BLOCK == 0:
        tl.store(at, x)
    else:
        tl.store(at, x, mask=(row < height)[:, None] & (column < width)[None, :])


@triton.jit
def load_logits(ptr, t, real, step, K: tl.constexpr, BK: tl.constexpr, FEATURES: tl.constexpr, NORM: tl.constexpr):
    """[C, BK] of q or k, as it is in memory."""
    empty: tl.constexpr = float("-inf") if FEATURES == "unit_safe_exp" and not NORM else 0.0
    return load_tile(ptr, t, real, step, tl.arange(0, BK), K, empty)


@triton.jit
def unit_features(x, weight, eps, real, K: tl.constexpr, FEATURES: tl.constexpr, NORM: tl.constexpr):
    """Features e / |e| [C, BK], 0 for padding, of x [C, BK] as `load_logits` gives it.

    FEATURES: e = exp(y - max y) of "unit_safe_exp", e = silu(y) of "unit_silu", y = x or, with NORM, the RMS norm of x
    with `weight` [BK], which is times log2(e).
    Second, (1 / rms, max y, 1 / |e|): what `load_slice` needs to know of all channels, [C] each, or a number where
    there is none.
    """
    r = 1.0
    if NORM:
        r = one_over_rms(x.to(tl.float32), eps, K)
    if FEATURES == "unit_silu":
        x = x.to(tl.float32)
        if NORM:
            x *= one_over_rms(x, eps, K)[:, None] * (weight * LN2)[None, :]
        top = 0.0
        e = x * tl.sigmoid(x)
        factor = tl.where(real, tl.rsqrt(maximum(tl.sum(e * e, 1), SHORTEST)), 0.0)
    else:
        x = logits(x, weight, eps, real, K, NORM)
        to_log2: tl.constexpr = 1.0 if NORM else LOG2E
        top = tl.where(real, largest(x, 1), 0.0)
        e = exp2((x - top[:, None]) * to_log2)
        factor = tl.where(real, tl.rsqrt(tl.sum(e * e, 1)), 0.0)
    return e * factor[:, None], (r, top, factor)


@triton.jit
def load_features(
    ptr, t, real, step, weight, eps, K: tl.constexpr, BK: tl.constexpr, FEATURES: tl.constexpr, NORM: tl.constexpr
):
    """[C, BK] float32, 0 for padding: what is in memory, "given", or `unit_features` of it."""
    x = load_logits(ptr, t, real, step, K, BK, FEATURES, NORM)
    if FEATURES != "given":
        x, _ = unit_features(x, weight, eps, real, K, FEATURES, NORM)
    return x.to(tl.float32)


@triton.jit
def statistics(
    ptr, t, real, step, weight_ptr, eps, K: tl.constexpr, BK: tl.constexpr, FEATURES: tl.constexpr, NORM: tl.constexpr
):
    """What `load_slice` needs to know of all channels."""
    known = (1.0, 0.0, 1.0)
    if FEATURES != "given":
        weight = load_weight(weight_ptr, tl.arange(0, BK), K, NORM)
        x = load_logits(ptr, t, real, step, K, BK, FEATURES, NORM)
        _, known = unit_features(x, weight, eps, real, K, FEATURES, NORM)
    return known


@triton.jit
def load_weight(weight_ptr, column, K: tl.constexpr, NORM: tl.constexpr):
    """Weights of the norm of q or k for the channels `column`, times log2(e)."""
    weight = 1.0
    if NORM:
        weight = tl.load(weight_ptr + column, mask=column < K, other=0.0).to(tl.float32) * LOG2E
    return weight


@triton.jit
def load_slice(
    ptr, t, real, step, weight_ptr, known, column, K: tl.constexpr, FEATURES: tl.constexpr, NORM: tl.constexpr
):
    """(phi, slope) [C, BLOCK]: `load_features` of the channels `column`, and (de/dy) / |e| with y as in
    `unit_features`; known: `statistics`."""
    empty: tl.constexpr = float("-inf") if FEATURES == "unit_safe_exp" and not NORM else 0.0
    x = load_tile(ptr, t, real, step, column, K, empty).to(tl.float32)
    if NORM and FEATURES != "given":
        x *= known[0][:, None] * load_weight(weight_ptr, column, K, NORM)[None, :]
    phi, slope = x, x
    if FEATURES == "unit_safe_exp":
        to_log2: tl.constexpr = 1.0 if NORM else LOG2E
        if NORM:
            x = tl.where(real[:, None] & (column < K)[None, :], x, float("-inf"))
        phi = exp2((x - known[1][:, None]) * to_log2) * known[2][:, None]
        slope = phi
    elif FEATURES == "unit_silu":
        if NORM:
            x *= LN2
        s = tl.sigmoid(x)
        phi = x * s * known[2][:, None]
        slope = s * (1 + x * (1 - s)) * known[2][:, None]
    return phi, slope


@triton.jit
def feature_gradient(phi, slope, d, along, FEATURES: tl.constexpr):
    """Gradient [C, BLOCK] of y, from that of the features, d; `norm_gradient_kernel` takes it on to what is in memory.
    along [C]: phi . d over all channels."""
    if FEATURES != "given":
        d = slope * (d - phi * along[:, None])
    return d


@triton.jit
def load_beta(beta_ptr, start, t, real, h, H, limit, LOGITS: tl.constexpr):
    """[C], 0 for padding. LOGITS: limit * sigmoid of what is in memory."""
    b = tl.load(beta_ptr + (start + t) * H + h, mask=real, other=0.0).to(tl.float32)
    if LOGITS:
        b = tl.where(real, limit * tl.sigmoid(b), 0.0)
    return b


@triton.jit
def load_decays(
    g_ptr, r_ptr, t, real, g_step, r_step, column, K: tl.constexpr, GATE: tl.constexpr, PER_HEAD: tl.constexpr
):
    """Log2-decays of the channels `column`, at least LOWEST; 0 for padding. GATE: "none", "log" (natural logarithms) or
    "refined" (logits); PER_HEAD: one for all channels."""
    if PER_HEAD:
        one = tl.load(g_ptr + t * g_step, mask=real, other=0.0).to(tl.float32) * LOG2E
        gg = tl.broadcast_to(one[:, None], (t.shape[0], column.shape[0]))
    else:
        g, r = load_gate(g_ptr, r_ptr, t, real, g_step, r_step, column, K, GATE)
        gg = decays(g, r, t.shape[0], column.shape[0], GATE)
    return maximum(gg, LOWEST)


@triton.jit
def factors(gg, DEEP: tl.constexpr, EXACT: tl.constexpr):
    """(E, the factor of what scores write, 0 where a token is out of range, and F, all [C, BK]; total [BK] in bits;
    B)."""
    B = sums(gg, 1.0, False, EXACT)
    total = tl.sum(gg, 0)
    D = exp2(-B)
    if DEEP:
        D = tl.where(B > -NEAR, D, 0.0)
        F = exp2(later(gg, "tf32x3" if EXACT else "tf32"))
    else:
        F = D * exp2(total)[None, :]
    return exp2(B), D, F, total, B


@triton.jit
def doubled(X, A, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    """`inverse` of diagonal blocks of 2 SIZE rows, from X, that of blocks of SIZE: these on the diagonal, and
    -X_2 A_21 X_1 below."""
    rows = tl.arange(0, A.shape[0])
    t, s = rows[:, None], rows[None, :]
    below = ((t // (2 * SIZE)) == (s // (2 * SIZE))) & ((t // SIZE) > (s // SIZE))
    AX = tl.dot(tl.where(below, A, 0.0), X, input_precision=PRECISION)
    return X - tl.dot(X, AX, input_precision=PRECISION)


@triton.jit
def inverse(A, PRECISION: tl.constexpr):
    """(I + A)^-1 of strictly lower triangular A [C, C]: of diagonal blocks of 2 rows, then of 4, 8, ... rows."""
    rows = tl.arange(0, A.shape[0])
    t, s = rows[:, None], rows[None, :]
    X = tl.where(t == s, 1.0, 0.0) - tl.where((t // 2) == (s // 2), A, 0.0)
    for level in tl.static_range(1, 6):
        if 2**level < A.shape[0]:
            X = doubled(X, A, 2**level, PRECISION)
    return X
