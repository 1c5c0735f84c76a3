"""Training by adapters (LoRA, through peft): the pretrained weights stay as they are, and the teacher's are the same
memory. Only the parts that a softmax layer does not have are trained in full."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from regla.linearize.convert import mixer_weights, own_parameters
from regla.models.families import family_of
from regla.models.student import StudentAttention, linear_attention
from regla.runtime.install import require

_RANK = 16


def check_adapters() -> None:
    """Raise ValueError where the package that adapters need is not installed."""
    require("peft", "preset lora needs")


def add_adapters(original: PreTrainedModel, model: PreTrainedModel, *, seed: int) -> None:
    """Freeze the pretrained weights of `model`, let them share the memory of the original's, and put adapters beside
    the linear maps of its blocks, in place."""
    from peft import LoraConfig, inject_adapter_in_model

    own = set(own_parameters(model))
    _share_weights(original, model)
    targets = [name for name, module in model.named_modules() if _is_adapted(model, name, module)]
    torch.manual_seed(seed)
    config = LoraConfig(r=_RANK, lora_alpha=2 * _RANK, target_modules=targets)
    inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in own or "lora_" in name)


def merge_adapters(model: PreTrainedModel) -> None:
    """Add the adapters to copies of the weights and take them out, in place; the teacher's weights stay."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            base = module.get_base_layer()
            base.weight = nn.Parameter(cast(Any, base.weight).detach().clone())
            cast(Any, module).merge()
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, base)
    if hasattr(model, "peft_config"):
        del model.peft_config
    model.requires_grad_(True)


def _share_weights(original: PreTrainedModel, model: PreTrainedModel) -> None:
    original.requires_grad_(False)
    theirs = dict(original.named_parameters())
    for name, ours in list(model.named_parameters()):
        if name in theirs:
            _share(model, name, ours, theirs[name])
    family = family_of(model.config)
    paths = {module: path for path, module in model.named_modules() if isinstance(module, StudentAttention)}
    for number, attention in linear_attention(model).items():
        for name, weight in mixer_weights(family.attention_of(original, number), model.config):
            if not name.startswith(("q_norm", "k_norm")):
                path = f"{paths[attention]}.mixer.{name}"
                _share(model, path, model.get_parameter(path), weight)
    model.tie_weights()


def _share(model: nn.Module, name: str, ours: Tensor, theirs: Tensor) -> None:
    """Put a weight of the original in the place of an equal one; one that has been trained since stays."""
    if torch.equal(ours, theirs):
        parent, _, attribute = name.rpartition(".")
        shared = theirs if isinstance(theirs, nn.Parameter) else nn.Parameter(theirs, requires_grad=False)
        setattr(model.get_submodule(parent), attribute, shared)


def _is_adapted(model: PreTrainedModel, name: str, module: nn.Module) -> bool:
    """Whether it is a linear map of a block, a pretrained one."""
    if not isinstance(module, nn.Linear | Conv1D) or module is model.get_output_embeddings():
        return False
    inside = name.partition(".mixer.")[2]
    return not inside or inside in ("q_proj", "k_proj", "v_proj", "o_proj")
