"""The model that learns: the original with ReGLA in its layers, or a converted model that goes on learning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from regla.linearize.config import UNGATED, WINDOW, LinearizeConfig
from regla.linearize.convert import (
    chosen_count,
    converted_config,
    linear_numbers,
    make_student_of,
    windowed_config,
    with_weights,
)
from regla.linearize.load import load_student, load_student_config
from regla.models.student import linear_attention
from regla.runtime.errors import OptionError

_SHARED = ("num_hidden_layers", "hidden_size", "vocab_size")  # what attention transfer and distillation compare


_AS_IN_THE_PAPER = {"attention_norm": "layernorm", "qk_calibration": False}

#: Options of the mixers that have a name, over those that all conversions share.
MIXER_OPTIONS: dict[str, dict[str, Any]] = {
    "additive": {},
    "delta": {"update_rule": "delta", "feature_map": "unit_safe_exp"},
    "relu": {**_AS_IN_THE_PAPER, "feature_map": "relu", "gate": "none"},
    "hedgehog": {**_AS_IN_THE_PAPER, "feature_map": "hedgehog", "gate": "none"},
    "scalar": {**_AS_IN_THE_PAPER, "feature_map": "relu", "gate": "scalar"},
    "fast_decay": {**_AS_IN_THE_PAPER, "feature_map": "identity", "gate": "fast_decay"},
    "paper": {**_AS_IN_THE_PAPER, "gate_axis": "value"},
}


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
        planned = _new_config(config, original)
    else:
        planned = _further_config(config, load_student_config(config.init), original)
    if not (planned.linear_layers or config.keep == "all" or (planned.windowed and planned.windowed["layers"])):
        raise OptionError(
            "{keep} {value} names every layer, so that none becomes linear; name fewer.",
            value=config.keep,
        )
    return planned


def _new_config(config: LinearizeConfig, original: PreTrainedConfig) -> Any:
    keep = _keep_at_first(config, original)
    if config.mixer == "window":
        return windowed_config(original, keep, config.window or WINDOW)
    return converted_config(original, keep, **_mixer(config))


def _keep_at_first(config: LinearizeConfig, original: PreTrainedConfig) -> str:
    """The layers that keep softmax attention from the start; those that are chosen later become linear first."""
    keep = config.keep
    assert isinstance(keep, str)
    if not config.chooses_layers:
        return keep
    chosen_count(keep, original.num_hidden_layers)
    return "none"


def _mixer(config: LinearizeConfig) -> dict[str, Any]:
    """Options of the mixers; gates that are told by the teacher start at the constant until then."""
    start = {} if isinstance(config.gate_start, str) else {"gate_half_life": config.gate_start}
    gate = {"gate", "gate_bias", "gate_half_life"} & config.overrides.keys() or config.mixer in UNGATED
    names = ("window_branch", "window_sinks", "window_dropout")
    window = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    return (start if not gate else {}) | MIXER_OPTIONS[config.mixer or "additive"] | window | dict(config.overrides)


def make_student(config: LinearizeConfig, original: PreTrainedModel) -> Student:
    """The student of `original` as `config` says, before calibration.

    Raises:
        ValueError: see `student_config`; or weights that do not fit.
    """
    torch.manual_seed(config.seed)
    if config.init is None:
        model = make_student_of(original, _new_config(config, original.config))
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
    return type(before).from_dict(before.to_dict() | {"linear_layers": linear})
