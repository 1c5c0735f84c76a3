"""The kernels as differentiable operations, opaque to torch.compile: what is common to those of a GPU and of a CPU.

An engine is a module with the functions `outputs`, `forward`, `backward` and `step`, in the shapes that the operations
here have: `regla.ops.triton.operation` and `regla.ops.native.operation`.

Inputs reach the operations in *buffers* [B, T, channels], each of which holds one or several of them side by side, and
gradients leave in buffers like them: those of a product that gave several inputs at once are never put together.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, library

_INPUTS = (
    "Tensor[] buffers, SymInt[] layout, Tensor? mask, Tensor? cu_seqlens, Tensor? initial_state, Tensor? before, "
    "Tensor[] weights, float eps, "
)
_OPTIONS = "float scale, bool safe_exp, bool decaying, str engine"


class QKNorm(NamedTuple):
    """The RMS norm of queries and keys over a head's channels: x / sqrt(mean(x^2) + eps) times q or k, [K] each."""

    q: Tensor
    k: Tensor
    eps: float


class Inputs(NamedTuple):
    """What an engine gets, in the shapes of `fused_attention`; of one token cu_seqlens, initial_state, before and norm
    are None."""

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


def fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gk: Tensor | None,
    rk: Tensor | None,
    gv: Tensor | None,
    rv: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    before: Tensor | None,
    *,
    scale: float,
    safe_exp: bool,
    decaying: bool = True,
    engine: str,
    norm: QKNorm | None = None,
    qkv: Tensor | None = None,
    gates: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gated linear attention, with the safe exponential and the refined gate inside if asked for.

    Args:
        q: [B, T, HQ, K]; k: [B, T, H, K]; v: [B, T, H, V]. Logits of the features with `safe_exp`.
        gk, gv: [B, T, H, K], [B, T, H, V]: natural log-decays, or gate logits where rk, rv are given; None: none.
        rk, rv: logits of the refining gate, as gk, gv.
        mask: [B, T] bool, only with `safe_exp`; cu_seqlens: [N + 1].
        initial_state, before: [N, H, K, V] float32 and [N, H] float32 (`NO_KEY`: no key yet), with `safe_exp`.
        decaying: the stabiliser falls with the slowest channel (key_max "decay"), or never ("running").
        engine: "triton" or "native".
        norm: of q and k, before anything else, with `safe_exp` and "triton" alone.
        qkv, gates: contiguous tensors [B, T, channels] of which q, k, v and gk, gv, rk, rv (those that there are) are
            the channels, in this order; their gradients then flow to these.

    Returns:
        o [B, T, HQ, V] in the dtype of v; in float32 the final state [N, H, K, V] and m [N, H] (0 without `safe_exp`).
    """
    inputs = Inputs(q, k, v, gk, rk, gv, rv, mask)
    buffers, layout = _in_buffers(inputs, qkv, gates)
    weights = [] if norm is None else [norm.q.contiguous(), norm.k.contiguous()]
    needs = [*buffers, *weights] if initial_state is None else [*buffers, *weights, initial_state]
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in needs)
    o, final, last, *_ = _forward(
        buffers, layout, mask, cu_seqlens, initial_state, before, weights, 0.0 if norm is None else norm.eps,
        scale, safe_exp, decaying, engine, keep,
    )  # fmt: skip
    return o, final, last.detach()


def _in_buffers(inputs: Inputs, qkv: Tensor | None, gates: Tensor | None) -> tuple[list[Tensor], list[int]]:
    """(buffers, layout): HQ, H, K, V, then the buffer and the first channel of each of q .. rv, -1 for none."""
    names = Inputs._fields[:7]
    tensors = {name: x for name in names if (x := getattr(inputs, name)) is not None}
    buffers: list[Tensor] = []
    places: dict[str, tuple[int, int]] = {}
    for buffer, parts in ((qkv, ("q", "k", "v")), (gates, ("gk", "gv", "rk", "rv"))):
        if buffer is None:
            continue
        channels = 0
        for name in parts:
            if name in tensors:
                places[name] = len(buffers), channels
                channels += tensors[name].shape[2] * tensors[name].shape[3]
        buffers.append(buffer)
    for name, x in tensors.items():
        if name not in places:
            places[name] = len(buffers), 0
            buffers.append(rows(x).flatten(2))
    sizes = [inputs.q.shape[2], *inputs.k.shape[2:], inputs.v.shape[3]]
    return buffers, sizes + [number for name in names for number in places.get(name, (-1, 0))]


def _unpack(buffers: Sequence[Tensor], layout: Sequence[int]) -> list[Tensor | None]:
    """q .. rv, views of the buffers."""
    HQ, H, K, V, *places = layout
    heads, sizes = (HQ, H, H, H, H, H, H), (K, K, V, K, K, V, V)
    return [
        None if buffer < 0 else _heads(buffers[buffer], at, h, D)
        for buffer, at, h, D in zip(places[::2], places[1::2], heads, sizes, strict=True)
    ]


def _heads(x: Tensor, at: int, heads: int, D: int) -> Tensor:
    """The `heads` heads of D channels that x [B, T, channels] has from channel `at` on."""
    row, token, channel = x.stride()
    start = x.storage_offset() + at * channel
    return x.as_strided((*x.shape[:2], heads, D), (row, token, D * channel, channel), start)


def _inputs(buffers: Sequence[Tensor], layout: Sequence[int], *others: Any) -> Inputs:
    *tensors, weights, eps = others
    norm = QKNorm(weights[0], weights[1], eps) if weights else None
    return Inputs(*_unpack(buffers, layout), *tensors, norm=norm)  # type: ignore[arg-type,misc]


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
    q, k, v, *_ = _unpack(buffers, layout)
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
    of_inputs, (d_initial, *d_weights) = _unpack(grads, layout), grads[len(buffers) :]
    _engine(engine).backward(
        d_o, d_final, inputs, m, factors, states, scale, safe_exp, decaying, of_inputs, d_initial, *d_weights
    )
    return grads


@_backward.register_fake
def _(d_o, d_final, buffers, layout, mask, cu_seqlens, initial_state, before, weights, *_):  # type: ignore[no-untyped-def]
    return _gradients_like(buffers, layout, cu_seqlens, weights)


def _gradients_like(
    buffers: Sequence[Tensor], layout: Sequence[int], cu_seqlens: Tensor | None, weights: Sequence[Tensor]
) -> list[Tensor]:
    _HQ, H, K, V, *_ = layout
    N = buffers[0].shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    like = [x.new_empty(x.shape) for x in buffers]
    shapes = [(N, H, K, V), (len(weights), K)][: 2 if weights else 1]
    return like + [buffers[0].new_empty(shape, dtype=torch.float32) for shape in shapes]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    buffers, layout, *tensors, weights, eps, scale, safe_exp, decaying, engine, _ = inputs
    ctx.layout, ctx.buffers, ctx.eps, ctx.options = layout, len(buffers), eps, (scale, safe_exp, decaying, engine)
    ctx.save_for_backward(*buffers, *weights, *tensors, *output[3:])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, d_o: Tensor | None, d_final: Tensor | None, *_: Any) -> tuple[Any, ...]:
    *of_lists, mask, cu_seqlens, initial_state, before, m, factors, states = ctx.saved_tensors
    buffers, weights = of_lists[: ctx.buffers], of_lists[ctx.buffers :]
    if d_o is None:
        HQ, _H, _K, V, *_ = ctx.layout
        d_o = buffers[0].new_zeros(*buffers[0].shape[:2], HQ, V)
    inputs = buffers, ctx.layout, mask, cu_seqlens, initial_state, before, weights, ctx.eps
    grads = _backward(d_o, d_final, *inputs, m, factors, states, *ctx.options)
    d_buffers, (d_initial, *of_weights) = grads[: ctx.buffers], grads[ctx.buffers :]
    d_weights = [d.to(x.dtype) for of_both in of_weights for d, x in zip(of_both, weights, strict=True)]
    d_initial = None if initial_state is None else d_initial
    return d_buffers, None, None, None, d_initial, None, d_weights, *(None,) * 6


_forward.register_autograd(_gradients, setup_context=_save)


def fused_step_(
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
    """`safe_exp_attention` of one token, S and m overwritten, and a norm over the output where a weight is given.

    Args:
        q: [N, 1, HQ, K] and k: [N, 1, H, K] logits; v: [N, 1, H, V].
        gk, gv: [N, 1, H, K or 1], [N, 1, H, V or 1]: natural log-decays, or gate logits where rk, rv are given.
        rk, rv: logits of the refining gate, as gk, gv.
        mask: [N, 1] bool; where it is False S and m stay as they are and h is 0.
        S, m: [N, H, K, V] and [N, H], float32, contiguous; S all zeros is an empty state whatever m.
        weight, bias: [HQ, V], of the RMS norm (bias None) or the layer norm of `regla.layers.norms`; None: no norm.
        decaying: the stabiliser falls with the slowest channel (key_max "decay"), or never ("running").
        eps: of the norm.
        engine: "triton" or "native".

    Returns:
        [N, 1, HQ, V] in the dtype of v.
    """
    # A custom operation's own work would take longer than the kernel's.
    step = _step_operation if torch.compiler.is_compiling() else _step
    return step(q, k, v, gk, rk, gv, rv, mask, S, m, weight, bias, scale, decaying, eps, engine)


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
    q, k, v = (_with_dense_channels(x) for x in (q, k, v))
    gk, rk, gv, rv = (
        None if x is None else _with_dense_channels(x.expand(N, 1, H, D))
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


def _with_dense_channels(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
