"""The short causal convolution over each channel, and the activation behind it, in one operation."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, library

from regla.ops.call import owners
from regla.ops.dispatch import short_convolution_kernel_runs
from regla.ops.output_norm import ACTIVATIONS


def short_convolution(
    x: Tensor,
    weight: Tensor,
    *,
    activation: str | None = None,
    state: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    overwrite_state: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """A filter for each channel over the last tokens, around an identity path.

        y_t = activation(x_t + sum_{j < taps} w_j * x_{t-j})

    Padding, wherever it lies, is passed over: x_{t-j} is the j-th last real token before x_t, and the state holds the
    last real tokens. What padding holds has no influence.

    Args:
        x: [B, T, C].
        weight: [taps, C], taps >= 2; row j is for the token j places back.
        activation: None, "silu" or "sigmoid".
        state: [B, taps - 1, C], the last real tokens before x (zeros: there are none), or None.
        mask: [B, T] bool, True for real tokens; not with cu_seqlens.
        cu_seqlens: [N + 1] int, boundaries of packed sequences, each of which starts afresh; not with a state.
        overwrite_state: `state` may be overwritten with the state after x, where that saves a copy.
        backend: of the recurrence that y goes to: with "auto" and "triton" kernels run where they can.

    Returns:
        y [B, T, C] in the dtype of x, and the state after x. In between everything is float32 at least.

    Raises:
        ValueError: an unknown activation, a weight or a state of another shape.

    >>> x, weight = torch.randn(2, 10, 8), torch.randn(4, 8)
    >>> y, state = short_convolution(x, weight, activation="silu")
    >>> y_next, state = short_convolution(torch.randn(2, 1, 8), weight, activation="silu", state=state)
    """
    _check(x, weight, activation, state)
    B, T, C = x.shape
    has_kernel = short_convolution_kernel_runs(backend, x, weight, state)
    given, state = state, None if state is None else state.to(x.dtype)
    if state is not None and T == 1 and cu_seqlens is None and has_kernel and not _needs_gradients(x, weight, state):
        in_place = overwrite_state and state is given and state.is_contiguous()
        return _one_token(x, weight, state.contiguous(), mask, activation, in_place)
    if mask is None:
        return _convolved(x, weight, state, cu_seqlens, activation, has_kernel)
    x = torch.where(mask[..., None], x, 0.0)
    before = x.new_zeros(B, weight.shape[0] - 1, C) if state is None else state
    if T == 1:
        y, after = _convolved(x, weight, before, None, activation, has_kernel)
        return y, torch.where(mask[..., None], after, before)
    # With the real tokens of every row moved together, to its beginning: y there, then back to their places.
    together = _rows_at(x, torch.argsort(~mask, dim=1, stable=True))
    y, _ = _convolved(together, weight, before, None, activation, has_kernel)
    y = torch.where(mask[..., None], _rows_at(y, (mask.cumsum(1) - 1).clamp_min(0)), 0.0)
    taken = before.shape[1]
    last = mask.sum(1, keepdim=True) + torch.arange(taken, device=x.device)  # of the state and behind it the tokens
    of_state = _rows_at(before, last.clamp_max(taken - 1))
    return y, torch.where((last < taken)[..., None], of_state, _rows_at(together, (last - taken).clamp_min(0)))


def _check(x: Tensor, weight: Tensor, activation: str | None, state: Tensor | None) -> None:
    if activation is not None and activation not in ACTIVATIONS:
        names = ", ".join(map(repr, (None, *ACTIVATIONS)))
        raise ValueError(f"activation is {activation!r}; expected one of {names}")
    B, _, C = x.shape
    if weight.ndim != 2 or weight.shape[0] < 2 or weight.shape[1] != C:
        raise ValueError(f"weight has shape {list(weight.shape)}; expected [taps, C] with taps >= 2 and C = {C}")
    if state is not None and list(state.shape) != [B, weight.shape[0] - 1, C]:
        expected = [B, weight.shape[0] - 1, C]
        raise ValueError(f"state has shape {list(state.shape)}; expected [B, taps - 1, C] = {expected}")


def _needs_gradients(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _rows_at(x: Tensor, tokens: Tensor) -> Tensor:
    """x [B, T, C] at the indices `tokens` [B, n]: [B, n, C]."""
    return x.gather(1, tokens[..., None].expand(-1, -1, x.shape[-1]))


def _convolved(
    x: Tensor, weight: Tensor, state: Tensor | None, cu_seqlens: Tensor | None, activation: str | None, has_kernel: bool
) -> tuple[Tensor, Tensor]:
    """Without padding: y and the state after x."""
    if not has_kernel:
        return _definition(x, weight, state, cu_seqlens, activation)
    x = x if x.stride(2) == 1 else x.contiguous()
    y, after = _forward(x, weight, state, cu_seqlens, activation or "none")
    return y, after


def _definition(
    x: Tensor, weight: Tensor, state: Tensor | None, cu_seqlens: Tensor | None, activation: str | None
) -> tuple[Tensor, Tensor]:
    (B, T, C), before, place = x.shape, weight.shape[0] - 1, None
    state = x.new_zeros(B, before, C) if state is None else state
    history = torch.cat([state, x], 1)
    wide = history.to(torch.promote_types(x.dtype, torch.float32))
    if cu_seqlens is not None:
        place = torch.arange(T, device=x.device) - cu_seqlens[owners(cu_seqlens, T)]
    y = wide[:, before:]
    for j, tap in enumerate(weight.to(wide.dtype)):
        lagged = wide[:, before - j : before - j + T]
        if place is not None:
            lagged = torch.where((place >= j)[:, None], lagged, 0.0)
        y = torch.addcmul(y, lagged, tap)
    y = y if activation is None else ACTIVATIONS[activation](y)
    return y.to(x.dtype), history[:, T:]


@library.custom_op("regla::short_convolution", mutates_args=())
def _forward(
    x: Tensor, weight: Tensor, state: Tensor | None, cu_seqlens: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    y, after = _outputs(x, weight)
    _kernels().forward(x, weight, state, cu_seqlens, activation, y, after)
    return y, after


@_forward.register_fake
def _(x, weight, state, cu_seqlens, activation):  # type: ignore[no-untyped-def]
    return _outputs(x, weight)


def _outputs(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    B, _, C = x.shape
    return x.new_empty(x.shape), x.new_empty(B, weight.shape[0] - 1, C)


@library.custom_op("regla::short_convolution_backward", mutates_args=())
def _backward(
    d_y: Tensor,
    d_after: Tensor | None,
    x: Tensor,
    weight: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str,
) -> list[Tensor]:
    """Gradients of x, in float32 of the weight, and of the state; without numbers if there is none."""
    grads = _gradients_like(x, weight, state)
    d_after = None if d_after is None else d_after.contiguous()
    _kernels().backward(d_y.contiguous(), d_after, x, weight, state, cu_seqlens, activation, *grads)
    return grads


@_backward.register_fake
def _(d_y, d_after, x, weight, state, cu_seqlens, activation):  # type: ignore[no-untyped-def]
    return _gradients_like(x, weight, state)


def _gradients_like(x: Tensor, weight: Tensor, state: Tensor | None) -> list[Tensor]:
    return [
        x.new_empty(x.shape),
        weight.new_empty(weight.shape, dtype=torch.float32),
        x.new_empty(0) if state is None else state.new_empty(state.shape),
    ]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, d_y: Tensor | None, d_after: Tensor | None) -> tuple[Any, ...]:
    x, weight, state, cu_seqlens = ctx.saved_tensors
    d_y = x.new_zeros(x.shape) if d_y is None else d_y
    if torch.is_grad_enabled():  # the gradient is to be differentiated, too
        return *_differentiable_gradients(ctx, d_y, d_after), None, None
    d_x, d_weight, d_state = _backward(d_y, d_after, x, weight, state, cu_seqlens, ctx.activation)
    return d_x, d_weight.to(weight.dtype), None if state is None else d_state, None, None


def _differentiable_gradients(ctx: Any, d_y: Tensor, d_after: Tensor | None) -> list[Tensor | None]:
    """Of x, weight and state, by operations that PyTorch differentiates."""
    x, weight, state, cu_seqlens = ctx.saved_tensors
    activation = None if ctx.activation == "none" else ctx.activation
    y, after = _definition(x, weight, state, cu_seqlens, activation)
    outputs, d_outputs = ([y], [d_y]) if d_after is None else ([y, after], [d_y, d_after])
    wanted = [t if t is not None and t.requires_grad else None for t in (x, weight, state)]
    inputs = [t for t in wanted if t is not None]
    found = iter(torch.autograd.grad(outputs, inputs, d_outputs, create_graph=True, allow_unused=True))
    return [None if t is None else next(found) for t in wanted]


_forward.register_autograd(_gradients, setup_context=_save)


def _one_token(
    x: Tensor, weight: Tensor, state: Tensor, mask: Tensor | None, activation: str | None, in_place: bool
) -> tuple[Tensor, Tensor]:
    """y and the state after x, one token that needs no gradient; `state` itself, overwritten, if `in_place`."""
    after = state if in_place else torch.empty_like(state)
    # A custom operation's own work would take longer than the kernel's.
    step = _step_operation if torch.compiler.is_compiling() else _step
    return step(x, weight, None if in_place else state, after, mask, activation or "none"), after


def _step(
    x: Tensor, weight: Tensor, state: Tensor | None, after: Tensor, mask: Tensor | None, activation: str
) -> Tensor:
    """y; `after` is filled from `state`, None: from what it holds."""
    y = x.new_empty(x.shape)
    x = x if x.stride(2) == 1 else x.contiguous()
    _kernels().step(x, weight, after if state is None else state, after, mask, activation, y)
    return y


_step_operation = library.custom_op("regla::short_convolution_step", _step, mutates_args=("after",))


@_step_operation.register_fake
def _(x, weight, state, after, mask, activation):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


def _kernels() -> Any:
    return importlib.import_module("regla.ops.triton.short_convolution")
