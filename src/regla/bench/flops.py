"""Floating point operations of a model, counted from its shapes, and the rate at which a device multiplies matrices."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention

from regla.bench.measure import normal, time_call
from regla.layers.attention import ReGLAAttention
from regla.layers.recurrence import UPDATE_RULES

if TYPE_CHECKING:
    from regla.models import ReGLAForCausalLM

_BACKWARD = 2  # products of the backward pass for each of the forward pass


def training_flops(model: ReGLAForCausalLM, length: int) -> float:
    """Floating point operations of forward and backward for one token of sequences of `length` tokens (Chowdhery et al.
    2022, appendix B, arXiv 2204.02311), a multiplication and an addition being two:

        3 (2 weights of linear maps + sum over layers)

    with, of a layer, 2 length HQ V for causal softmax attention (half of the scores, and of their products with the
    values), and 2 H K V + 2 HQ K V for a recurrence by its definition: the update of the states and what queries read;
    the delta rule reads with each key, too: 2 H K V more, and a window branch 2 HQ (K + V) for each token that it sees.
    What chunks compute in addition, and what activation checkpointing computes twice, is not counted. What stands in
    the place of an update rule counts as nothing.
    """
    config = model.config
    assert config.head_dim is not None
    forward = 2.0 * sum(part.weight.numel() for part in model.modules() if isinstance(part, nn.Linear))
    for layer in model.model.layers:
        mixer = layer.self_attn
        if isinstance(mixer, ReGLAAttention) and isinstance(mixer.rule, tuple(UPDATE_RULES.values())):
            accesses = mixer.num_heads + mixer.num_kv_heads * (2 if config.update_rule == "delta" else 1)
            forward += 2 * accesses * mixer.head_dim * mixer.value_head_dim
            if mixer.window is not None:
                near = mixer.window.size + mixer.window.sinks
                forward += 2 * near * mixer.num_heads * (mixer.head_dim + mixer.value_head_dim)
        elif isinstance(mixer, LlamaAttention):
            forward += 2 * length * config.num_attention_heads * config.head_dim
    return forward * (1 + _BACKWARD)


def matrix_rate(device: torch.device, dtype: torch.dtype, *, quick: bool = False) -> float:
    """Floating point operations per second of a product of two square matrices of 8,192 rows (`quick`: 64): what models
    can have at most."""
    n = 64 if quick else 8192
    a, b = (normal(n, n, seed=seed, device=device, dtype=dtype) for seed in (0, 1))
    out = torch.empty_like(a)

    def call() -> list[torch.Tensor]:
        return [torch.mm(a, b, out=out)]

    call()
    return 2 * n**3 / time_call(call, device, seconds=0.02 if quick else 0.5).p50_us * 1e6
