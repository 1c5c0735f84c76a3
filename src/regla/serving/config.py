"""What vLLM reads in a model's config, and what it means here. It is imported before vLLM's layers are."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, cast

from vllm.model_executor.models.config import VerifyAndUpdateConfig

from regla.models.configuration import ReGLAConfig
from regla.serving.rows import check_branch

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class ServedConfig(VerifyAndUpdateConfig):
    """vLLM finds in `layer_types` that a model is a hybrid, and a converted model has its original's there."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Refuse what the plug-in cannot do, and show vLLM a copy of the config with the kinds of layers that there
        are."""
        check(vllm_config)
        model, config = vllm_config.model_config, config_of(vllm_config)
        shown = copy.copy(config)
        shown.layer_types = linear_config_of(vllm_config).layer_types
        shown.served_config = config
        model.hf_config = model.hf_text_config = shown


def config_of(vllm_config: VllmConfig) -> Any:
    """The model's own config."""
    config = vllm_config.model_config.hf_config
    return getattr(config, "served_config", config)


def linear_config_of(vllm_config: VllmConfig) -> ReGLAConfig:
    """The layers of the model: its config, or that of a converted model's linear layers."""
    config = config_of(vllm_config)
    return cast(ReGLAConfig, getattr(config, "linear_config", config))


def check(vllm_config: VllmConfig) -> None:
    """Raise ValueError for what the plug-in does not do."""
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    linear = linear_config_of(vllm_config)
    if parallel.world_size != 1:
        raise ValueError(
            f"regla's plug-in serves a model on one device, and {parallel.world_size} are asked for; leave out "
            "--tensor-parallel-size and --pipeline-parallel-size"
        )
    if not model.enforce_eager:
        raise ValueError("regla's plug-in calls PyTorch step by step; add --enforce-eager")
    if model.quantization is not None:
        raise ValueError(f"quantization is {model.quantization!r}, which regla's plug-in has not; leave it out")
    if vllm_config.speculative_config is not None:
        raise ValueError("a linear layer's state cannot take tokens back; leave out --speculative-config")
    if linear.softmax_conv_kernel_dim and set(linear.layer_types or ()) != {"linear_attention"}:
        raise ValueError(
            f"softmax_conv_kernel_dim is {linear.softmax_conv_kernel_dim}: vLLM keeps keys and values of softmax "
            "layers, and no state of a convolution; serve the model with `transformers serve`"
        )
    check_branch(linear)
    if getattr(config_of(vllm_config), "windowed", None):
        raise ValueError("the model has windowed softmax layers (--mixer window), which are for comparisons alone")
