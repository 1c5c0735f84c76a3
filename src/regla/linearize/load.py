"""Pretrained models and their tokenizers, from the hub, a folder or a GGUF file."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from regla.linearize.families import config_arguments
from regla.models import ReGLAConfig, ReGLAForCausalLM
from regla.models.folders import load_model
from regla.runtime.errors import OptionError


def load_config(model: str) -> PreTrainedConfig:
    """The configuration of a model that can be converted, without its weights.

    Args:
        model: a name on the Hugging Face hub, a folder, or a .gguf file.

    Raises:
        ValueError: it cannot be loaded, or no supported family describes it.
    """
    where, options = _place(model)
    config = _load(model, AutoConfig, where, **options)
    config_arguments(config)
    return config


def check_weights(model: str) -> None:
    """Raise ValueError where a folder has no weights that `load_original` takes; a name on the hub is not looked up."""
    folder = Path(model)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{model} cannot be loaded (it has no .safetensors file, and pickled weights are not read); save the model "
            "with save_pretrained first."
        )


def load_original(model: str) -> tuple[PreTrainedModel, Tokenizer]:
    """Model (float32; quantised GGUF weights become plain numbers) and tokenizer; see `load_config`.

    Weights are read from safetensors or GGUF: files of pickles, which can run code, are refused.

    Raises:
        ValueError: it cannot be loaded, or the tokenizer has more tokens than the model.
    """
    where, options = _place(model)
    tokenizer = load_tokenizer(model, load_config(model))  # first, since it is soon known not to fit
    loaded = _load(
        model, AutoModelForCausalLM, where, dtype=torch.float32, **(options or {"use_safetensors": True})
    ).eval()
    loaded.config.quantization_config = None
    return loaded, tokenizer


def load_tokenizer(model: str, config: PreTrainedConfig) -> Tokenizer:
    """The tokenizer of a model with this configuration.

    Raises:
        ValueError: it cannot be loaded, or has more tokens than the model.
    """
    where, options = _place(model)
    tokenizer = _load(model, AutoTokenizer, where, **options)
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"The tokenizer of {model} has {len(tokenizer)} tokens, the model only {config.vocab_size}; "
            "give the model with its own tokenizer."
        )
    return tokenizer


def load_student(folder: str) -> ReGLAForCausalLM:
    """The converted model in a folder, float32, to go on from.

    Raises:
        ValueError: the folder holds none.
    """
    load_student_config(folder)
    return cast(ReGLAForCausalLM, load_model(folder, torch.device("cpu")))


def load_student_config(folder: str) -> ReGLAConfig:
    """Its configuration alone; raises as `load_student` does."""
    if not (Path(folder) / "config.json").is_file():
        raise OptionError(
            "{folder} holds no model to go on from; give {init} a folder that `regla linearize` wrote.", folder=folder
        )
    config = _load(folder, AutoConfig, folder, local_files_only=True)
    if not isinstance(config, ReGLAConfig):
        raise OptionError(
            "{folder} holds a model of type {kind!r}; give {init} a folder that `regla linearize` wrote.",
            folder=folder,
            kind=config.model_type,
        )
    return config


def _place(model: str) -> tuple[str, dict[str, Any]]:
    """What transformers wants to know: a name or folder, and the GGUF file in it."""
    path = Path(model)
    if path.suffix != ".gguf":
        return model, {}
    if not path.is_file():
        raise ValueError(f"There is no file {model}; give a .gguf file, a model folder or a name on the hub.")
    for package in ("gguf", "accelerate"):
        if find_spec(package) is None:
            raise ValueError(
                f"{model} needs the package {package}, which is not installed; run `pip install {package}`."
            )
    return str(path.parent), {"gguf_file": path.name}


def _load(model: str, kind: Any, where: str, **options: Any) -> Any:
    try:
        return kind.from_pretrained(where, **options)
    except Exception as error:  # transformers lets through whatever its parsers and its downloads raise
        first = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(". ")
        raise ValueError(
            f"{model} cannot be loaded ({first}); give a model folder, a .gguf file or a hub name."
        ) from error
