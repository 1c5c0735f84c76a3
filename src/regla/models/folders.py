"""Models in Hugging Face's layout: a folder, a GGUF file, or a name on the hub."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from regla.data.pretrained import load_pretrained

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def load_model(name: str | Path, device: torch.device) -> PreTrainedModel:
    """The causal language model in a folder, in a .gguf file, or of a name on the Hugging Face hub.

    It is float32, in evaluation mode, on `device`. Downloaded weights are read from safetensors or GGUF alone: files of
    pickles can run code.

    Raises:
        ValueError: there is none, it cannot be loaded, or weights of it are missing.
    """
    path = Path(name)
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"{name} is no model folder (it has no config.json); give one that `regla train` wrote.")
    import torch
    from transformers import AutoModelForCausalLM

    options = {} if path.exists() else {"use_safetensors": True}
    options |= {"output_loading_info": True}
    model, found = load_pretrained(AutoModelForCausalLM, name, "model", dtype=torch.float32, **options)
    if missing := sorted(found["missing_keys"]):  # transformers draws them at random and says so on stderr
        others = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
        raise ValueError(
            f"{name} lacks weights of the model in its config.json ({missing[0]}{others}); "
            "give a whole causal language model."
        )
    _check_special_ids(name, model)
    return model.eval().to(device)


def _check_special_ids(name: str | Path, model: PreTrainedModel) -> None:
    """Raise ValueError for a special token of the generation config that is no id: transformers reads it unchecked."""
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        found = getattr(model.generation_config, key, None)
        if not all(type(one) is int for one in (found if isinstance(found, list) else [found]) if one is not None):
            raise ValueError(f"{key} of {name} is {found!r}, expected a token id; correct its generation_config.json.")


def check_ids(model: PreTrainedModel, ids: Iterable[int], what: str) -> None:
    """Raise ValueError for token ids that the model has no embedding for; `what` begins the sentence."""
    size = model.get_input_embeddings().weight.shape[0]
    if (largest := max(ids)) >= size:
        raise ValueError(
            f"{what} hold id {largest}, but the model's vocab_size is {size}; give the model with its own tokenizer."
        )
