"""What a saved folder needs to load in a program that never imported regla: `auto_map` and a file that imports it."""

from __future__ import annotations

import os
from pathlib import Path

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

HUB_SOURCE = f'''"""Lets `from_pretrained(..., trust_remote_code=True)` find the installed package `regla`."""

from regla.models import {", ".join(_NAMES.values())}

__all__ = {list(_NAMES.values())}
'''


def write_hub_module(folder: str | os.PathLike[str]) -> Path:
    """Write the module that `AUTO_MAP` points to into `folder` and return its path."""
    path = Path(folder) / f"{HUB_MODULE}.py"
    path.write_text(HUB_SOURCE, encoding="utf-8")
    return path
