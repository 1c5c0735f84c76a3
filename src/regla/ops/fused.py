"""The kernels as differentiable operations, opaque to torch.compile: what is common to those of a GPU and of a CPU.

An engine is a module with the functions `outputs`, `forward`, `backward` and `step`, in the shapes that the operations
here have: `regla.ops.triton.operation` and `regla.ops.native.operation`.

Inputs reach the operations in *buffers* [B, T, channels], each of which holds one or several of them side by side, and
gradients leave in buffers like them: those of a product that gave several inputs at once are never put together.
"""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, library

from regla.ops.call import Call, HeadNorm, QKNorm

_INPUTS = (
    "Tensor[] buffers, SymInt[] layout, Tensor? mask, Tensor? cu_seqlens, Tensor? initial_state, Tensor? before, "
    "Tensor[]? weights, float eps, "  # None, not an empty list, which AOTInductor's runtime cannot pass
)
_OPTIONS = "float scale, bool safe_exp, bool decaying, str engine"


class Inputs(NamedTuple):
    """What an engine gets: a `Call`, its gates with a number for every channel. `before` is m, `NO_KEY` for no key yet.
    Of one token cu_seqlens, initial_state, before and norm are None."""

    q: Tensor
    k: Tensor
    v: Tensor
    gk: Tensor | None
    rk: Tensor | None
    gv: Tensor | None
    rv: Tensor | None
    mask: Tensor | None
    cu_seqlens: Tensor | None = None
    initial_state: Tensor | None = None
    before: Tensor | None = None
    norm: QKNorm | None = None


def fused_attention(call: Call, engine: str) -> tuple[Tensor, Tensor, Tensor]:
    """A call by the kernels of `engine` ("triton" or "native"). A mask and a `qk_norm` go with `key_max`, the latter
    with "triton" alone; m [N, H] is `NO_KEY` where there has been no key.

    Returns:
        o [B, T, HQ, V] in the dtype of v; in float32 the final state [N, H, K, V] and m [N, H] (0 without `key_max`).
        Gradients of packed tensors flow to the whole of each.
    """
    buffers, layout = in_buffers(call)
    norm = call.qk_norm
    weights = None if norm is None else [norm.q.contiguous(), norm.k.contiguous()]
    S = None if call.S is None else call.S.float().contiguous()
    needs = [*buffers, *(weights or ())] + ([] if S is None else [S])
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in needs)
    o, final, last, *_ = _forward(
        buffers, layout, call.mask, call.cu_seqlens, S, call.m, weights, 0.0 if norm is None else norm.eps,
        call.scale, call.key_max is not None, call.key_max == "decay", engine, keep,
    )  # fmt: skip
    return o, final, last.detach()


def in_buffers(call: Call) -> tuple[list[Tensor], list[int]]:
    """(buffers, layout): HQ, H, K, V, then the buffer and the first channel of each of q .. rv, -1 for none."""
    (B, T, H, K), V = call.k.shape, call.v.shape[-1]
    tensors = (call.q, call.k, call.v, *call.gates[:4])
    buffers: list[Tensor] = []
    places = [(-1, 0)] * len(tensors)
    for packed in (call.qkv, call.gates.packed):
        if packed is None or not packed.whole.is_contiguous():
            continue
        found = [[i for i, x in enumerate(tensors) if x is part] for part in packed.parts]
        if all(found):
            at = 0
            for (i, *_), part in zip(found, packed.parts, strict=True):
                places[i] = len(buffers), at
                at += part.shape[2] * part.shape[3]
            buffers.append(packed.whole)
    for i, (x, D) in enumerate(zip(tensors, (K, K, V, K, K, V, V), strict=True)):
        if x is not None and places[i][0] < 0:
            places[i] = len(buffers), 0
            buffers.append(rows(x.expand(B, T, -1, D)).flatten(2))
    return buffers, [call.q.shape[2], H, K, V, *itertools.chain(*places)]


def unpack(buffers: Sequence[Tensor], layout: Sequence[int]) -> list[Tensor | None]:
    """q .. rv, [B, T, heads, channels], views of the buffers."""
    HQ, H, K, V, *places = layout
    tensors: list[Tensor | None] = []
    sizes = ((HQ, K), (H, K), (H, V), (H, K), (H, K), (H, V), (H, V))
    for buffer, at, (heads, D) in zip(places[::2], places[1::2], sizes, strict=True):
        if buffer < 0:
            tensors.append(None)
            continue
        x = buffers[buffer]
        row, token, channel = x.stride()
        shape, strides = (*x.shape[:2], heads, D), (row, token, D * channel, channel)
        tensors.append(x.as_strided(shape, strides, x.storage_offset() + at * channel))
    return tensors


def _inputs(buffers: Sequence[Tensor], layout: Sequence[int], *others: Any) -> Inputs:
    *tensors, weights, eps = others
    norm = QKNorm(weights[0], weights[1], eps) if weights else None
    return Inputs(*unpack(buffers, layout), *tensors, norm=norm)  # type: ignore[arg-type,misc]


def rows(x: Tensor) -> Tensor:
    """x [B, T, H, D] such that a token's heads and channels lie side by side, at one distance from token to token."""
    _B, T, H, D = x.shape
    aligned = x.stride(3) == 1 and x.stride(2) == D and x.stride(0) == T * x.stride(1)
    return x if aligned or (H == 1 and x.stride(3) == 1 and x.stride(0) == T * x.stride(1)) else x.contiguous()


def gate_kind(g: Tensor | None, r: Tensor | None) -> str:
    return "none" if g is None else "log" if r is None else "refined"


@functools.cache
def _engine(name: str) -> Any:
    return importlib.import_module(f"regla.ops.{name}.operation")


@library.custom_op(
    "regla::fused_forward",
    mutates_args=(),
    schema=f"({_INPUTS}{_OPTIONS}, bool keep) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    """(o, final state, last m, and if `keep` for the backward pass: m, the factors of the outputs, and states)."""
    buffers, layout, *others, scale, safe_exp, decaying, engine, keep = arguments
    return _engine(engine).forward(_inputs(buffers, layout, *others), scale, safe_exp, decaying, keep)


@_forward.register_fake
def _(buffers, layout, mask, cu_seqlens, initial_state, before, weights, eps, scale, safe_exp, decaying, engine, keep):  # type: ignore[no-untyped-def]
    q, k, v, *_ = unpack(buffers, layout)
    return _engine(engine).outputs(q, k, v, cu_seqlens, safe_exp, keep)


@library.custom_op(
    "regla::fused_backward",
    mutates_args=(),
    schema=f"(Tensor d_o, Tensor? d_final, {_INPUTS}Tensor m, Tensor factors, Tensor states, {_OPTIONS}) -> Tensor[]",
)
def _backward(*arguments: Any) -> list[Tensor]:
    """Gradients of the buffers and, in float32, of the initial state and of the norm's weights in one."""
    d_o, d_final, buffers, layout, *others, m, factors, states, scale, safe_exp, decaying, engine = arguments
    inputs = _inputs(buffers, layout, *others)
    grads = _gradients_like(buffers, layout, inputs.cu_seqlens, others[-2])
    of_inputs, (d_initial, *d_weights) = unpack(grads, layout), grads[len(buffers) :]
    _engine(engine).backward(
        d_o, d_final, inputs, m, factors, states, scale, safe_exp, decaying, of_inputs, d_initial, *d_weights
    )
    return grads


@_backward.register_fake
def _(d_o, d_final, buffers, layout, mask, cu_seqlens, initial_state, before, weights, *_):  # type: ignore[no-untyped-def]
    return _gradients_like(buffers, layout, cu_seqlens, weights)


def _gradients_like(
    buffers: Sequence[Tensor], layout: Sequence[int], cu_seqlens: Tensor | None, weights: Sequence[Tensor] | None
) -> list[Tensor]:
    _HQ, H, K, V, *_ = layout
    N = buffers[0].shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    like = [x.new_empty(x.shape) for x in buffers]
    shapes = [(N, H, K, V), (2, K)][: 2 if weights else 1]
    return like + [buffers[0].new_empty(shape, dtype=torch.float32) for shape in shapes]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    buffers, layout, *tensors, weights, eps, scale, safe_exp, decaying, engine, _ = inputs
    ctx.layout, ctx.buffers, ctx.eps, ctx.options = layout, len(buffers), eps, (scale, safe_exp, decaying, engine)
    ctx.save_for_backward(*buffers, *(weights or ()), *tensors, *output[3:])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, d_o: Tensor | None, d_final: Tensor | None, *_: Any) -> tuple[Any, ...]:
    *of_lists, mask, cu_seqlens, initial_state, before, m, factors, states = ctx.saved_tensors
    buffers, weights = of_lists[: ctx.buffers], of_lists[ctx.buffers :] or None
    if d_o is None:
        HQ, _H, _K, V, *_ = ctx.layout
        d_o = buffers[0].new_zeros(*buffers[0].shape[:2], HQ, V)
    inputs = buffers, ctx.layout, mask, cu_seqlens, initial_state, before, weights, ctx.eps
    grads = _backward(d_o, d_final, *inputs, m, factors, states, *ctx.options)
    d_buffers, (d_initial, *of_weights) = grads[: ctx.buffers], grads[ctx.buffers :]
    d_weights = None
    if weights is not None:
        d_weights = [d.to(x.dtype) for of_both in of_weights for d, x in zip(of_both, weights, strict=True)]
    d_initial = None if initial_state is None else d_initial
    return d_buffers, None, None, None, d_initial, None, d_weights, *(None,) * 6


_forward.register_autograd(_gradients, setup_context=_save)


def fused_step_(call: Call, S: Tensor, m: Tensor, engine: str, norm: HeadNorm | None) -> Tensor:
    """A call of one token, S and m overwritten, and a norm over the output where there is one.

    Args:
        call: of logits, T = 1; where its mask is False S and m stay as they are and h is 0.
        S, m: [N, H, K, V] and [N, H], float32, contiguous; S all zeros is an empty state whatever m.
        engine: "triton" or "native".
        norm: of the outputs.

    Returns:
        [N, 1, HQ, V] in the dtype of v.
    """
    # A custom operation's own work would take longer than the kernel's.
    step = _step_operation if torch.compiler.is_compiling() else _step
    q, k, v, (gk, rk, gv, rv, *_), scale, key_max, mask, *_ = call
    weight, bias, eps = (None, None, 0.0) if norm is None else norm
    return step(q, k, v, gk, rk, gv, rv, mask, S, m, weight, bias, scale, key_max == "decay", eps, engine)


def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gk: Tensor | None,
    rk: Tensor | None,
    gv: Tensor | None,
    rv: Tensor | None,
    mask: Tensor | None,
    S: Tensor,
    m: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: float,
    decaying: bool,
    eps: float,
    engine: str,
) -> Tensor:
    N, _, H, K = k.shape
    V = v.shape[-1]
    q, k, v = (with_dense_channels(x) for x in (q, k, v))
    gk, rk, gv, rv = (
        None if x is None else with_dense_channels(x.expand(N, 1, H, D))
        for x, D in ((gk, K), (rk, K), (gv, V), (rv, V))
    )
    weight, bias = (None if x is None else x.contiguous() for x in (weight, bias))
    inputs, o = Inputs(q, k, v, gk, rk, gv, rv, mask), v.new_empty(N, 1, q.shape[2], V)
    step: Tensor = _engine(engine).step(inputs, S, m, weight, bias, scale, decaying, eps, o)
    return step


_step_operation = library.custom_op("regla::fused_step", _step, mutates_args=("S", "m"))


@_step_operation.register_fake
def _(q, k, v, gk, rk, gv, rv, mask, S, m, weight, bias, scale, decaying, eps, engine):  # type: ignore[no-untyped-def]
    return v.new_empty(v.shape[0], 1, q.shape[2], v.shape[-1])


def with_dense_channels(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
