"""Rotary position embedding whose frequencies stay float32, whatever dtype the model moves to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding


class RotaryEmbedding(LlamaRotaryEmbedding):
    """Llama's. In bfloat16 the angle of position 8,000 would be off by up to 16 radians."""

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> RotaryEmbedding:
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, *args, **kwargs)
        for name, buffer in self.named_buffers(recurse=False):
            if buffer.dtype != torch.float32:  # a move of devices is followed, a change of dtype is not
                setattr(self, name, before[name].to(buffer.device))
        return self
