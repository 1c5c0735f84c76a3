"""Where transformers learns of these models: its Auto classes, and the namespace in which its server looks."""

from __future__ import annotations

from transformers import AutoConfig

from regla.models import heads, modeling
from regla.models.configuration import ReGLAConfig
from regla.models.hub import AUTO_CLASSES, publish
from regla.models.student import publish_models
from regla.models.student_configuration import register_configs


def register() -> None:
    """Make the model types known to the Auto classes. Safe to call again."""
    AutoConfig.register(ReGLAConfig.model_type, ReGLAConfig, exist_ok=True)
    for auto, name in AUTO_CLASSES.items():
        publish(auto, ReGLAConfig, getattr(modeling, name, None) or getattr(heads, name))
    register_configs(publish_models)
