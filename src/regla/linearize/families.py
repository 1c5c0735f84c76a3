"""The model families that can be converted: one function each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedConfig

from regla.runtime.errors import OptionError

#: Arguments that ReGLAConfig shares with the configs of all families, by name and meaning.
SHARED_ARGUMENTS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "rope_parameters",
    "attention_dropout",
)


def _shared(config: PreTrainedConfig) -> dict[str, Any]:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shared = {name: getattr(config, name) for name in SHARED_ARGUMENTS} | {"head_dim": head_dim}
    if shared["pad_token_id"] is not None and shared["pad_token_id"] < 0:
        shared["pad_token_id"] = None  # how some checkpoints say that there is none
    return shared


def _llama(config: PreTrainedConfig) -> dict[str, Any]:
    return _shared(config) | {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}


def _mistral(config: PreTrainedConfig) -> dict[str, Any]:
    _no_window(config, config.sliding_window)
    return _shared(config)


def _qwen2(config: PreTrainedConfig) -> dict[str, Any]:
    _no_window(config, config.sliding_window if "sliding_attention" in config.layer_types else None)
    return _shared(config) | {"attention_bias": True, "attention_out_bias": False}


def _no_window(config: PreTrainedConfig, window: int | None) -> None:
    """Softmax over a sliding window is another function as soon as a text is longer than the window."""
    if window is not None and window < config.max_position_embeddings:
        raise ValueError(
            f"sliding_window is {window}, shorter than max_position_embeddings = {config.max_position_embeddings}; "
            "conversion supports full attention only: choose a model without a window"
        )


#: By model_type: ReGLAConfig's arguments, from the original's config. The modules of all are named as Llama's.
FAMILIES: dict[str, Callable[[PreTrainedConfig], dict[str, Any]]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
}


def config_arguments(original: PreTrainedConfig) -> dict[str, Any]:
    """ReGLAConfig's arguments for a model with the shape of the original.

    Raises:
        ValueError: the architecture, or something about it, is not supported.
    """
    if original.model_type == "regla":
        raise OptionError(
            "the model is of type 'regla' already; give its original, and this folder with {init}, to go on from there"
        )
    if original.model_type not in FAMILIES:
        raise ValueError(
            f"the model is of type {original.model_type!r}; conversion supports {', '.join(map(repr, FAMILIES))}"
        )
    return FAMILIES[original.model_type](original)
