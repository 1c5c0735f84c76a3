"""ReGLA as Hugging Face models. The names load on first use: the configuration must be importable without the model."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from regla.models.configuration import ReGLAConfig
    from regla.models.modeling import ReGLAForCausalLM, ReGLAModel, ReGLAPreTrainedModel

__all__ = ["ReGLAConfig", "ReGLAForCausalLM", "ReGLAModel", "ReGLAPreTrainedModel"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'regla.models' has no attribute {name!r}")
    home = "configuration" if name == "ReGLAConfig" else "modeling"
    value = getattr(importlib.import_module(f"regla.models.{home}"), name)
    globals()[name] = value
    return value
