"""Models with ReGLA layers in serving engines. `transformers serve` needs nothing from here; vLLM needs a plug-in."""

from __future__ import annotations


def register_vllm() -> None:
    """Make vLLM know models with ReGLA layers: the entry point `vllm.general_plugins`. Safe to call again."""
    import transformers
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    import regla.models  # makes the model types known to AutoConfig
    from regla.models.families import FAMILIES
    from regla.models.student_configuration import PREFIX
    from regla.serving.config import ServedConfig

    causal = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    names = [regla.models.ReGLAForCausalLM.__name__, *(PREFIX + causal[model_type] for model_type in FAMILIES)]
    MODELS_CONFIG_MAP.update(dict.fromkeys(names, ServedConfig))
    for name in names:
        if name not in ModelRegistry.get_supported_archs():
            ModelRegistry.register_model(name, "regla.serving.vllm:ServedModel")
