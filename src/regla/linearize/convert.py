"""From a pretrained softmax model to one with ReGLA layers: configuration and weights."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from regla.layers.defaults import ADDITIVE
from regla.linearize.config import GATE_BIAS
from regla.linearize.families import config_arguments
from regla.linearize.transfer import check_transfer, linear_layers
from regla.models import ReGLAConfig, ReGLAForCausalLM
from regla.models.configuration import mixer_arguments
from regla.runtime.errors import OptionError

#: The mixer of a converted layer: the pretrained projections, RoPE where the original has it, and no new part on their
#: way in or out but the calibration of q and k, which starts as the identity.
CONVERTED: dict[str, Any] = {
    **mixer_arguments(replace(ADDITIVE, qk_norm=False, output_gate=None, qk_calibration=True)),
    "linear_rope": True,
    "gate_bias": GATE_BIAS,
}


def layer_types(num_layers: int, keep: str | Iterable[int]) -> list[str]:
    """The kind of each layer, from the ones that keep softmax attention.

    Args:
        num_layers: layers of the model.
        keep: "none", "every-N" (every N-th layer: N-1, 2N-1, ...), or the layers' numbers from 0, as a list or as text
            such as "0,7,14".

    Raises:
        ValueError: another word, N below 2, or a layer that is not there.
    """
    kept = _kept(num_layers, keep) if isinstance(keep, str) else set(keep)
    missing = sorted(kept - set(range(num_layers)))
    if missing:
        raise OptionError(
            "{keep} names layer {layer}; the model has layers 0 to {last}", layer=missing[0], last=num_layers - 1
        )
    return ["full_attention" if i in kept else "linear_attention" for i in range(num_layers)]


def _kept(num_layers: int, keep: str) -> set[int]:
    if keep == "none":
        return set()
    rule, _, number = keep.partition("-")
    if rule == "every" and number.isdecimal() and int(number) >= 2:
        return set(range(int(number) - 1, num_layers, int(number)))
    numbers = [number.strip() for number in keep.split(",")]
    if not all(number.isdecimal() for number in numbers):
        raise OptionError(
            "{keep} is {value!r}; expected 'none', 'every-N' with N of at least 2, or layer numbers such as '0,7,14'",
            value=keep,
        )
    return {int(number) for number in numbers}


def converted_config(original: PreTrainedConfig, keep: str | Iterable[int] = "every-2", **own: Any) -> ReGLAConfig:
    """The configuration of the converted model, see `convert`; derived from the original's, nothing from defaults."""
    arguments = config_arguments(original)
    shared = sorted(own.keys() & arguments.keys())
    if shared:
        raise ValueError(f"{shared[0]} is the original's and cannot be set anew; leave it out")
    kinds = layer_types(arguments["num_hidden_layers"], keep)
    return ReGLAConfig(**CONVERTED | arguments | own, layer_types=kinds)


def convert(
    model: PreTrainedModel, keep: str | Iterable[int] = "every-2", *, check: bool = True, **mixer: Any
) -> ReGLAForCausalLM:
    """Put ReGLA into the layers of a pretrained model, with the pretrained weights.

    Embeddings, norms, MLPs, the head, and the q, k, v, o projections (with their biases) are the original's; key and
    value heads that groups of query heads share stay shared, whole heads each: such a group shares a state. New are
    the gates, the calibration of q and k and the output norms, which start as `regla.layers.init_linear_attention`
    says; `regla.linearize.calibrate` fits the latter two to data.

    Args:
        model: a causal language model of a supported family (`regla.linearize.FAMILIES`), its weights not quantised.
        keep: the layers that keep softmax attention, see `layer_types`.
        check: prove the transfer before returning (`check_transfer`, relative difference of logits at most 1e-4).
        mixer: ReGLAConfig's own arguments for the new layers, such as gate_axis="key".

    Returns:
        A new model in the dtype and on the device of the original, sharing none of its memory. Its generation config
        is the original's less the flags without effect.

    Raises:
        ValueError: unsupported architecture; layers that are not there; arguments that do not fit; a failed check.
    """
    config = converted_config(model.config, keep, dtype=model.dtype, **mixer)
    converted = ReGLAForCausalLM(config).to(device=model.device, dtype=model.dtype)
    missing, unexpected = converted.load_state_dict(model.state_dict(), strict=False)
    new = set(own_parameters(converted))
    if unexpected or set(missing) - new:
        name = (unexpected or sorted(set(missing) - new))[0]
        raise ValueError(
            f"parameter {name} is in one model and not in the other; the original differs from its family "
            f"{model.config.model_type!r}: convert only unmodified models"
        )
    converted.generation_config = _generation_config(model)
    converted.train(model.training)
    if check:
        check_transfer(model, converted)
    return converted


#: Flags that decide how `generate` works, which others are checked against.
_MODES = ("do_sample", "num_beams", "return_dict_in_generate", "use_cache")

#: Flags of assisted generation, which changes no text, and which recurrent states do not allow.
_ASSISTED = ("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")

_CACHES = (None, "dynamic", "static")


def _generation_config(model: PreTrainedModel) -> GenerationConfig:
    """The original's less the flags without effect, such as a temperature where nothing is sampled: transformers loads
    them, but refuses to save them. Sampling at temperature 0 is greedy; greedy decoding stays greedy."""
    given = {name: copy.deepcopy(value) for name, value in vars(model.generation_config).items()}
    if given.get("do_sample") and given.get("temperature") == 0:
        given["do_sample"] = False
    if given.get("cache_implementation") not in _CACHES:
        given |= {"cache_implementation": None, "cache_config": None}
    config = GenerationConfig()
    for name in sorted(given.keys() - set(_ASSISTED), key=lambda name: (name not in _MODES, name)):
        before = vars(config).copy()
        setattr(config, name, given[name])
        try:
            config.validate(strict=True)
        except ValueError:
            vars(config).clear()
            vars(config).update(before)
    return config


def own_parameters(model: ReGLAForCausalLM) -> Iterator[str]:
    """Paths of the mixers' parameters that a softmax layer does not have."""
    for number, layer in linear_layers(model).items():
        for path, _ in layer.named_parameters(prefix=f"model.layers.{number}"):
            _, _, name = path.partition(".self_attn.")
            if name and name.partition(".")[0] not in ("q_proj", "k_proj", "v_proj", "o_proj"):
                yield path
