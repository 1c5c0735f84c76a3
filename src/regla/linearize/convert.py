"""From a pretrained softmax model to a student in its own class: configuration and weights."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from regla.layers.gates import GATES, NoGate
from regla.linearize.config import CONSTANT_HALF_LIFE, WINDOW_DROPOUT
from regla.linearize.transfer import check_transfer
from regla.models.families import FAMILIES, family_of, heads_of, projection, softmax_kinds
from regla.models.student import StudentAttention, linear_attention, student_class
from regla.models.student_configuration import MIXER, MODEL_TYPE_PREFIX, student_config_class
from regla.models.window_attention import SINKS
from regla.runtime.errors import OptionError


def check_family(original: PreTrainedConfig) -> None:
    """Raise ValueError unless a row of `FAMILIES` describes the model of this configuration."""
    kind = original.model_type
    if kind == "regla" or kind.startswith(MODEL_TYPE_PREFIX):
        raise OptionError(
            "the model is of type {kind!r} already; give its original, and this folder with {init}, to go on from "
            "there",
            kind=kind,
        )
    if kind not in FAMILIES:
        raise ValueError(f"the model is of type {kind!r}; conversion supports {', '.join(map(repr, FAMILIES))}")
    refused = FAMILIES[kind].refused(original)
    if refused is not None:
        raise ValueError(f"{refused} in the configuration of the model; conversion supports causal attention alone")


def layer_types(kinds: int | Sequence[str], keep: str | Iterable[int]) -> list[str]:
    """The kind of each layer, from the ones that keep softmax attention.

    Args:
        kinds: of the layers of the original, "full_attention" or "sliding_attention"; a number of layers: all full.
        keep: "none", "all", "every-N" (every N-th layer: N-1, 2N-1, ...), "sliding" (those with a sliding window), or
            the layers' numbers from 0, as a list or as text such as "0,7,14".

    Raises:
        ValueError: another word, N below 2, or a layer that is not there.
    """
    kinds = ["full_attention"] * kinds if isinstance(kinds, int) else list(kinds)
    kept = _kept(kinds, keep) if isinstance(keep, str) else set(keep)
    missing = sorted(kept - set(range(len(kinds))))
    if missing:
        raise OptionError(
            "{keep} names layer {layer}; the model has layers 0 to {last}", layer=missing[0], last=len(kinds) - 1
        )
    return [kind if i in kept else "linear_attention" for i, kind in enumerate(kinds)]


def linear_numbers(original: PreTrainedConfig, keep: str | Iterable[int]) -> list[int]:
    """The layers of an original that become linear, see `layer_types`."""
    kinds = layer_types(softmax_kinds(original), keep)
    return [i for i, kind in enumerate(kinds) if kind == "linear_attention"]


def _kept(kinds: Sequence[str], keep: str) -> set[int]:
    if keep in ("none", "all"):
        return set(range(len(kinds))) if keep == "all" else set()
    if keep == "sliding":
        return {i for i, kind in enumerate(kinds) if kind == "sliding_attention"}
    rule, _, number = keep.partition("-")
    if rule == "every" and number.isdecimal() and int(number) >= 2:
        return set(range(int(number) - 1, len(kinds), int(number)))
    numbers = [number.strip() for number in keep.split(",")]
    if not all(number.isdecimal() for number in numbers):
        raise OptionError(
            "{keep} is {value!r}; expected 'none', 'every-N' with N of at least 2, 'sliding', 'auto:N' or 'auto:P%', "
            "'all', or layer numbers such as '0,7,14'",
            value=keep,
        )
    return {int(number) for number in numbers}


def chosen_count(keep: str, layers: int) -> int:
    """How many layers of so many "auto:N" or "auto:P%" keeps.

    Raises:
        ValueError: text of another form, no layer, or all of them.
    """
    match = re.fullmatch(r"auto:(\d+(?:\.\d+)?)(%?)", keep)
    if match is None or ("." in match[1] and not match[2]):
        raise OptionError("{keep} is {value!r}; expected a number of layers or a share, auto:7 or auto:25%", value=keep)
    count = round(float(match[1]) / 100 * layers) if match[2] else int(match[1])
    if not 0 < count < layers:
        raise OptionError(
            "{keep} {value} keeps {count} of {layers} layers; expected 1 to {most}",
            value=keep,
            count=count,
            layers=layers,
            most=layers - 1,
        )
    return count


def converted_config(original: PreTrainedConfig, keep: str | Iterable[int] = "every-2", **mixer: Any) -> Any:
    """The configuration of the student, see `convert`; derived from the original's, nothing from defaults."""
    gate = GATES.get(mixer.get("gate", MIXER["gate"]), NoGate)
    if not ({"gate_bias", "gate_half_life"} & mixer.keys() or gate.starts_itself or issubclass(gate, NoGate)):
        mixer |= {"gate_half_life": CONSTANT_HALF_LIFE}
    if mixer.get("window_branch"):
        mixer = {"window_sinks": SINKS, "window_dropout": WINDOW_DROPOUT} | mixer
    return _student_config(original, linear_layers=linear_numbers(original, keep), mixer=mixer)


def windowed_config(original: PreTrainedConfig, keep: str | Iterable[int], window: int) -> Any:
    """The configuration of the baseline without training: layers that are not kept attend to the last `window` tokens
    and the first few (`regla.models.window_attention`). Layers with a window of their own keep that."""
    kinds = softmax_kinds(original)
    layers = [number for number in linear_numbers(original, keep) if kinds[number] == "full_attention"]
    return _student_config(original, windowed={"layers": layers, "window": window, "sinks": SINKS})


def _student_config(original: PreTrainedConfig, **own: Any) -> Any:
    check_family(original)
    config_class = student_config_class(cast(Any, type(original)))
    theirs = {name: value for name, value in original.to_dict().items() if name not in _OF_ITS_FILE}
    shared = sorted(own.get("mixer", {}).keys() & theirs.keys())
    if shared:
        raise ValueError(f"{shared[0]} is the original's and cannot be set anew; leave it out")
    if theirs.get("pad_token_id") is not None and theirs["pad_token_id"] < 0:
        theirs["pad_token_id"] = None  # how some checkpoints say that there is none
    return config_class.from_dict(theirs | own)


_OF_ITS_FILE = ("model_type", "architectures", "transformers_version", "_name_or_path", "quantization_config")


def convert(
    model: PreTrainedModel, keep: str | Iterable[int] = "every-2", *, check: bool = True, **mixer: Any
) -> PreTrainedModel:
    """Put ReGLA into the layers of a pretrained model, with the pretrained weights.

    The result is a student, in a subclass of the original's class. Embeddings, norms, MLPs, positions, the head, and
    the projections q, k, v, o (with their biases and norms) are the original's; key and value heads that groups of
    query heads share stay shared, whole heads each: such a group shares a state. New are the gates, the calibration of
    q and k and the output norms, which start as `regla.layers.init_linear_attention` says;
    `regla.linearize.calibrate` fits the latter two to data.

    Args:
        model: a causal language model of a supported family (`regla.linearize.FAMILIES`), its weights not quantised.
        keep: the layers that keep softmax attention, see `layer_types`.
        check: prove the transfer before returning (`check_transfer`, relative difference of logits at most 1e-4).
        mixer: options of the new layers, such as gate_axis="key" (`regla.models.student_configuration.MIXER`). With a
            window_branch, window_sinks is 4 and window_dropout WINDOW_DROPOUT unless given.

    Returns:
        A new model in the dtype and on the device of the original, sharing none of its memory. Its generation config
        is the original's less the flags without effect.

    Raises:
        ValueError: unsupported architecture; layers that are not there; arguments that do not fit; a failed check.
    """
    student = make_student_of(model, converted_config(model.config, keep, **mixer))
    if check:
        check_transfer(model, student)
    return student


def make_student_of(model: PreTrainedModel, config: Any) -> PreTrainedModel:
    """The student of this configuration with the weights of its original."""
    original_class = cast(Any, AutoModelForCausalLM)._model_mapping[type(model.config)]
    student = with_weights(model, student_class(original_class), config)
    student.generation_config = _generation_config(model)
    return student.train(model.training)


def with_weights(source: PreTrainedModel, student_class: Any, config: Any) -> PreTrainedModel:
    """A student with the weights of its original, or of a student with fewer linear layers.

    It is on the device of `source` and in its dtype.

    Raises:
        ValueError: a weight that has no place, or none for a place.
    """
    with no_init_weights():  # drawing those that are loaded takes longer than all else
        student = student_class._from_config(
            config, dtype=source.dtype, attn_implementation=source.config._attn_implementation
        )
    student.tie_weights()
    for attention in linear_attention(student).values():
        student.base_model._init_weights(attention.mixer)
    student = student.to(source.device)
    family = family_of(student.config)
    weights = dict(source.state_dict())
    paths = {module: path for path, module in student.named_modules() if isinstance(module, StudentAttention)}
    for number, attention in linear_attention(student).items():
        theirs = family.attention_of(source, number)
        if isinstance(theirs, StudentAttention):
            continue
        path = paths[attention]
        replaced = {name for name in weights if name.startswith(f"{path}.")}
        moved = dict(mixer_weights(theirs, student.config))
        counts = sum(weights.pop(name).numel() for name in replaced), sum(value.numel() for value in moved.values())
        if counts[0] != counts[1]:
            raise ValueError(
                f"{path} holds {counts[0]} weights and its family has {counts[1]} there; convert only unmodified models"
            )
        weights |= {f"{path}.mixer.{name}": value for name, value in moved.items()}
    missing, unexpected = student.load_state_dict(weights, strict=False)
    lacking = set(missing) - set(own_parameters(student))
    if unexpected or lacking:
        name = (unexpected or sorted(lacking))[0]
        raise ValueError(
            f"parameter {name} is in one model and not in the other; the original differs from its family "
            f"{student.config.original_model_type!r}: convert only unmodified models"
        )
    return student


def mixer_weights(attention: Any, config: Any) -> Iterator[tuple[str, Tensor]]:
    """Weights of a mixer by name, from an original's attention module."""
    family = family_of(config)
    projections = [*family.qkv(attention, heads_of(config)), projection(attention.get_submodule(family.out))]
    for letter, (weight, bias) in zip("qkvo", projections, strict=True):
        yield f"{letter}_proj.weight", weight
        if bias is not None:
            yield f"{letter}_proj.bias", bias
    if family.norm is not None:
        for letter in "qk":
            for name, weight in attention.get_submodule(f"{letter}_norm").state_dict().items():
                yield f"{letter}_norm.original.{name}", weight


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


def own_parameters(student: PreTrainedModel) -> Iterator[str]:
    """Paths of the mixers' parameters that a softmax layer does not have."""
    theirs = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
    for path, module in student.named_modules():
        if isinstance(module, StudentAttention):
            mixer = module.mixer
            for name, _ in (*mixer.named_parameters(), *mixer.feature_map.named_buffers("feature_map")):
                if name.partition(".")[0] not in theirs:
                    yield f"{path}.mixer.{name}"
