"""Sequence parallelism of linear layers: a process has some tokens of a sequence, and what a layer remembers of them
goes to the process that has the next ones.

    (S, m, conv)_p = layer(tokens of process p, (S, m, conv)_{p-1})

which is the recurrence itself, so that the parts together are exactly the whole, for every update rule. Processes work
like a pipeline: while process p is in a layer, p - 1 is in the one behind it. The backward pass sends the gradients of
S and conv the other way; m, the unit of S, has none.

A message has B (H K V + H) 4-byte numbers of a layer's state and B (size - 1) channels of its convolution's input, and
on its way back the same without m: it does not depend on the length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from regla.layers.attention import ReGLAAttention, ReGLAState
from regla.runtime.errors import OptionError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def check_model(config: PreTrainedConfig) -> None:
    """Raise ValueError unless every layer of the model, of our own class or a student, is linear, and causal."""
    config = getattr(config, "linear_config", config)
    for number, kind in enumerate(config.layer_types or ()):
        if kind != "linear_attention":
            raise OptionError(
                "{parallel} sequence passes the states of linear layers between processes, but layer {number} of the "
                "model is {kind}; use {parallel} ddp or fsdp, or {mixer} regla.",
                number=number,
                kind=kind,
            )
    if config.window_branch:
        raise OptionError(
            "{parallel} sequence passes the states of recurrences between processes, not the keys and values of a "
            "window_branch, which is {window} in the model; use {parallel} ddp or fsdp, or a model without it.",
            window=config.window_branch,
        )
    if config.key_max == "sequence":
        raise OptionError(
            "{parallel} sequence cannot know the largest key of a whole sequence, which key_max 'sequence' of the "
            "model needs; use {parallel} ddp or fsdp, or another key_max."
        )


class Exchange:
    """Lets the linear layers of `model` begin with the state of the process before this one, and send theirs to the one
    behind it, wherever they run while it is open. before, behind: their numbers; None: there is none.

    `start` is the position of this process's first token in the sequence; `sent` counts the bytes sent.
    """

    def __init__(self, model: PreTrainedModel, *, before: int | None, behind: int | None) -> None:
        self.before, self.behind = before, behind
        self.start = 0
        self.sent = 0
        self._is_open = False
        self._empty: dict[Any, ReGLAState] = {}
        for mixer in [module for module in model.modules() if isinstance(module, ReGLAAttention)]:
            mixer.register_forward_pre_hook(self._receive, with_kwargs=True)
            mixer.register_forward_hook(self._send, with_kwargs=True)
        model.base_model.register_forward_pre_hook(self._place, with_kwargs=True)

    @contextmanager
    def open(self) -> Iterator[None]:
        """Around forward and backward of one batch."""
        self._received: dict[ReGLAAttention, ReGLAState] = {}
        self._done: set[ReGLAAttention] = set()
        self._on_the_way: list[tuple[dist.Work, Tensor]] = []
        self._is_open = True
        try:
            yield
            for work, _ in self._on_the_way:
                work.wait()
        finally:
            self._is_open = False
            self._received, self._on_the_way = {}, []

    def send(self, tensors: Sequence[Tensor], to: int | None) -> None:
        """Start to send tensors as one message."""
        assert to is not None
        message = torch.cat([tensor.contiguous().view(torch.uint8).flatten() for tensor in tensors])
        work = dist.isend(message, to)
        assert work is not None
        self._on_the_way.append((work, message))
        self.sent += len(message)

    def receive(self, like: Sequence[Tensor], sender: int | None) -> list[Tensor]:
        """A message as tensors of the shapes and dtypes of `like`."""
        assert sender is not None
        sizes = [tensor.numel() * tensor.element_size() for tensor in like]
        message = torch.empty(sum(sizes), dtype=torch.uint8, device=like[0].device)
        dist.recv(message, sender)
        parts = message.split(sizes)
        # Copies: a part may begin where its dtype may not.
        return [part.clone().view(x.dtype).view(x.shape) for part, x in zip(parts, like, strict=True)]

    @torch.compiler.disable
    def _receive(
        self, mixer: ReGLAAttention, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self._is_open:
            return None
        kwargs = kwargs | {"return_state": True}
        if self.before is not None:
            if mixer not in self._received:  # else activations are computed again, and the state is here
                like = self._empty_state(mixer, args[0])
                found = self.receive([x for x in like if x is not None], self.before)
                self._received[mixer] = ReGLAState(*found)
            anchor = torch.zeros((), device=args[0].device, requires_grad=True)
            tensors = (tensor for tensor in self._received[mixer] if tensor is not None)
            kwargs["state"] = ReGLAState(*_Received.apply(anchor, self, *tensors))
        return args, kwargs

    @torch.compiler.disable
    def _send(
        self, mixer: ReGLAAttention, args: tuple[Any, ...], kwargs: dict[str, Any], output: tuple[Tensor, ReGLAState]
    ) -> tuple[Tensor, ReGLAState | None] | None:
        if not self._is_open:
            return None
        y, (S, m, conv, *_window) = output
        if self.behind is None:
            return y, None
        again = mixer in self._done
        self._done.add(mixer)
        return _Sent.apply(y, self, again, S, m, conv), None

    def _place(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Positions, for RoPE in linear layers or from a table."""
        if not self._is_open:
            return None
        ids_BT = args[0] if args else kwargs["input_ids"]
        place = torch.arange(self.start, self.start + ids_BT.shape[1], device=ids_BT.device)
        return args, kwargs | {"position_ids": place[None]}

    def _empty_state(self, mixer: ReGLAAttention, x: Tensor) -> ReGLAState:
        """A state of the shapes and dtypes that `mixer` returns for inputs like x [B, T, D]."""
        kind = x.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        key = (x.shape[0], x.dtype, autocast)
        if key not in self._empty:
            self._empty[key] = state_like(mixer, x)
        return self._empty[key]


@torch.no_grad()
def state_like(mixer: ReGLAAttention, x: Tensor) -> ReGLAState:
    """Some state of the shapes and dtypes that `mixer` returns for inputs like x [B, T, D]."""
    _, state = mixer.forward(x[:, :1], return_state=True)
    assert state is not None
    return state


class _Received(torch.autograd.Function):
    """The state of the process before this one; its gradient goes there."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, exchange: Exchange, *state: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange = exchange
        S, m, *conv = (tensor.view_as(tensor) for tensor in state)
        ctx.mark_non_differentiable(m)
        return S, m, *conv

    @staticmethod
    def backward(ctx: Any, d_S: Tensor, d_m: Tensor, *d_conv: Tensor) -> tuple[None, ...]:  # type: ignore[override]
        ctx.exchange.send([d_S, *d_conv], ctx.exchange.before)
        return None, None, *([None] * (2 + len(d_conv)))


class _Sent(torch.autograd.Function):
    """y, whose state goes to the process behind this one; the gradient of the state comes from there."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, exchange: Exchange, again: bool, S: Tensor, m: Tensor, conv: Tensor | None
    ) -> Tensor:
        ctx.exchange = exchange
        ctx.like = [(x.shape, x.dtype, x.device) for x in (S, conv) if x is not None]
        if not again:
            exchange.send([x for x in (S, m, conv) if x is not None], exchange.behind)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        like = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like]
        d_S, *d_conv = ctx.exchange.receive(like, ctx.exchange.behind)
        return d_y, None, None, d_S, None, d_conv[0] if d_conv else None
