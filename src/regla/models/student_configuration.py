"""Configurations of students: the original's own, with the layers that are linear and the options of their mixers.

`student_config_class(LlamaConfig)` is `ReGLALlamaConfig`, of the model type "regla_llama".
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import transformers
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from regla.layers.defaults import ADDITIVE, DEFAULTS
from regla.models.configuration import FORMAT_VERSION, ReGLAConfig, checked_format, mixer_arguments
from regla.models.families import FAMILIES, heads_of, softmax_kinds, window
from regla.models.hub import AUTO_CLASSES, auto_map, write_hub_module
from regla.runtime.install import install_regla

PREFIX = "ReGLA"
MODEL_TYPE_PREFIX = "regla_"
MODULE = "regla.models.student"  # where classes of students are looked up by name

#: Options of the mixers, as ReGLAConfig names them. What they start from at a conversion: the pretrained projections,
#: RoPE where the original has it, and no new part on their way in or out but the calibration of q and k, which is the
#: identity at first. A window branch always has the original's RoPE and scaling.
MIXER: dict[str, Any] = {
    **mixer_arguments(replace(ADDITIVE, qk_norm=False, output_gate=None, qk_calibration=True)),
    "linear_rope": True,
    "feature_dim": None,
    "gate_bias": 0.0,
    "refine_bias": 0.0,
}
for _theirs in ("qk_norm", "rms_norm_eps", "attention_bias"):
    del MIXER[_theirs]

#: Keys of config.json that stand beside the original's configuration.
_OWN = (
    "architectures",
    "auto_map",
    "dtype",
    "format_version",
    "linear_layers",
    "mixer",
    "transformers_version",
    "windowed",
)


class StudentConfig:
    """What is mixed into an original's configuration class.

    Args:
        linear_layers: numbers of the layers that are linear, from 0; the others are the original's softmax attention.
        mixer: options of the linear layers by the names of `MIXER`; what is left out is as there.
        windowed: {"layers": numbers, "window": tokens, "sinks": tokens}, layers whose softmax attention is cut to the
            last and the first tokens (`regla.models.window_attention`); None: none.
        format_version: of saved models; set by the package.

    All other arguments are the original's. In config.json they are under "original", and "vocab_size" says who can read
    the folder, so that the original's class refuses it.

    Raises:
        ValueError: a layer that is not there, an option that does not exist or does not fit.
    """

    original_class: type[PreTrainedConfig]
    original_model_type: str
    linear_layers: list[int]
    mixer: dict[str, Any]
    publish_models: Callable[[Any], None]  # see `register_configs`
    windowed: dict[str, Any] | None

    def __post_init__(
        self,
        linear_layers: Sequence[int] = (),
        mixer: dict[str, Any] | None = None,
        windowed: dict[str, Any] | None = None,
        format_version: int = FORMAT_VERSION,
        **kwargs: Any,
    ) -> None:
        self.publish_models(type(self))
        kwargs["auto_map"] = auto_map(_class_names(cast(Any, type(self))))
        super().__post_init__(**kwargs)  # type: ignore[misc]
        self.format_version = checked_format(format_version)
        self.linear_layers = sorted(linear_layers)
        self.mixer = MIXER | (mixer or {})
        unknown = sorted(self.mixer.keys() - MIXER.keys())
        if unknown:
            raise ValueError(f"{unknown[0]} is no option of a mixer; expected {', '.join(MIXER)}")
        self.windowed = windowed
        layers = self.num_hidden_layers  # type: ignore[attr-defined]
        missing = [number for number in self.linear_layers if not 0 <= number < layers]
        if missing:
            raise ValueError(f"linear_layers names layer {missing[0]}; the model has layers 0 to {layers - 1}")
        self.linear_config.check()

    @property
    def linear_config(self) -> ReGLAConfig:
        """The linear layers as a ReGLAConfig: sizes, options, and in `layer_types` which layers they are."""
        config: Any = self
        heads = heads_of(config)
        kinds = softmax_kinds(config)
        for number in self.linear_layers:
            kinds[number] = "linear_attention"
        return ReGLAConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=heads.queries,
            num_key_value_heads=heads.keys,
            head_dim=heads.size,
            rms_norm_eps=getattr(config, "rms_norm_eps", DEFAULTS.norm_eps),
            initializer_range=getattr(config, "initializer_range", 0.02),
            max_position_embeddings=getattr(config, "max_position_embeddings", 2048),
            sliding_window=window(config),
            layer_types=kinds,
            qk_norm=False,
            **self.mixer,
        )

    def original_config(self) -> PreTrainedConfig:
        """The configuration of the softmax model in whose class the student is."""
        theirs = self._parts(self.to_dict())["original"]  # type: ignore[attr-defined]
        return self.original_class(**theirs)

    def _parts(self, flat: dict[str, Any]) -> dict[str, Any]:
        own = {name: flat[name] for name in _OWN if name in flat}
        theirs = {name: value for name, value in flat.items() if name not in own and name != "model_type"}
        return {
            "model_type": type(self).model_type,  # type: ignore[attr-defined]
            "vocab_size": (
                f"in `original`: this is no {self.original_model_type} model but one with linear layers, which needs "
                f"the package regla ({install_regla()}) and AutoModelForCausalLM with trust_remote_code=True"
            ),
            "original": theirs,  # without its model_type, or transformers would take it for a part that loads by itself
            **own,
        }

    def to_json_string(self, use_diff: bool = True) -> str:
        """What config.json holds."""
        flat = self.to_diff_dict() if use_diff else self.to_dict()  # type: ignore[attr-defined]
        encoded = self._encode_special_floats(self._parts(flat))  # type: ignore[attr-defined]
        return json.dumps(encoded, indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers, from what config.json holds or from `to_dict`."""
        if "original" in config_dict:
            config_dict = config_dict["original"] | {name: config_dict[name] for name in _OWN if name in config_dict}
        return super().from_dict(config_dict, **kwargs)  # type: ignore[misc]

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As in transformers; writes the module that `auto_map` names beside config.json."""
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        names = _class_names(cast(Any, type(self))).values()
        write_hub_module(save_directory, MODULE, list(names))

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Does nothing: registered, transformers would copy this file into saved folders, where it cannot run."""


@functools.cache
def student_config_class(original: Any) -> Any:
    """The configuration class of students of an original's."""
    name = PREFIX + original.__name__
    cls = type(
        name,
        (StudentConfig, original),
        {
            "__module__": MODULE,
            "__doc__": StudentConfig.__doc__,
            "model_type": MODEL_TYPE_PREFIX + original.model_type,
            "original_class": original,
            "original_model_type": original.model_type,
        },
    )
    setattr(sys.modules[__name__], name, cls)
    return cls


def register_configs(publish_models: Callable[[Any], None]) -> None:
    """Make the model types of students known to AutoConfig.

    publish_models: makes the models of a configuration class known to the other Auto classes. It is called with the
        first configuration of a type, as it imports the original's code.
    """
    StudentConfig.publish_models = staticmethod(functools.cache(publish_models))
    for model_type in FAMILIES:
        cls = student_config_class(CONFIG_MAPPING[model_type])
        AutoConfig.register(cls.model_type, cls, exist_ok=True)


@functools.cache
def _class_names(config_class: Any) -> dict[str, str]:
    """Names of the classes of a student by Auto class."""
    names = {"AutoConfig": config_class.__name__}
    for auto in AUTO_CLASSES:
        known = getattr(transformers, auto)._model_mapping
        if config_class.original_class in known:
            names[auto] = PREFIX + known[config_class.original_class].__name__
    return names
