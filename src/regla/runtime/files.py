"""Folders and files that commands write."""

from __future__ import annotations

from pathlib import Path


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


def brief(error: Exception) -> str:
    """The kind of an error and the first sentence of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('. ')}" if lines else type(error).__name__
