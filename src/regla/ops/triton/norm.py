"""The RMS norm of queries and keys, x / sqrt(mean(x^2) + eps) * weight over the channels of a head."""

from __future__ import annotations

import triton
import triton.language as tl

from regla.ops.triton.tiles import LOG2E, maximum


@triton.jit
def load_norm(q_weight_ptr, k_weight_ptr, K: tl.constexpr, BK: tl.constexpr, NORM: tl.constexpr):
    """(weights of the queries' norm, of the keys'), [BK] each, times log2(e)."""
    qw, kw = 0.0, 0.0
    if NORM:
        ki = tl.arange(0, BK)
        qw = tl.load(q_weight_ptr + ki, mask=ki < K, other=0.0).to(tl.float32) * LOG2E
        kw = tl.load(k_weight_ptr + ki, mask=ki < K, other=0.0).to(tl.float32) * LOG2E
    return qw, kw


@triton.jit
def one_over_rms(x, eps, K: tl.constexpr):
    """1 / rms [C] of x [C, BK], which is 0 beyond K channels; finite even where x and eps are 0."""
    return tl.rsqrt(maximum(tl.sum(x * x, 1) * (1 / K) + eps, 1e-36))


@triton.jit
def logits(x, weight, eps, valid, K: tl.constexpr, NORM: tl.constexpr):
    """The logits [C, BK] of x as it is in memory, float32; -inf for padding. With NORM they are normalised and, by way
    of the weights, to the base 2. For padding x is -inf, with NORM 0."""
    x = x.to(tl.float32)
    if not NORM:
        return x
    x = x * one_over_rms(x, eps, K)[:, None] * weight[None, :] + tl.where(valid, 0.0, float("-inf"))[:, None]
    if x.shape[1] != K:
        x = tl.where((tl.arange(0, x.shape[1]) < K)[None, :], x, float("-inf"))
    return x


@triton.jit(do_not_specialize=["q_rows", "k_rows"])
def norm_gradient_kernel(
    dq_ptr, q_ptr, q_weight_ptr, dk_ptr, k_ptr, k_weight_ptr, mask_ptr, d_weights_ptr,
    eps, q_rows, k_rows, HQ, H, dq_step, q_step, dk_step, k_step,
    K: tl.constexpr, BK: tl.constexpr, R: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Put the gradient of queries and keys, as they are in memory, where that of their normalised logits is, of all
    rows (tokens times heads); and what each CTA sums up for the weights into a row of d_weights [CTAs, 2, K].
    """
    d_weights_ptr += tl.program_id(0) * 2 * K
    if tl.program_id(1) == 0:
        _norm_gradient(
            dq_ptr, q_ptr, mask_ptr, q_weight_ptr, d_weights_ptr, eps, q_rows, HQ, dq_step, q_step,
            K, BK, R, MASKED,
        )  # fmt: skip
    else:
        _norm_gradient(
            dk_ptr, k_ptr, mask_ptr, k_weight_ptr, d_weights_ptr + K, eps, k_rows, H, dk_step, k_step,
            K, BK, R, MASKED,
        )  # fmt: skip


@triton.jit
def _norm_gradient(
    d_ptr, x_ptr, mask_ptr, weight_ptr, d_weight_ptr, eps, rows, heads, d_step, x_step,
    K: tl.constexpr, BK: tl.constexpr, R: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Of one of them, R rows at a time. With y = x / rms(x):

    d_x = (weight d - y mean(weight d y)) / rms(x)    d_weight = sum of d y
    """
    ki = tl.arange(0, BK)
    weight = tl.load(weight_ptr + ki, mask=ki < K, other=0.0).to(tl.float32)[None, :]
    d_weight = tl.zeros([R, BK], tl.float32)
    for start in range(tl.program_id(0) * R, rows, tl.num_programs(0) * R):
        row = start + tl.arange(0, R)
        inside = row < rows
        token = (row // heads).to(tl.int64)
        valid = inside
        if MASKED:  # padding may hold NaN
            valid = inside & (tl.load(mask_ptr + token, mask=inside, other=0) != 0)
        at = (row % heads)[:, None] * K + ki[None, :]
        real = valid[:, None] & (ki < K)[None, :]
        x = tl.load(x_ptr + token[:, None] * x_step + at, mask=real, other=0.0).to(tl.float32)
        d = tl.load(d_ptr + token[:, None] * d_step + at, mask=real, other=0.0).to(tl.float32)
        r = one_over_rms(x, eps, K)[:, None]
        y = x * r
        d_weight += d * y
        d *= weight
        d = (d - y * (tl.sum(d * y, 1) * (1 / K))[:, None]) * r
        tl.store(d_ptr + token[:, None] * d_step + at, d.to(d_ptr.dtype.element_ty), mask=real)
    tl.store(d_weight_ptr + ki, tl.sum(d_weight, 0), mask=ki < K)
