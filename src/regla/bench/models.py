"""The models that `regla bench decode` and `regla bench train` compare: 162M parameters, or tiny ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from regla.train.model import layer_types, match_softmax

if TYPE_CHECKING:
    from regla.models import ReGLAConfig, ReGLAForCausalLM


def configs(*, max_length: int, quick: bool = False) -> dict[str, ReGLAConfig]:
    """By name: a softmax model, and ReGLA with its default mixer at equal parameters (its MLP is narrower)."""
    from regla.models import ReGLAConfig

    width, layers, heads, mlp, vocabulary = (32, 2, 2, 96, 128) if quick else (768, 12, 12, 2048, 50304)

    def config(mixer: str) -> ReGLAConfig:
        return ReGLAConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=mlp,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=max_length,
            tie_word_embeddings=False,
            layer_types=layer_types(mixer, layers),
        )

    return {"softmax": config("softmax"), "regla": match_softmax(config("regla"))[0]}


def build(config: ReGLAConfig, device: torch.device, dtype: torch.dtype) -> ReGLAForCausalLM:
    """A model with random weights, the same every time."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype)
