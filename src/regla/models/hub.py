"""What a saved folder needs to load in a program that never imported regla, and what makes its classes known there:
`auto_map`, a file that imports regla, and transformers' Auto classes."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

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


def auto_map(names: dict[str, str]) -> dict[str, str]:
    """The entry of a config.json, from names of classes by Auto class."""
    return {auto: f"{HUB_MODULE}.{name}" for auto, name in names.items()}


AUTO_MAP = auto_map(_NAMES)

_ABSENT = f"This model needs the package regla, which is not installed; run `{install_regla()}`."


def hub_source(module: str, names: Iterable[str]) -> str:
    """Source of a file that takes the classes `names` from `module` of the installed package."""
    return f'''"""Lets `from_pretrained(..., trust_remote_code=True)` find the installed package `regla`."""

try:
    from {module} import {", ".join(names)}
except ModuleNotFoundError as error:  # in a `try`, since transformers would advise a name that is on no index
    if (error.name or "").split(".")[0] != "regla":
        raise
    raise ImportError({_ABSENT!r}) from error

__all__ = {list(names)}
'''


def write_hub_module(
    folder: str | os.PathLike[str], module: str = "regla.models", names: Iterable[str] = tuple(_NAMES.values())
) -> Path:
    """Write the module that `auto_map` points to into `folder` and return its path."""
    path = Path(folder) / f"{HUB_MODULE}.py"
    path.write_text(hub_source(module, names), encoding="utf-8")
    return path


def publish(auto: str, config_class: Any, model_class: Any) -> None:
    """Make the Auto class named `auto` build `model_class` from a `config_class`, and the class known by its name to
    `getattr(transformers, name)`, which is how `transformers serve` finds what a folder's `architectures` names.

    Safe to call again.
    """
    import transformers

    getattr(transformers, auto).register(config_class, model_class, exist_ok=True)
    # transformers imports itself a second time, so that its server may hold another module of that name.
    server = sys.modules.get("transformers.cli.serving.model_manager")
    for namespace in (transformers, getattr(server, "transformers", transformers)):
        setattr(namespace, model_class.__name__, model_class)
