"""The model that learns: the original with ReGLA in its layers, or a converted model that goes on learning."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from regla.linearize.config import LinearizeConfig
from regla.linearize.convert import convert, converted_config, linear_numbers, with_weights
from regla.linearize.load import load_student, load_student_config
from regla.models.student import linear_attention
from regla.runtime.errors import OptionError

_SHARED = ("num_hidden_layers", "hidden_size", "vocab_size")  # what attention transfer and distillation compare


@dataclass(frozen=True)
class Student:
    """A model before its training."""

    model: PreTrainedModel
    before: PreTrainedModel
    """What its weights came from."""
    new: list[int]
    """The layers that became linear now."""


def student_config(config: LinearizeConfig, original: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of the student.

    Raises:
        ValueError: layers that are not there; no layer is linear; a folder to go on from that does not fit.
    """
    if config.init is None:
        assert config.keep is not None
        planned = converted_config(original, config.keep, gate_bias=config.gate_bias)
    else:
        planned = _further_config(config, load_student_config(config.init), original)
    if not planned.linear_layers:
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
        return Student(model, original, sorted(linear_attention(model)))
    before = load_student(config.init)
    planned = _further_config(config, before.config, original.config)
    torch.manual_seed(config.seed)
    model = with_weights(before, type(before), planned).eval()
    model.generation_config = before.generation_config
    return Student(model, before, sorted(set(planned.linear_layers) - set(before.config.linear_layers)))


def _further_config(config: LinearizeConfig, before: PreTrainedConfig, original: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration in the folder, with the layers that are to be linear as well."""
    if before.original_model_type != original.model_type:
        raise ValueError(
            f"{config.init} was converted from a {before.original_model_type} model, but {config.model} is of type "
            f"{original.model_type}; give the original that the folder was converted from."
        )
    for name in _SHARED:
        ours, theirs = getattr(before, name), getattr(original, name)
        if ours != theirs:
            raise ValueError(
                f"{config.init} has {name} {ours}, but {config.model} has {theirs}; give the original that the folder "
                "was converted from."
            )
    if config.keep is None:
        return before
    linear = linear_numbers(original, config.keep)
    lost = sorted(set(before.linear_layers) - set(linear))
    if lost:
        raise OptionError(
            "{keep} {value} keeps layer {layer}, which is linear in {folder} already; name softmax layers of it.",
            value=config.keep,
            layer=lost[0],
            folder=config.init,
        )
    if linear == before.linear_layers:
        raise OptionError(
            "{keep} {value} makes no further layer of {folder} linear; leave it out.",
            value=config.keep,
            folder=config.init,
        )
    mixer = before.mixer | {"gate_bias": config.gate_bias}
    return type(before).from_dict(before.to_dict() | {"linear_layers": linear, "mixer": mixer})
