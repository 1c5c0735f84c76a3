"""Where transformers learns of these models: its Auto classes, and the namespace in which its server looks."""

from __future__ import annotations

import sys

import transformers
from transformers import AutoConfig

from regla.models import heads, modeling
from regla.models.configuration import ReGLAConfig
from regla.models.hub import AUTO_CLASSES


def register() -> None:
    """Make the model type known to the Auto classes, and the classes to `getattr(transformers, name)`, which is how
    `transformers serve` finds the class that a folder's `architectures` names. Safe to call again."""
    AutoConfig.register(ReGLAConfig.model_type, ReGLAConfig, exist_ok=True)
    # transformers imports itself a second time, so that its server may hold another module of that name.
    server = sys.modules.get("transformers.cli.serving.model_manager")
    namespaces = [transformers, getattr(server, "transformers", transformers)]
    for auto, name in AUTO_CLASSES.items():
        cls = getattr(modeling, name, None) or getattr(heads, name)
        getattr(transformers, auto).register(ReGLAConfig, cls, exist_ok=True)
        for namespace in namespaces:
            setattr(namespace, name, cls)
