"""Rotary position embedding whose frequencies stay float32, whatever dtype the model moves to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding


@contextmanager
def frequencies_kept(model: nn.Module) -> Iterator[None]:
    """Within the context the frequencies of RoPE in `model` follow a move of devices, but no change of dtype.

    In bfloat16 the angle of position 8,000 would be off by up to 16 radians.
    """
    before = [
        (module, name, buffer)
        for module in model.modules()
        if "RotaryEmbedding" in type(module).__name__
        for name, buffer in module.named_buffers(recurse=False)
    ]
    yield
    for module, name, buffer in before:
        after = getattr(module, name)
        if after.dtype != buffer.dtype:
            setattr(module, name, buffer.to(after.device))


class RotaryEmbedding(LlamaRotaryEmbedding):
    """Llama's, with `frequencies_kept`."""

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> RotaryEmbedding:
        with frequencies_kept(self):
            super()._apply(fn, *args, **kwargs)
        return self
