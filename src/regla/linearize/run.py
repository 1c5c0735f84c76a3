"""From a checkpoint to a folder with a linear model, for the command line."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from regla.linearize.convert import convert
from regla.linearize.transfer import check_transfer
from regla.models import ReGLAForCausalLM
from regla.models.folders import check_new, new_folder


def linearize(model: str, out: str, keep: str = "every-2") -> ReGLAForCausalLM:
    """Convert a pretrained model, prove the transfer of its weights, and save it with its tokenizer.

    Args:
        model: a name on the Hugging Face hub, a folder, or a .gguf file (which is de-quantised to float32).
        out: a new folder.
        keep: the layers that keep softmax attention, see `regla.linearize.layer_types`.

    Raises:
        ValueError: the model cannot be loaded or converted, the check failed, or `out` is not empty; nothing is
            written then.
    """
    check_new(out)
    original, tokenizer = _load(model)
    converted = convert(original, keep, check=False)
    error = check_transfer(original, converted)
    kinds = converted.config.layer_types or []
    print(
        f"{model}: {len(kinds)} layers, {kinds.count('linear_attention')} of them now ReGLA; softmax through the "
        f"transferred weights reproduces the original's logits to {error:.1e} of the largest"
    )
    folder = new_folder(out)
    converted.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"saved to {folder}; the new gates and norms are untrained, so train it before use")
    return converted


def _load(model: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    path = Path(model)
    where, options = model, {}
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"There is no file {model}; give a .gguf file, a model folder or a name on the hub.")
        where, options = str(path.parent), {"gguf_file": path.name}
    try:
        loaded = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, **options)
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
    except Exception as error:  # transformers lets through whatever its parsers and its downloads raise
        first = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(". ")
        raise ValueError(
            f"{model} cannot be loaded ({first}); give a model folder, a .gguf file or a hub name."
        ) from error
    loaded.config.quantization_config = None  # the weights are plain numbers now
    return loaded, tokenizer
