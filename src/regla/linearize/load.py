"""Pretrained models and their tokenizers, from the hub, a folder or a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from regla.linearize.families import family_of


def load_config(model: str) -> PreTrainedConfig:
    """The configuration of a model that can be converted, without its weights.

    Args:
        model: a name on the Hugging Face hub, a folder, or a .gguf file.

    Raises:
        ValueError: it cannot be loaded, or no supported family describes it.
    """
    where, options = _place(model)
    config = _load(model, AutoConfig, where, **options)
    family_of(config).arguments(config)
    return config


def load_original(model: str) -> tuple[PreTrainedModel, Tokenizer]:
    """Model (float32; quantised GGUF weights become plain numbers) and tokenizer; see `load_config`.

    Weights are read from safetensors or GGUF: files of pickles, which can run code, are refused.

    Raises:
        ValueError: it cannot be loaded, or the tokenizer has more tokens than the model.
    """
    where, options = _place(model)
    tokenizer = _load(model, AutoTokenizer, where, **options)
    loaded = _load(
        model, AutoModelForCausalLM, where, dtype=torch.float32, **(options or {"use_safetensors": True})
    ).eval()
    if len(tokenizer) > loaded.config.vocab_size:
        raise ValueError(
            f"The tokenizer of {model} has {len(tokenizer)} tokens, the model only {loaded.config.vocab_size}; "
            "give the model with its own tokenizer."
        )
    loaded.config.quantization_config = None
    return loaded, tokenizer


def _place(model: str) -> tuple[str, dict[str, Any]]:
    """What transformers wants to know: a name or folder, and the GGUF file in it."""
    path = Path(model)
    if path.suffix != ".gguf":
        return model, {}
    if not path.is_file():
        raise ValueError(f"There is no file {model}; give a .gguf file, a model folder or a name on the hub.")
    return str(path.parent), {"gguf_file": path.name}


def _load(model: str, kind: Any, where: str, **options: Any) -> Any:
    try:
        return kind.from_pretrained(where, **options)
    except Exception as error:  # transformers lets through whatever its parsers and its downloads raise
        first = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(". ")
        raise ValueError(
            f"{model} cannot be loaded ({first}); give a model folder, a .gguf file or a hub name."
        ) from error
