"""The model of a training run: its configuration, its size, and equal sizes for different mixers.

ReGLA's layer has parameters that plain softmax attention lacks (gates, output gate, short convolution), and softmax
attention with extras has more of its own. So that mixers compare at equal parameters, a model takes them out of its
MLP.
"""

from __future__ import annotations

import copy
import difflib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regla.runtime.files import brief
from regla.runtime.reading import read_json
from regla.train.config import DEFAULT_SOFTMAX_EVERY, DEFAULT_WINDOW, TrainConfig

if TYPE_CHECKING:
    from regla.models.configuration import ReGLAConfig

_WIDTH_MULTIPLES = (8, 1)  # of the MLP width: what GPUs like, then what a very small model needs
_PARAMETER_TOLERANCE = 0.005


def read_overrides(file: str | Path) -> dict[str, Any]:
    """Arguments of ReGLAConfig in a JSON file, by name."""
    overrides = read_json(file, "a JSON file")
    if not isinstance(overrides, dict):
        raise ValueError(
            f'{file} holds a JSON {type(overrides).__name__}, expected an object such as {{"qk_norm": true}}.'
        )
    return overrides


def layer_types(mixer: str, layers: int, softmax_every: int | None = None, *, window: bool = False) -> list[str]:
    """The mixer of each layer, in the configuration's words. Of every `softmax_every` layers of a hybrid the last is
    softmax, over a sliding window or over all of the text."""
    linear_in_between = (softmax_every or DEFAULT_SOFTMAX_EVERY) - 1
    softmax = "sliding_attention" if window else "full_attention"
    pattern = {
        "regla": ["linear_attention"],
        "paper": ["linear_attention"],
        "hybrid": [*["linear_attention"] * linear_in_between, softmax],
        "softmax": ["full_attention"],
        "window": ["sliding_attention"],
    }[mixer]
    return [pattern[layer % len(pattern)] for layer in range(layers)]


def model_config(config: TrainConfig, *, vocab_size: int, end_of_text: int) -> ReGLAConfig:
    """The model that `config` asks for, before any MLP is narrowed.

    Raises ValueError for an override that ReGLAConfig does not know, naming the nearest one, or that does not fit.
    """
    from regla.layers.defaults import PAPER
    from regla.models.configuration import mixer_arguments

    check_overrides(config.overrides)
    window = config.window or (DEFAULT_WINDOW if config.mixer == "window" else None)
    arguments: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size or _default_width(config.hidden_size),
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads or config.heads,
        "head_dim": config.head_dim or config.hidden_size // config.heads,
        "max_position_embeddings": config.seq_len,
        "tie_word_embeddings": True,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "pad_token_id": end_of_text,
        "layer_types": layer_types(config.mixer, config.layers, config.softmax_every, window=window is not None),
        "sliding_window": window,
    }
    if config.mixer == "paper":
        arguments |= mixer_arguments(PAPER)
    arguments |= config.overrides
    if arguments["vocab_size"] < vocab_size:
        raise ValueError(
            f"vocab_size is {arguments['vocab_size']}, but the largest id of the tokenizer is {vocab_size - 1}; "
            "leave it out of --config or raise it."
        )
    return checked_config(**arguments)


def checked_config(**arguments: Any) -> ReGLAConfig:
    """ReGLAConfig; a value of the wrong type, or one that no model can be built from, is a ValueError, too."""
    from huggingface_hub.errors import StrictDataclassError

    from regla.models.configuration import ReGLAConfig

    try:
        config = ReGLAConfig(**arguments)
    except (StrictDataclassError, TypeError, AttributeError) as error:
        raise ValueError(f"The configuration does not fit: {' '.join(str(error).split())}.") from error
    count_parameters(config)
    return config


def match_softmax(config: ReGLAConfig) -> tuple[ReGLAConfig, int]:
    """`config`, its MLP narrowed to the size of the plain softmax model of its shape, and the parameters of that."""
    plain = copy.deepcopy(config)
    plain.layer_types = layer_types("softmax", config.num_hidden_layers)
    plain.softmax_conv_kernel_dim, plain.softmax_output_gate = 0, None
    plain.softmax_qk_norm = plain.softmax_output_norm = False
    target = count_parameters(plain)
    return (config if count_parameters(config) == target else equal_parameters(config, target)), target


def count_parameters(config: ReGLAConfig) -> int:
    """Parameters of a model of `config`, tied ones once; builds it without memory for its weights, each only once.

    Raises:
        ValueError: no model can be built from `config`.
    """
    import torch

    from regla.models.modeling import ReGLAForCausalLM

    try:
        key = config.to_json_string(use_diff=False)
        if key not in _counts:
            with torch.device("meta"):
                model = ReGLAForCausalLM(config)
            _counts[key] = sum(parameter.numel() for parameter in model.parameters())
    except Exception as error:  # whatever transformers and PyTorch raise for values that nobody checked before
        raise ValueError(f"The configuration does not fit, no model can be built from it ({brief(error)}).") from error
    return _counts[key]


_counts: dict[str, int] = {}  # by the configuration: a study asks for the same ones many times


def equal_parameters(config: ReGLAConfig, target: int) -> ReGLAConfig:
    """A copy of `config` with the MLP width that brings its parameter count nearest to `target`.

    The width is a multiple of 8, or any number where a multiple of 8 misses `target` by more than 0.5 %. Raises
    ValueError where no width comes as near, that is where the model without its MLP is larger already.
    """
    narrow, wide = (count_parameters(_with_width(config, width)) for width in (8, 16))
    per_width = (wide - narrow) / 8  # the count is linear in the width
    for multiple in _WIDTH_MULTIPLES:
        width = multiple * round(((target - narrow) / per_width + 8) / multiple)
        if width > 0 and abs(narrow + per_width * (width - 8) - target) <= _PARAMETER_TOLERANCE * target:
            return _with_width(config, width)
    raise ValueError(
        f"No MLP width gives this model {target:,} parameters within 0.5 % (with width 8 it has {narrow:,}); "
        "raise --intermediate-size."
    )


def _with_width(config: ReGLAConfig, width: int) -> ReGLAConfig:
    resized = copy.deepcopy(config)
    resized.intermediate_size = width
    return resized


def _default_width(hidden_size: int) -> int:
    """8/3 of the hidden size, the width at which a gated MLP has the parameters of a plain one four times as wide."""
    return 8 * max(1, round(hidden_size / 3))


def check_overrides(overrides: Mapping[str, Any]) -> None:
    """Raise a ValueError for a name that is no argument of ReGLAConfig, naming the nearest one."""
    from regla.models.configuration import ReGLAConfig

    known = set(inspect.signature(ReGLAConfig.__init__).parameters) - {"self", "kwargs"}
    for key in overrides:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0)
            raise ValueError(f"Unknown configuration key {key!r}; the nearest known one is {near[0]!r}.")
