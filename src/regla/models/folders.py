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
    """
    path = Path(name)
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"{name} is no model folder (it has no config.json); give one that `regla train` wrote.")
    import torch
    from transformers import AutoModelForCausalLM

    options = {} if path.exists() else {"use_safetensors": True}
    model = load_pretrained(AutoModelForCausalLM, name, "model", dtype=torch.float32, **options)
    return model.eval().to(device)


def check_ids(model: PreTrainedModel, ids: Iterable[int], what: str) -> None:
    """Raise ValueError for token ids that the model has no embedding for; `what` begins the sentence."""
    size = model.get_input_embeddings().weight.shape[0]
    if (largest := max(ids)) >= size:
        raise ValueError(
            f"{what} hold id {largest}, but the model's vocab_size is {size}; give the model with its own tokenizer."
        )
