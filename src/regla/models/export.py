"""What a saved folder needs to load in a program that never imported regla: `auto_map` and a file that imports it."""

from __future__ import annotations

import os
from pathlib import Path

HUB_MODULE = "modeling_regla_hub"

AUTO_MAP = {
    "AutoConfig": f"{HUB_MODULE}.ReGLAConfig",
    "AutoModel": f"{HUB_MODULE}.ReGLAModel",
    "AutoModelForCausalLM": f"{HUB_MODULE}.ReGLAForCausalLM",
}

HUB_SOURCE = '''"""Lets `from_pretrained(..., trust_remote_code=True)` find the installed package `regla`."""

from regla.models import ReGLAConfig, ReGLAForCausalLM, ReGLAModel

__all__ = ["ReGLAConfig", "ReGLAForCausalLM", "ReGLAModel"]
'''


def write_hub_module(folder: str | os.PathLike[str]) -> Path:
    """Write the module that `AUTO_MAP` points to into `folder` and return its path."""
    path = Path(folder) / f"{HUB_MODULE}.py"
    path.write_text(HUB_SOURCE, encoding="utf-8")
    return path
