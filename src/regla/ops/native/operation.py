"""The engine that runs on a CPU: calls of the C kernels. See `regla.ops.fused` for the tensors."""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from regla.ops.fused import Inputs, gate_kind, rows
from regla.ops.native.arguments import FLOAT, INT, POINTER, Arguments, Rows, chunks_of, in_float32, padded
from regla.ops.units import NOTHING, no_unit_suits, top_exponents

_TINY = -60  # the exponent of gradients that come near denormal numbers in the C kernels

_KINDS = {"none": 0, "log": 1, "refined": 2}


class _Problem(ctypes.Structure):
    """token.h: Problem, field by field."""

    _fields_ = (
        *((name, INT) for name in ("sequences", "heads", "queries", "K", "V", "chunk", "threads")),
        *((name, INT) for name in ("safe_exp", "decaying", "key_gate", "value_gate")),
        ("scale", FLOAT),
        *((name, POINTER) for name in ("bounds", "first_chunk", "mask")),
        *((name, Rows) for name in ("q", "k", "v", "gk", "rk", "gv", "rv")),
        *((name, POINTER) for name in ("initial_state", "before")),
        ("o", Rows),
        *((name, POINTER) for name in ("final_state", "last", "states", "chunk_m", "factor", "weight", "bias")),
        ("eps", FLOAT),
        ("d_o", Rows),
        ("d_final", POINTER),
        *((name, Rows) for name in ("d_q", "d_k", "d_v", "d_gk", "d_rk", "d_gv", "d_rv")),
        ("d_initial", POINTER),
    )


_NAMES = ("q", "k", "v", "gk", "rk", "gv", "rv")


def _arguments(inputs: Inputs) -> Arguments:
    q, k, v, gk, rk, gv, rv, mask, cu_seqlens, *_ = inputs
    problem = _Problem(key_gate=_KINDS[gate_kind(gk, rk)], value_gate=_KINDS[gate_kind(gv, rv)])
    call = Arguments(problem, q, k, v, cu_seqlens)
    call.points(mask=mask)
    for name, x in zip(_NAMES, inputs[:7], strict=True):
        call.rows(name, None if x is None else rows(x.detach().float()))
    return call


def forward(
    inputs: Inputs,
    scale: float,
    safe_exp: bool,
    decaying: bool,
    keep: bool,
) -> tuple[Tensor, ...]:
    """(o, final state, last m, m before each chunk, the factor of every output, the state before each chunk)."""
    q, k, v, *_ = inputs
    filled = outputs(q, k, v, inputs.cu_seqlens, safe_exp, keep)
    o, final, last, m, factors, states = filled
    call = _arguments(inputs)
    call.problem.scale, call.problem.safe_exp, call.problem.decaying = scale, safe_exp, decaying
    o_32 = o if o.dtype == torch.float32 else torch.empty_like(o, dtype=torch.float32)
    call.rows("o", o_32)
    call.points(
        initial_state=in_float32(inputs.initial_state), before=in_float32(inputs.before), final_state=final, last=last
    )
    if keep:
        call.points(states=states, chunk_m=m, factor=factors)
    call.run("regla_forward")
    if o_32 is not o:
        o.copy_(o_32)
    return filled


def outputs(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, safe_exp: bool, keep: bool
) -> tuple[Tensor, ...]:
    """The tensors that `forward` fills."""
    B, T, H, K = k.shape
    V, HQ = v.shape[-1], q.shape[2]
    N = B if cu_seqlens is None else cu_seqlens.numel() - 1
    kept = chunks_of(k, cu_seqlens) + 1 if keep else 0
    new = functools.partial(k.new_empty, dtype=torch.float32)
    return (
        v.new_empty(B, T, HQ, V),
        new(N, H, K, V),
        new(N, H),
        new(kept, H),
        new(B, T if keep else 0, HQ),
        new(kept, H, K, padded(V)),
    )


def backward(
    d_o: Tensor,
    d_final: Tensor | None,
    inputs: Inputs,
    m: Tensor,
    factors: Tensor,
    states: Tensor,
    scale: float,
    safe_exp: bool,
    decaying: bool,
    grads: Sequence[Tensor | None],
    d_initial: Tensor,
) -> None:
    """Fill the gradients of q, k, v, gk, rk, gv, rv and of the initial state.

    The C kernels have a unit for each sequence and head. What one unit does not suit, and what is so small that they
    would take it for 0, as they do denormal numbers, comes to them by itself or multiplied by a power of two.
    """
    of_outputs = _exponents_of_outputs(d_o, inputs)
    of_state = None if d_final is None else top_exponents(d_final, (2, 3))
    # Of outputs the kernels multiply gradients by 2^-72 or more, with the safe exponential.
    lowered = of_outputs - (72 if safe_exp else 0) * (of_outputs > NOTHING)
    if d_final is not None and of_state is not None and no_unit_suits(lowered, of_state):
        at_once = [(d_o, None, of_outputs), (torch.zeros_like(d_o), d_final, of_state)]
    else:
        at_once = [(d_o, d_final, of_outputs)]
    options = inputs, m, factors, states, scale, safe_exp, decaying
    for i, (d_outputs, d_state, exponents) in enumerate(at_once):
        into = grads if i == 0 else [None if x is None else torch.empty_like(x) for x in grads]
        into_initial = d_initial if i == 0 else torch.empty_like(d_initial)
        _backward_in_range(d_outputs, d_state, exponents, into, into_initial, *options)
        if i > 0:
            for total, x in zip([*grads, d_initial], [*into, into_initial], strict=True):
                if total is not None and x is not None:
                    total += x


def _exponents_of_outputs(d_o: Tensor, inputs: Inputs) -> Tensor:
    """`top_exponents` of d_o [B, T, HQ, V] for each sequence and state head, [N, H]."""
    d_o = d_o.unflatten(2, (inputs.k.shape[2], -1))
    if inputs.cu_seqlens is None:
        return top_exponents(d_o, (1, 3, 4))
    bounds = itertools.pairwise(inputs.cu_seqlens.tolist())
    nothing = d_o.new_zeros(1, 1, *d_o.shape[2:])
    of_sequences = [top_exponents(d_o[:, lo:hi] if lo < hi else nothing, (1, 3, 4)) for lo, hi in bounds]
    return torch.cat(of_sequences)


def _backward_in_range(
    d_o: Tensor,
    d_final: Tensor | None,
    exponents: Tensor,
    grads: Sequence[Tensor | None],
    d_initial: Tensor,
    inputs: Inputs,
    *options: Any,
) -> None:
    """`_backward` of what a power of two brings to about 1, where it is tiny; `exponents` [N, H] say how tiny."""
    tiny = (exponents > NOTHING) & (exponents < _TINY)
    if not tiny.any():
        return _backward(d_o, d_final, grads, d_initial, inputs, *options)
    up = torch.where(tiny, -exponents, 0)
    by_token = up[:, None] if inputs.cu_seqlens is None else up.repeat_interleave(inputs.cu_seqlens.diff(), 0)[None]
    by_token = by_token[..., None]  # [B, T or 1, H, 1]
    of_queries = by_token.repeat_interleave(d_o.shape[2] // up.shape[1], 2)
    d_final = None if d_final is None else torch.ldexp(d_final, up[..., None, None])
    _backward(torch.ldexp(d_o.float(), of_queries), d_final, grads, d_initial, inputs, *options)
    for i, grad in enumerate(grads):
        if grad is not None:
            grad.copy_(torch.ldexp(grad.float(), -(of_queries if i == 0 else by_token)))
    d_initial.copy_(torch.ldexp(d_initial, -up[..., None, None]))


def _backward(
    d_o: Tensor,
    d_final: Tensor | None,
    grads: Sequence[Tensor | None],
    d_initial: Tensor,
    inputs: Inputs,
    m: Tensor,
    factors: Tensor,
    states: Tensor,
    scale: float,
    safe_exp: bool,
    decaying: bool,
) -> None:
    call = _arguments(inputs)
    call.problem.scale, call.problem.safe_exp, call.problem.decaying = scale, safe_exp, decaying
    call.rows("d_o", rows(d_o.float()))
    call.points(d_final=in_float32(d_final), states=states, chunk_m=m, factor=factors, d_initial=d_initial)
    written = [x if x is None or x.dtype == torch.float32 else x.new_empty(x.shape, dtype=torch.float32) for x in grads]
    for name, grad in zip(_NAMES, written, strict=True):
        call.rows(f"d_{name}", grad)
    call.run("regla_backward")
    for grad, value in zip(grads, written, strict=True):
        if grad is not None and value is not None and value is not grad:
            grad.copy_(value)


def step(
    inputs: Inputs,
    S: Tensor,
    m: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: float,
    decaying: bool,
    eps: float,
    o: Tensor,
) -> Tensor:
    """o, filled: one token of every sequence, S and m overwritten."""
    call = _arguments(inputs)
    call.problem.scale, call.problem.safe_exp, call.problem.decaying = scale, True, decaying
    call.problem.eps = eps
    o_32 = o if o.dtype == torch.float32 else torch.empty_like(o, dtype=torch.float32)
    call.rows("o", o_32)
    call.points(initial_state=S, before=m, final_state=S, last=m, weight=in_float32(weight), bias=in_float32(bias))
    call.run("regla_forward")
    return o if o_32 is o else o.copy_(o_32)
