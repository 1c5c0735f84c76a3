"""Pretrained models and their tokenizers, from the hub, a folder or a GGUF file."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

import regla.data.tokenizer
from regla.data.pretrained import load_pretrained
from regla.data.tokenizer import vocabulary_size
from regla.linearize.convert import check_family
from regla.models.folders import load_model
from regla.models.student_configuration import StudentConfig
from regla.runtime.errors import OptionError
from regla.runtime.files import brief


def load_config(model: str) -> PreTrainedConfig:
    """The configuration of a model that can be converted, without its weights.

    Args:
        model: a name on the Hugging Face hub, a folder, or a .gguf file.

    Raises:
        ValueError: it cannot be loaded, or no supported family describes it.
    """
    config = load_pretrained(AutoConfig, model, "model")
    check_family(config)
    return config


def check_original(model: str, config: PreTrainedConfig) -> None:
    """Raise ValueError where `load_original` would fail for want of weights or for a configuration that makes no model.

    It reads no weights and does not look for those of a name on the hub.
    """
    folder = Path(model)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{model} cannot be loaded (it has no .safetensors file, and pickled weights are not read); save the model "
            "with save_pretrained first."
        )
    try:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(config)
    except Exception as error:  # whatever the parts of a model raise for a value that they do not know
        raise ValueError(
            f"The configuration of {model} makes no model ({brief(error)}); correct its config.json."
        ) from error


def load_original(model: str) -> tuple[PreTrainedModel, Tokenizer]:
    """Model (float32; quantised GGUF weights become plain numbers) and tokenizer; see `load_config`.

    Weights are read from safetensors or GGUF: files of pickles, which can run code, are refused.

    Raises:
        ValueError: it cannot be loaded, or the tokenizer has more tokens than the model.
    """
    tokenizer = load_tokenizer(model, load_config(model))  # first, since it is soon known not to fit
    options = {} if Path(model).suffix.lower() == ".gguf" else {"use_safetensors": True}
    loaded = load_pretrained(AutoModelForCausalLM, model, "model", dtype=torch.float32, **options).eval()
    loaded.config.quantization_config = None
    return loaded, tokenizer


def load_tokenizer(model: str, config: PreTrainedConfig) -> Tokenizer:
    """The tokenizer of a model with this configuration.

    Raises:
        ValueError: it cannot be loaded, or has more tokens than the model.
    """
    tokenizer = regla.data.tokenizer.load_tokenizer(model)
    if (size := vocabulary_size(tokenizer)) > config.vocab_size:
        raise ValueError(
            f"The tokenizer of {model} has ids up to {size - 1}, but the model's vocab_size is {config.vocab_size}; "
            "give the model with its own tokenizer."
        )
    return tokenizer


def load_student(folder: str) -> PreTrainedModel:
    """The converted model in a folder, float32, to go on from.

    Raises:
        ValueError: the folder holds none.
    """
    load_student_config(folder)
    return load_model(folder, torch.device("cpu"))


def load_student_config(folder: str) -> PreTrainedConfig:
    """Its configuration alone; raises as `load_student` does."""
    if not (Path(folder) / "config.json").is_file():
        raise OptionError(
            "{folder} holds no model to go on from; give {init} a folder that `regla linearize` wrote.", folder=folder
        )
    config = load_pretrained(AutoConfig, folder, "model")
    if config.model_type == "regla":
        raise OptionError(
            "{folder} holds a model of type 'regla', as `regla train` and earlier versions of this command write them; "
            "give {init} a folder that this version wrote, or convert the original again.",
            folder=folder,
        )
    if not isinstance(config, StudentConfig):
        raise OptionError(
            "{folder} holds a model of type {kind!r}; give {init} a folder that `regla linearize` wrote.",
            folder=folder,
            kind=config.model_type,
        )
    return config
