"""Where a model or a tokenizer comes from: a folder, a GGUF file, or a name on the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from regla.runtime.files import brief
from regla.runtime.install import require

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def load_pretrained(kind: Any, name: str | Path, what: str, **options: Any) -> Any:
    """`kind.from_pretrained` of a folder, a .gguf file or a name on the hub; code in them is never run.

    Args:
        kind: one of transformers' Auto classes.
        name: the folder, the file or the name.
        what: "model" or "tokenizer", for sentences.
        options: further arguments of `from_pretrained`.

    Raises:
        ValueError: there is none, or it cannot be loaded.
    """
    path = Path(name)
    options |= {"trust_remote_code": False}
    where = str(name)
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ValueError(f"There is no file {name}; give a .gguf file, a folder or a name on the hub.")
        require("gguf", f"{name} needs", "accelerate")
        where, options = str(path.parent), options | {"gguf_file": path.name}
    elif path.is_dir():
        options |= {"local_files_only": True}
    elif path.exists() or not _HUB_NAME.fullmatch(where):
        raise ValueError(f"There is no {what} folder {name}; give a folder, a .gguf file or a name on the hub.")
    try:
        return kind.from_pretrained(where, **options)
    except Exception as error:  # transformers lets through whatever its parsers and its downloads raise
        if path.exists():
            raise ValueError(f"{name} holds no readable {what} ({brief(error)}); give another.") from error
        raise ValueError(
            f"There is no {what} folder {name}, and the hub has no such {what} to load ({brief(error)}); "
            "give a folder, a .gguf file or a name on the hub."
        ) from error
