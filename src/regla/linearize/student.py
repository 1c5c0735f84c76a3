"""The model that learns: the original with ReGLA in its layers, or a converted model that goes on learning."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from regla.linearize.config import LinearizeConfig
from regla.linearize.convert import convert, converted_config, layer_types, own_parameters
from regla.linearize.load import load_student, load_student_config
from regla.linearize.transfer import linear_layers
from regla.models import ReGLAConfig, ReGLAForCausalLM
from regla.runtime.errors import OptionError

_SHARED = ("num_hidden_layers", "hidden_size", "vocab_size")  # what attention transfer and distillation compare


@dataclass(frozen=True)
class Student:
    """A model before its training."""

    model: ReGLAForCausalLM
    before: PreTrainedModel
    """What its weights came from."""
    new: list[int]
    """The layers that became linear now."""


def student_config(config: LinearizeConfig, original: PreTrainedConfig) -> ReGLAConfig:
    """The configuration of the student.

    Raises:
        ValueError: layers that are not there; no layer is linear; a folder to go on from that does not fit.
    """
    if config.init is None:
        assert config.keep is not None
        planned = converted_config(original, config.keep, gate_bias=config.gate_bias)
    else:
        planned = _further_config(config, load_student_config(config.init), original)
    assert planned.layer_types is not None
    if "linear_attention" not in planned.layer_types:
        raise OptionError(
            "{keep} {value} names every layer, so that none becomes linear; name fewer.", value=config.keep
        )
    return planned


def make_student(config: LinearizeConfig, original: PreTrainedModel) -> Student:
    """The student of `original` as `config` says, before calibration.

    Raises:
        ValueError: see `student_config`; or weights that do not fit.
    """
    torch.manual_seed(config.seed)
    if config.init is None:
        assert config.keep is not None
        model = convert(original, config.keep, check=False, gate_bias=config.gate_bias)
        return Student(model, original, sorted(linear_layers(model)))
    before = load_student(config.init)
    planned = _further_config(config, before.config, original.config)
    torch.manual_seed(config.seed)
    model = ReGLAForCausalLM(planned).eval()
    new = sorted(linear_layers(model).keys() - linear_layers(before).keys())
    missing, unexpected = model.load_state_dict(before.state_dict(), strict=False)
    allowed = {name for name in own_parameters(model) if int(name.split(".")[2]) in new}
    if unexpected or set(missing) - allowed:
        name = (unexpected or sorted(set(missing) - allowed))[0]
        raise ValueError(f"Parameter {name} in {config.init} has no place in a converted model; give another folder.")
    model.generation_config = before.generation_config
    return Student(model, before, new)


def _further_config(config: LinearizeConfig, before: ReGLAConfig, original: PreTrainedConfig) -> ReGLAConfig:
    """The configuration in the folder, with the layers that are to be linear as well."""
    for name in _SHARED:
        ours, theirs = getattr(before, name), getattr(original, name)
        if ours != theirs:
            raise ValueError(
                f"{config.init} has {name} {ours}, but {config.model} has {theirs}; give the original that the folder "
                "was converted from."
            )
    if config.keep is None:
        return before
    assert before.layer_types is not None
    kinds = layer_types(before.num_hidden_layers, config.keep)
    lost = [i for i, pair in enumerate(zip(before.layer_types, kinds, strict=True)) if pair == _LINEAR_TO_SOFTMAX]
    if lost:
        raise OptionError(
            "{keep} {value} keeps layer {layer}, which is linear in {folder} already; name softmax layers of it.",
            value=config.keep,
            layer=lost[0],
            folder=config.init,
        )
    if kinds == before.layer_types:
        raise OptionError(
            "{keep} {value} makes no further layer of {folder} linear; leave it out.",
            value=config.keep,
            folder=config.init,
        )
    return ReGLAConfig(**before.to_dict() | {"layer_types": kinds, "gate_bias": config.gate_bias})


_LINEAR_TO_SOFTMAX = ("linear_attention", "full_attention")
