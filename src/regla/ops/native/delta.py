"""The gated delta rule on a CPU: calls of the C kernels of `delta.c`, forward and backward."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor, library

from regla.ops.fused import rows
from regla.ops.native.arguments import FLOAT, INT, POINTER, Arguments, Rows, chunks_of, in_float32, padded


def native_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    gk: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`gated_delta_attention` by kernels; see there for the equation, shapes and dtypes. Returns (o, final_state).

    Numbers are read, multiplied and added in float32. Nothing is divided; a decay exp(gk) is at most 1.
    """
    state = None if initial_state is None else initial_state.float()
    inputs = q, k, v, beta, gk, state
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    # A custom operation's own work would take longer than the kernel's of one token.
    run = _forward if k.shape[1] == 1 and not keep and not torch.compiler.is_compiling() else _operation
    o, final, *_ = run(*inputs, cu_seqlens, scale, keep)
    return o, final


class _Problem(ctypes.Structure):
    """delta.c: Problem, field by field."""

    _fields_ = (
        *((name, INT) for name in ("sequences", "heads", "queries", "K", "V", "chunk", "threads", "gate")),
        ("scale", FLOAT),
        *((name, POINTER) for name in ("bounds", "first_chunk")),
        *((name, Rows) for name in ("q", "k", "v", "beta", "gk")),
        ("initial_state", POINTER),
        ("o", Rows),
        *((name, POINTER) for name in ("final_state", "states")),
        *((name, Rows) for name in ("w", "d_o")),
        ("d_final", POINTER),
        *((name, Rows) for name in ("d_q", "d_k", "d_v", "d_beta", "d_gk")),
        ("d_initial", POINTER),
    )


_NAMES = ("q", "k", "v", "beta", "gk")
_NO_GATE, _PER_HEAD, _PER_CHANNEL = range(3)


def _arguments(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, gk: Tensor | None, cu_seqlens: Tensor | None, scale: float
) -> Arguments:
    gate = _NO_GATE if gk is None else _PER_CHANNEL if gk.shape[-1] == k.shape[-1] else _PER_HEAD
    call = Arguments(_Problem(gate=gate, scale=scale), q, k, v, cu_seqlens)
    for name, x in zip(_NAMES, (q, k, v, beta[..., None], gk), strict=True):
        call.rows(name, None if x is None else rows(x.detach().float()))
    return call


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    gk: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(o, final state, and if `keep` for the backward pass: v - S'^T k, and the state before each chunk)."""
    filled = _outputs(q, k, v, cu_seqlens, keep)
    o, final, w, states = filled
    call = _arguments(q, k, v, beta, gk, cu_seqlens, scale)
    o_32 = o if o.dtype == torch.float32 else torch.empty_like(o, dtype=torch.float32)
    call.rows("o", o_32)
    call.points(initial_state=in_float32(initial_state), final_state=final)
    if keep:
        call.rows("w", w)
        call.points(states=states)
    call.run("regla_delta_forward")
    if o_32 is not o:
        o.copy_(o_32)
    return filled


def _outputs(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, T, H, K = k.shape
    V, N = v.shape[-1], B if cu_seqlens is None else cu_seqlens.numel() - 1
    return (
        v.new_empty(B, T, q.shape[2], V),
        v.new_empty(N, H, K, V, dtype=torch.float32),
        v.new_empty(B, T if keep else 0, H, V, dtype=torch.float32),
        v.new_empty(chunks_of(k, cu_seqlens) + 1 if keep else 0, H, K, padded(V), dtype=torch.float32),
    )


_operation = library.custom_op("regla::native_delta_forward", _forward, mutates_args=())


@_operation.register_fake
def _(q, k, v, beta, gk, initial_state, cu_seqlens, scale, keep):  # type: ignore[no-untyped-def]
    return _outputs(q, k, v, cu_seqlens, keep)


@library.custom_op("regla::native_delta_backward", mutates_args=())
def _backward(
    d_o: Tensor,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    gk: Tensor | None,
    cu_seqlens: Tensor | None,
    w: Tensor,
    states: Tensor,
    scale: float,
) -> list[Tensor]:
    """Gradients of q, k, v, beta, the initial state and, where there is one, gk."""
    grads = _gradients_like(q, k, v, beta, gk, cu_seqlens)
    call = _arguments(q, k, v, beta, gk, cu_seqlens, scale)
    call.rows("w", w)
    call.rows("d_o", rows(d_o.float()))
    call.points(d_final=in_float32(d_final), states=states, d_initial=grads[4])
    inputs = [*grads[:4], *grads[5:]]
    written = [x if x.dtype == torch.float32 else torch.empty_like(x, dtype=torch.float32) for x in inputs]
    for name, x in zip(_NAMES, written, strict=False):
        call.rows(f"d_{name}", x[..., None] if name == "beta" else x)
    call.run("regla_delta_backward")
    for grad, x in zip(inputs, written, strict=True):
        if grad is not x:
            grad.copy_(x)
    return grads


@_backward.register_fake
def _(d_o, d_final, q, k, v, beta, gk, cu_seqlens, w, states, scale):  # type: ignore[no-untyped-def]
    return _gradients_like(q, k, v, beta, gk, cu_seqlens)


def _gradients_like(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, gk: Tensor | None, cu_seqlens: Tensor | None
) -> list[Tensor]:
    N = k.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    grads = [x.new_empty(x.shape) for x in (q, k, v, beta)]
    grads.append(v.new_empty(N, *k.shape[2:], v.shape[-1], dtype=torch.float32))
    return grads + ([] if gk is None else [gk.new_empty(gk.shape)])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, beta, gk, initial_state, cu_seqlens, ctx.scale, _ = inputs
    ctx.has_initial = initial_state is not None
    ctx.save_for_backward(q, k, v, beta, gk, cu_seqlens, *output[2:])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, d_o: Tensor | None, d_final: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    q, k, v, beta, gk, cu_seqlens, w, states = ctx.saved_tensors
    if d_o is None:
        d_o = v.new_zeros(*q.shape[:3], v.shape[-1])
    d_q, d_k, d_v, d_beta, d_initial, *rest = _backward(
        d_o, d_final, q, k, v, beta, gk, cu_seqlens, w, states, ctx.scale
    )
    return d_q, d_k, d_v, d_beta, rest[0] if rest else None, d_initial if ctx.has_initial else None, *(None,) * 3


_operation.register_autograd(_gradients, setup_context=_save)
