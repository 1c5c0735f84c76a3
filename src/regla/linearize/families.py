"""The model families that can be converted: one row each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

#: Arguments that ReGLAConfig shares with LlamaConfig, by name and meaning.
LLAMA_ARGUMENTS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
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
    "attention_bias",
    "attention_dropout",
    "mlp_bias",
)


@dataclass(frozen=True, kw_only=True)
class Family:
    """What a conversion has to know of an architecture whose modules are named as Llama's."""

    #: ReGLAConfig's arguments, from the original's config.
    arguments: Callable[[PreTrainedConfig], dict[str, Any]]


def _llama(config: PreTrainedConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in LLAMA_ARGUMENTS}


FAMILIES: dict[str, Family] = {"llama": Family(arguments=_llama)}


def family_of(config: PreTrainedConfig) -> Family:
    """The row of a config's model_type.

    Raises:
        ValueError: the architecture is not supported; lists those that are.
    """
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"the model is of type {config.model_type!r}; conversion supports {', '.join(map(repr, FAMILIES))}"
        )
    return FAMILIES[config.model_type]
