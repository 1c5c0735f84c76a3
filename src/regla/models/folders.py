"""The folders that commands write and read: new ones, tokenizers and models in Hugging Face's layout."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def check_new(folder: str | Path) -> None:
    """Raise ValueError unless `folder` can become a new folder: it does not exist or is empty."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give --out a folder that does not exist yet.")
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; give --out a new folder, or empty this one first.")


def new_folder(folder: str | Path) -> Path:
    """Create `folder`, which must not exist or be empty, so that nothing is ever overwritten."""
    check_new(folder)
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"{folder} cannot be created ({error.strerror}); give --out a place that you may write to."
        ) from error
    return Path(folder)


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder on disk."""
    if not Path(folder).is_dir():
        raise ValueError(
            f"There is no tokenizer folder {folder}; give one that `regla tokenize` or save_pretrained wrote."
        )
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # transformers lets through whatever its parsers raise
        raise ValueError(f"{folder} holds no readable tokenizer ({_brief(error)}); give another folder.") from error


def load_model(folder: str | Path, device: torch.device) -> PreTrainedModel:
    """The causal language model in a folder on disk, float32, in evaluation mode, on `device`."""
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"{folder} is no model folder (it has no config.json); give one that `regla train` wrote.")
    import torch
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(str(folder), local_files_only=True, dtype=torch.float32)
    except Exception as error:  # transformers lets through whatever its parsers raise
        raise ValueError(f"{folder} holds no readable model ({_brief(error)}); give another folder.") from error
    return model.eval().to(device)


def _brief(error: Exception) -> str:
    """The kind of an error and the first sentence of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('. ')}" if lines else type(error).__name__
