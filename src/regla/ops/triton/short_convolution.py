"""The short causal convolution and its activation (`regla.ops.short_convolution`): every number is read from memory
once, but for the few tokens in which neighbouring CTAs overlap.

A CTA of one warp takes some channels of a stretch of tokens. A thread holds the last tokens of its own channels in
registers, so no two threads exchange anything, and what the gradient of a filter sums stays in one thread to the end.

Shape legend: B sequences, T tokens, C channels; [C'] a CTA's channels.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from regla.ops.triton.chip import chip_of
from regla.ops.triton.launch import cdiv, launch, power_of_2
from regla.ops.triton.output_norm import activated

_CHANNELS = 128  # of a CTA, 4 of a thread
_ROWS = 16  # tokens of a CTA of the forward kernel
_AT_ONCE = 4  # tokens whose loads the gradient's kernel issues together
_LONGEST, _SHORTEST = 128, 16  # tokens of a CTA of the gradient's kernel
_CTAS = 16  # of a multiprocessor, which a short input is cut up for


@triton.jit
def sequence_at(cu_ptr, sequences, t):
    """(first token of the packed sequence that holds token t, first token behind it)"""
    low, high = 0, sequences
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(cu_ptr + middle).to(tl.int32) <= t
        low, high = tl.where(before, middle, low), tl.where(before, high, middle)
    return tl.load(cu_ptr + low).to(tl.int32), tl.load(cu_ptr + low + 1).to(tl.int32)


@triton.jit
def earlier(x_ptr, state_ptr, t, x_step, ci, inside, C: tl.constexpr, LAST: tl.constexpr, STATE: tl.constexpr):
    """[C'] of a token t before those of a CTA; before the first token, what the state [LAST, C] holds."""
    x = tl.load(x_ptr + t.to(tl.int64) * x_step + ci, mask=inside & (t >= 0), other=0.0).to(tl.float32)
    if STATE:
        x += tl.load(state_ptr + (t + LAST) * C + ci, mask=inside & (t < 0), other=0.0).to(tl.float32)
    return x


@triton.jit
def lag(x, place, j: tl.constexpr, PACKED: tl.constexpr):
    """x, of a token j places before one that has `place` tokens before it in its sequence."""
    if PACKED and j > 0:
        x = tl.where(place >= j, x, 0.0)
    return x


@triton.jit
def taps_of(weight_ptr, ci, inside, C: tl.constexpr, TAPS: tl.constexpr):
    weight = ()
    for j in tl.static_range(TAPS):
        weight = weight + (tl.load(weight_ptr + j * C + ci, mask=inside, other=0.0).to(tl.float32),)
    return weight


@triton.jit(do_not_specialize=["T", "blocks", "sequences"])
def short_convolution_kernel(
    x_ptr, weight_ptr, state_ptr, cu_ptr, y_ptr, after_ptr, T, blocks, sequences, x_row, x_step,
    C: tl.constexpr, BC: tl.constexpr, TAPS: tl.constexpr, ROWS: tl.constexpr, ACTIVATION: tl.constexpr,
    STATE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    LAST: tl.constexpr = TAPS - 1
    WIDE: tl.constexpr = (C + BC - 1) // BC
    cta = tl.program_id(0)
    ci = cta % WIDE * BC + tl.arange(0, BC)
    inside = ci < C
    first = cta // WIDE % blocks * ROWS
    b = (cta // WIDE // blocks).to(tl.int64)
    x_ptr += b * x_row
    state_ptr = state_ptr + b * (LAST * C) if STATE else state_ptr
    rows = ()
    for i in tl.static_range(LAST):
        rows = rows + (earlier(x_ptr, state_ptr, first + i - LAST, x_step, ci, inside, C, LAST, STATE),)
    for i in tl.static_range(ROWS):
        t = first + i
        x = tl.load(x_ptr + t.to(tl.int64) * x_step + ci, mask=inside & (t < T), other=0.0).to(tl.float32)
        rows = rows + (x,)
    weight = taps_of(weight_ptr, ci, inside, C, TAPS)
    begin, end, place = 0, 0, 0
    if PACKED:
        begin, end = sequence_at(cu_ptr, sequences, first)
    for i in tl.static_range(ROWS):
        t = first + i
        if PACKED:
            if t >= end:
                begin, end = sequence_at(cu_ptr, sequences, t)
            place = t - begin
        y = rows[i + LAST]
        for j in tl.static_range(TAPS):
            y += weight[j] * lag(rows[i + LAST - j], place, j, PACKED)
        if ACTIVATION != "none":
            y, _ = activated(y, ACTIVATION)
        at = y_ptr + (b * T + t) * C + ci
        tl.store(at, y.to(y_ptr.dtype.element_ty), mask=inside & (t < T))
    if first == 0:
        for i in tl.static_range(LAST):
            x = earlier(x_ptr, state_ptr, T + i - LAST, x_step, ci, inside, C, LAST, STATE)
            tl.store(after_ptr + (b * LAST + i) * C + ci, x.to(after_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T", "blocks", "length", "sequences"])
def short_convolution_gradient_kernel(
    d_y_ptr, d_after_ptr, x_ptr, weight_ptr, state_ptr, cu_ptr, d_x_ptr, d_weight_ptr, d_state_ptr,
    T, blocks, length, sequences, x_row, x_step,
    C: tl.constexpr, BC: tl.constexpr, TAPS: tl.constexpr, ROWS: tl.constexpr, ACTIVATION: tl.constexpr,
    STATE: tl.constexpr, PACKED: tl.constexpr, AFTER: tl.constexpr,
):  # fmt: skip
    """With d_t = d_y_t activation'(y_t), y recomputed:

        d_x_t = d_t + sum_j w_j d_{t+j}          d_w_j = sum_t d_t x_{t-j}

    A CTA walks over `length` tokens and the TAPS - 1 behind them, which only add to gradients of its own. `open` are
    gradients of the last tokens, to which later ones add still. Each CTA writes a row of d_weight.
    """
    LAST: tl.constexpr = TAPS - 1
    WIDE: tl.constexpr = (C + BC - 1) // BC
    cta = tl.program_id(0)
    ci = cta % WIDE * BC + tl.arange(0, BC)
    inside = ci < C
    first = cta // WIDE % blocks * length
    stop = tl.minimum(first + length, T)
    b = (cta // WIDE // blocks).to(tl.int64)
    x_ptr += b * x_row
    d_y_ptr += b * T * C
    d_x_ptr += b * T * C
    if STATE:
        state_ptr += b * (LAST * C)
        d_state_ptr += b * (LAST * C)
    if AFTER:
        d_after_ptr += b * (LAST * C)
    weight = taps_of(weight_ptr, ci, inside, C, TAPS)
    seen, open, sums = (), (), (tl.zeros([BC], tl.float32),)
    for j in tl.static_range(1, TAPS):
        seen = seen + (earlier(x_ptr, state_ptr, first - j, x_step, ci, inside, C, LAST, STATE),)
        open = open + (tl.zeros([BC], tl.float32),)
        sums = sums + (tl.zeros([BC], tl.float32),)
    begin, end, place = 0, 0, 0
    if PACKED:
        begin, end = sequence_at(cu_ptr, sequences, first)
    for start in range(first, stop + LAST, ROWS):
        xs, ds = (), ()
        for i in tl.static_range(ROWS):
            t = start + i
            here = inside & (t < T)
            xs = xs + (tl.load(x_ptr + t.to(tl.int64) * x_step + ci, mask=here, other=0.0),)
            ds = ds + (tl.load(d_y_ptr + t.to(tl.int64) * C + ci, mask=here, other=0.0),)
        for i in tl.static_range(ROWS):
            t = start + i
            if PACKED:
                if t >= end:
                    begin, end = sequence_at(cu_ptr, sequences, t)
                place = t - begin
            rows = (xs[i].to(tl.float32),) + seen
            d = ds[i].to(tl.float32)
            if ACTIVATION != "none":
                y = rows[0]
                for j in tl.static_range(TAPS):
                    y += weight[j] * lag(rows[j], place, j, PACKED)
                _, slope = activated(y, ACTIVATION)
                d = tl.where(t < T, d * slope, 0.0)
            own = tl.where(t < stop, d, 0.0)
            grown, added = (d + weight[0] * d,), ()
            for j in tl.static_range(TAPS):
                added = added + (sums[j] + own * lag(rows[j], place, j, PACKED),)
            for j in tl.static_range(1, TAPS):
                grown = grown + (open[j - 1] + lag(weight[j] * d, place, j, PACKED),)
            seen, open, sums = rows[:LAST], grown[:LAST], added
            d_x, done = grown[LAST], t - LAST  # nothing adds to it any more
            if AFTER:
                kept = done + LAST - T
                d_x += tl.load(d_after_ptr + kept * C + ci, mask=inside & (kept >= 0) & (done < T), other=0.0).to(
                    tl.float32
                )
            at = done.to(tl.int64) * C + ci
            is_own = inside & (done >= first) & (done < stop)
            tl.store(d_x_ptr + at, d_x.to(d_x_ptr.dtype.element_ty), mask=is_own)
            if STATE:
                of_state = inside & (done < 0) & (first == 0)
                tl.store(d_state_ptr + at + LAST * C, d_x.to(d_state_ptr.dtype.element_ty), mask=of_state)
    d_weight_ptr += (cta // WIDE).to(tl.int64) * (TAPS * C)
    for j in tl.static_range(TAPS):
        tl.store(d_weight_ptr + j * C + ci, sums[j], mask=inside)


@triton.jit
def short_convolution_step_kernel(
    x_ptr, weight_ptr, state_ptr, mask_ptr, y_ptr, after_ptr, x_row, mask_row,
    C: tl.constexpr, BC: tl.constexpr, TAPS: tl.constexpr, ACTIVATION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One token. `after` may be the state: a thread reads of it what it writes, before it does."""
    LAST: tl.constexpr = TAPS - 1
    WIDE: tl.constexpr = (C + BC - 1) // BC
    cta = tl.program_id(0)
    ci = cta % WIDE * BC + tl.arange(0, BC)
    inside = ci < C
    b = (cta // WIDE).to(tl.int64)
    real = tl.full([], 1, tl.int1)
    if MASKED:
        real = tl.load(mask_ptr + b * mask_row) != 0
    rows = ()
    for i in tl.static_range(LAST):
        rows = rows + (tl.load(state_ptr + (b * LAST + i) * C + ci, mask=inside, other=0.0),)
    rows = rows + (tl.load(x_ptr + b * x_row + ci, mask=inside & real, other=0.0),)
    weight = taps_of(weight_ptr, ci, inside, C, TAPS)
    y = rows[LAST].to(tl.float32)
    for j in tl.static_range(TAPS):
        y += weight[j] * rows[LAST - j].to(tl.float32)
    if ACTIVATION != "none":
        y, _ = activated(y, ACTIVATION)
    tl.store(y_ptr + b * C + ci, y.to(y_ptr.dtype.element_ty), mask=inside)
    for i in tl.static_range(LAST):
        tl.store(after_ptr + (b * LAST + i) * C + ci, tl.where(real, rows[i + 1], rows[i]), mask=inside)


def forward(
    x: Tensor,
    weight: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str,
    y: Tensor,
    after: Tensor,
) -> None:
    """Fill y and after."""
    (B, T, _C), blocks = x.shape, cdiv(x.shape[1], _ROWS)
    constants, wide = _constants(x, weight, activation)
    launch(
        short_convolution_kernel, (B * blocks * wide, 1, 1),
        (x, weight.contiguous(), _contiguous(state), _contiguous(cu_seqlens), y, after),
        (T, blocks, _sequences(cu_seqlens), x.stride(0), x.stride(1)),
        **constants, ROWS=_ROWS, STATE=state is not None, PACKED=cu_seqlens is not None,
    )  # fmt: skip


def backward(
    d_y: Tensor,
    d_after: Tensor | None,
    x: Tensor,
    weight: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str,
    d_x: Tensor,
    d_weight: Tensor,
    d_state: Tensor,
) -> None:
    """Fill the gradients; that of a state only if there is one."""
    B, T, C = x.shape
    constants, wide = _constants(x, weight, activation)
    length, needed = _LONGEST, _CTAS * chip_of(x.device).multiprocessors
    while length > _SHORTEST and B * cdiv(T, length) * wide < needed:
        length //= 2
    blocks = cdiv(T, length)
    parts = d_weight.new_empty(B * blocks, weight.shape[0], C)
    launch(
        short_convolution_gradient_kernel, (B * blocks * wide, 1, 1),
        (d_y, d_after, x, weight.contiguous(), _contiguous(state), _contiguous(cu_seqlens), d_x, parts,
         None if state is None else d_state),
        (T, blocks, length, _sequences(cu_seqlens), x.stride(0), x.stride(1)),
        **constants, ROWS=_AT_ONCE, STATE=state is not None, PACKED=cu_seqlens is not None, AFTER=d_after is not None,
    )  # fmt: skip
    torch.sum(parts, 0, out=d_weight)


def step(
    x: Tensor, weight: Tensor, state: Tensor, after: Tensor, mask: Tensor | None, activation: str, y: Tensor
) -> None:
    """Fill y and after, which may be the state."""
    constants, wide = _constants(x, weight, activation)
    launch(
        short_convolution_step_kernel, (x.shape[0] * wide, 1, 1), (x, weight.contiguous(), state, mask, y, after),
        (x.stride(0), 0 if mask is None else mask.stride(0)), **constants, MASKED=mask is not None,
    )  # fmt: skip


def _constants(x: Tensor, weight: Tensor, activation: str) -> tuple[dict[str, Any], int]:
    """What the kernels are compiled for, and how many CTAs take a token's channels."""
    C = x.shape[2]
    BC = min(_CHANNELS, power_of_2(C))
    return {"C": C, "BC": BC, "TAPS": weight.shape[0], "ACTIVATION": activation, "num_warps": 1}, cdiv(C, BC)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _sequences(cu_seqlens: Tensor | None) -> int:
    return 0 if cu_seqlens is None else cu_seqlens.numel() - 1
