"""What a saved folder needs to load in a program that never imported regla: `auto_map` and a file that imports it."""

from __future__ import annotations

import os
from pathlib import Path

from regla.runtime.install import install_regla

HUB_MODULE = "modeling_regla_hub"

#: The class that each Auto class of transformers makes of a ReGLAConfig.
AUTO_CLASSES = {
    "AutoModel": "ReGLAModel",
    "AutoModelForCausalLM": "ReGLAForCausalLM",
    "AutoModelForSequenceClassification": "ReGLAForSequenceClassification",
    "AutoModelForTokenClassification": "ReGLAForTokenClassification",
    "AutoModelForQuestionAnswering": "ReGLAForQuestionAnswering",
}

_NAMES = {"AutoConfig": "ReGLAConfig"} | AUTO_CLASSES

AUTO_MAP = {auto: f"{HUB_MODULE}.{name}" for auto, name in _NAMES.items()}

_ABSENT = f"This model needs the package regla, which is not installed; run `{install_regla()}`."

HUB_SOURCE = f'''"""Lets `from_pretrained(..., trust_remote_code=True)` find the installed package `regla`."""

try:
    from regla.models import {", ".join(_NAMES.values())}
except ModuleNotFoundError as error:  # in a `try`, since transformers would advise a name that is on no index
    if (error.name or "").split(".")[0] != "regla":
        raise
    raise ImportError({_ABSENT!r}) from error

__all__ = {list(_NAMES.values())}
'''


def write_hub_module(folder: str | os.PathLike[str]) -> Path:
    """Write the module that `AUTO_MAP` points to into `folder` and return its path."""
    path = Path(folder) / f"{HUB_MODULE}.py"
    path.write_text(HUB_SOURCE, encoding="utf-8")
    return path
