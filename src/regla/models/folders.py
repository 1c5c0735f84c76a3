"""Folders of models in Hugging Face's layout."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from regla.runtime.files import brief

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def load_model(folder: str | Path, device: torch.device) -> PreTrainedModel:
    """The causal language model in a folder on disk, float32, in evaluation mode, on `device`."""
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"{folder} is no model folder (it has no config.json); give one that `regla train` wrote.")
    import torch
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(str(folder), local_files_only=True, dtype=torch.float32)
    except Exception as error:  # transformers lets through whatever its parsers raise
        raise ValueError(f"{folder} holds no readable model ({brief(error)}); give another folder.") from error
    return model.eval().to(device)
