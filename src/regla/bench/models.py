"""The models that `regla bench decode` and `regla bench train` compare: 162M parameters, or tiny ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from regla.train.model import check_overrides, checked_config, layer_types, match_softmax

if TYPE_CHECKING:
    from regla.models import ReGLAConfig, ReGLAForCausalLM


def configs(
    *, max_length: int, quick: bool = False, overrides: Mapping[str, Any] | None = None
) -> dict[str, ReGLAConfig]:
    """By name: a softmax model, and ReGLA at equal parameters (its MLP is narrower), by default with its default mixer.

    overrides: arguments of ReGLAConfig for the latter.

    Raises ValueError for one that there is not, or that does not fit.
    """
    check_overrides(overrides or {})

    width, layers, heads, mlp, vocabulary = (32, 2, 2, 96, 128) if quick else (768, 12, 12, 2048, 50304)

    def config(mixer: str, **own: Any) -> ReGLAConfig:
        arguments = {
            "vocab_size": vocabulary,
            "hidden_size": width,
            "intermediate_size": mlp,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "max_position_embeddings": max_length,
            "tie_word_embeddings": False,
            "layer_types": layer_types(mixer, layers),
        }
        return checked_config(**arguments | own)

    return {"softmax": config("softmax"), "regla": match_softmax(config("regla", **overrides or {}))[0]}


def build(config: ReGLAConfig, device: torch.device, dtype: torch.dtype) -> ReGLAForCausalLM:
    """A model with random weights, the same every time."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype)
