"""The norm over a head's output and the gate on it (`regla.ops.output_norm`): everything about a token and head is in a
CTA's registers at once, and read from memory once."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from regla.ops.triton.chip import chip_of
from regla.ops.triton.launch import cdiv, launch, power_of_2, token_step
from regla.ops.triton.tiles import LOG2E, largest, maximum

_NUMBERS = 2048  # that a CTA takes at once


@triton.jit
def normalised(h_ptr, at, real, eps, V: tl.constexpr, CENTRED: tl.constexpr):
    """(x r, r = 1 / sqrt(mean(x^2) + eps), max |h|), x [R, BV] = h / max |h|, minus its mean if CENTRED."""
    h = tl.load(h_ptr + at, mask=real, other=0.0).to(tl.float32)
    size = largest(tl.abs(h), 1)
    size = tl.where(size < 1.1754943508222875e-38, 1.0, size)[:, None]
    x = h / size
    if CENTRED:
        x = tl.where(real, x - (tl.sum(x, 1) * (1 / V))[:, None], 0.0)
    r = tl.rsqrt(maximum(tl.sum(x * x, 1) * (1 / V) + eps, 1e-36))[:, None]  # of a row of zeros not infinite
    return x * r, r, size


@triton.jit
def activated(g, GATE: tl.constexpr):
    """(activation(g), its derivative), g in float32"""
    s = 1 / (1 + tl.exp2(-g * LOG2E))
    if GATE == "silu":
        return g * s, s + g * s * (1 - s)
    return s, s * (1 - s)


@triton.jit
def places(cta, tokens, gate_step, H: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, R: tl.constexpr):
    """Of the R tokens of one head that a CTA takes: the head's first channel, where in h they are, where in the
    gate's logits, and which of these there are."""
    token = tl.arange(0, R).to(tl.int64) + cta // H * R
    first, vi = cta % H * V, tl.arange(0, BV)
    real = (token < tokens)[:, None] & (vi < V)[None, :]
    channel = first + vi[None, :]
    return first, token[:, None] * (H * V) + channel, token[:, None] * gate_step + channel, real


@triton.jit(do_not_specialize=["tokens"])
def output_norm_kernel(
    h_ptr, weight_ptr, bias_ptr, gate_ptr, o_ptr, eps, tokens, gate_step,
    H: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, R: tl.constexpr, CENTRED: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    first, at, gate_at, real = places(tl.program_id(0), tokens, gate_step, H, V, BV, R)
    vi = tl.arange(0, BV)
    o, _, _ = normalised(h_ptr, at, real, eps, V, CENTRED)
    o *= tl.load(weight_ptr + first + vi, mask=vi < V, other=0.0).to(tl.float32)[None, :]
    if CENTRED:
        o += tl.load(bias_ptr + first + vi, mask=vi < V, other=0.0).to(tl.float32)[None, :]
    if GATE != "none":
        a, _ = activated(tl.load(gate_ptr + gate_at, mask=real, other=0.0).to(tl.float32), GATE)
        o *= a
    tl.store(o_ptr + at, o.to(o_ptr.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["tokens", "ctas"])
def output_norm_gradient_kernel(
    d_o_ptr, h_ptr, weight_ptr, bias_ptr, gate_ptr, d_h_ptr, d_gate_ptr, d_weight_ptr, d_bias_ptr,
    eps, tokens, ctas, gate_step, d_gate_step,
    H: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, R: tl.constexpr, CENTRED: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """With y what is normalised, r / max |h| the factor from h to it, and d = activation(gate) d_o:

        d_h = (w d - y mean(y w d)) r / max |h|, minus its mean if CENTRED     d_gate = activation'(gate) (w y + b) d_o
        d_weight = sum of d y                                                                          d_bias = sum of d

    Of `ctas` for each head one takes every so-many-th block of R tokens, and writes a row of d_weight and d_bias.
    """
    cta = tl.program_id(0)
    vi = tl.arange(0, BV)
    first = cta % H * V
    weight = tl.load(weight_ptr + first + vi, mask=vi < V, other=0.0).to(tl.float32)[None, :]
    bias = 0.0
    if CENTRED:
        bias = tl.load(bias_ptr + first + vi, mask=vi < V, other=0.0).to(tl.float32)[None, :]
    d_weight, d_bias = tl.zeros([R, BV], tl.float32), tl.zeros([R, BV], tl.float32)
    blocks = H * tl.cdiv(tokens, R)
    for block in range(cta, blocks, H * ctas):
        _, at, gate_at, real = places(block, tokens, gate_step, H, V, BV, R)
        y, r, size = normalised(h_ptr, at, real, eps, V, CENTRED)
        d = tl.load(d_o_ptr + at, mask=real, other=0.0).to(tl.float32)
        if GATE != "none":
            a, slope = activated(tl.load(gate_ptr + gate_at, mask=real, other=0.0).to(tl.float32), GATE)
            d_gate = d * (y * weight + bias) * slope
            _, _, d_gate_at, _ = places(block, tokens, d_gate_step, H, V, BV, R)
            tl.store(d_gate_ptr + d_gate_at, d_gate.to(d_gate_ptr.dtype.element_ty), mask=real)
            d *= a
        d_weight += d * y
        if CENTRED:
            d_bias += d
        d *= weight
        d -= y * (tl.sum(d * y, 1) * (1 / V))[:, None]
        if CENTRED:
            d -= (tl.sum(d, 1) * (1 / V))[:, None]
        tl.store(d_h_ptr + at, (d * r / size).to(d_h_ptr.dtype.element_ty), mask=real)
    row = cta // H * (H * V) + first + vi
    tl.store(d_weight_ptr + row, tl.sum(d_weight, 0), mask=vi < V)
    if CENTRED:
        tl.store(d_bias_ptr + row, tl.sum(d_bias, 0), mask=vi < V)


def forward(
    h: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None, activation: str, eps: float, o: Tensor
) -> None:
    """Fill o."""
    B, T, H, _V = h.shape
    constants = _constants(h, bias, gate, activation)
    launch(
        output_norm_kernel, (H * cdiv(B * T, constants["R"]), 1, 1),
        (h, weight.contiguous(), _contiguous(bias), gate, o), (eps, B * T, token_step(gate)), **constants,
    )  # fmt: skip


def backward(
    d_o: Tensor,
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    activation: str,
    eps: float,
    d_h: Tensor,
    d_gate: Tensor,
    d_weight: Tensor,
    d_bias: Tensor,
) -> None:
    """Fill the gradients; of what there is not they are not looked at."""
    B, T, H, V = h.shape
    constants = _constants(h, bias, gate, activation)
    chip = chip_of(h.device)
    at_once = chip.output_norm_ctas["rms" if bias is None else "layer"] * chip.multiprocessors
    ctas = max(1, min(cdiv(B * T, constants["R"]), at_once // H))
    parts = d_weight.new_empty(2, ctas, H, V) if bias is not None else d_weight.new_empty(1, ctas, H, V)
    launch(
        output_norm_gradient_kernel, (H * ctas, 1, 1),
        (d_o, h, weight.contiguous(), _contiguous(bias), gate, d_h, d_gate, parts[0], parts[-1]),
        (eps, B * T, ctas, token_step(gate), H * V), **constants,
    )  # fmt: skip
    torch.sum(parts[0], 0, out=d_weight)
    if bias is not None:
        torch.sum(parts[1], 0, out=d_bias)


def _constants(h: Tensor, bias: Tensor | None, gate: Tensor | None, activation: str) -> dict[str, Any]:
    H, V = h.shape[2:]
    BV = power_of_2(V)
    return {
        "H": H,
        "V": V,
        "BV": BV,
        "R": max(1, _NUMBERS // BV),
        "CENTRED": bias is not None,
        "GATE": "none" if gate is None else activation,
        "num_warps": 4,
    }


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()
