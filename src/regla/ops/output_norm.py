"""The norm over each head's output, and the gate on what it gives, in one operation."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, library

from regla.ops.dispatch import output_norm_kernel_runs

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": torch.nn.functional.silu, "sigmoid": torch.sigmoid}


def prescale(h: Tensor) -> Tensor:
    """h [..., V] -> h / max_i |h_i| in float32 at least; zeros stay zeros. The maximum takes no gradient."""
    h = h.to(torch.promote_types(h.dtype, torch.float32))
    largest = h.detach().abs().amax(-1, keepdim=True)
    return h / torch.where(largest < torch.finfo(h.dtype).tiny, 1.0, largest)


def output_norm(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    activation: str | None = None,
    eps: float,
    backend: str = "auto",
) -> Tensor:
    """RMS norm over each head's channels, with a bias layer norm, and a gate on the result.

        x = h / max_i |h_i|                                                             no gradient through the maximum
        o = w x / sqrt(mean(x^2) + eps)              with a bias  w (x - mean x) / sqrt(var x + eps) + b
        o = o * activation(gate)                                                                      where there is one

    Args:
        h: [B, T, H, V].
        weight, bias: [H, V].
        gate: logits [B, T, H V], the channels of each head side by side.
        activation: of the gate, "silu" or "sigmoid".
        eps: beside the mean of squares of numbers of at most 1.
        backend: of the recurrence that h comes from: with "auto" and "triton" a kernel runs where it can.

    Returns:
        [B, T, H, V] in the dtype of h, with a gate in the wider of the two. In between everything is float32 at least.

    Raises:
        ValueError: a gate with another activation.

    Source: paper section 3.2; the gate is that of Sun et al. 2023 (arXiv 2307.08621).
    """
    if gate is not None and activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; expected one of {', '.join(map(repr, ACTIVATIONS))}")
    if output_norm_kernel_runs(backend, h, weight, bias, gate):
        o: Tensor = _forward(h.contiguous(), weight, bias, None if gate is None else _rows(gate), activation or "", eps)
        return o
    x = prescale(h)
    x = x if bias is None else x - x.mean(-1, keepdim=True)
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
    x = x if bias is None else x + bias
    if gate is not None:
        x = x * ACTIVATIONS[str(activation)](gate.to(x.dtype)).unflatten(-1, h.shape[-2:])
    return x.to(_dtype(h, gate))


def _rows(gate: Tensor) -> Tensor:
    """Such that a token's channels lie side by side, at one distance from token to token."""
    aligned = gate.stride(2) == 1 and gate.stride(0) == gate.shape[1] * gate.stride(1)
    return gate if aligned else gate.contiguous()


@library.custom_op("regla::output_norm", mutates_args=())
def _forward(
    h: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None, activation: str, eps: float
) -> Tensor:
    o = _output(h, gate)
    _kernels().forward(h, weight, bias, gate, activation, eps, o)
    return o


@_forward.register_fake
def _(h, weight, bias, gate, activation, eps):  # type: ignore[no-untyped-def]
    return _output(h, gate)


@library.custom_op("regla::output_norm_backward", mutates_args=())
def _backward(
    d_o: Tensor, h: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None, activation: str, eps: float
) -> list[Tensor]:
    """Gradients of h, of the gate, and in float32 of weight and bias."""
    grads = _gradients_like(h, weight, bias, gate)
    _kernels().backward(d_o.contiguous(), h, weight, bias, gate, activation, eps, *grads)
    return grads


@_backward.register_fake
def _(d_o, h, weight, bias, gate, activation, eps):  # type: ignore[no-untyped-def]
    return _gradients_like(h, weight, bias, gate)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.activation, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, d_o: Tensor) -> tuple[Any, ...]:
    h, weight, bias, gate = ctx.saved_tensors
    d_h, d_gate, d_weight, d_bias = _backward(d_o, h, weight, bias, gate, ctx.activation, ctx.eps)
    return (
        d_h,
        d_weight.to(weight.dtype),
        None if bias is None else d_bias.to(bias.dtype),
        None if gate is None else d_gate,
        None,
        None,
    )


_forward.register_autograd(_gradients, setup_context=_save)


def _output(h: Tensor, gate: Tensor | None) -> Tensor:
    return h.new_empty(h.shape, dtype=_dtype(h, gate))


def _dtype(h: Tensor, gate: Tensor | None) -> torch.dtype:
    return h.dtype if gate is None else torch.promote_types(h.dtype, gate.dtype)


def _gradients_like(h: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None) -> list[Tensor]:
    """Of what there is not, tensors without numbers."""
    return [
        h.new_empty(h.shape),
        h.new_empty(0) if gate is None else gate.new_empty(gate.shape),
        weight.new_empty(weight.shape, dtype=torch.float32),
        weight.new_empty(0) if bias is None else bias.new_empty(bias.shape, dtype=torch.float32),
    ]


def _kernels() -> Any:
    return importlib.import_module("regla.ops.triton.output_norm")
