"""ReGLAConfig: Llama's argument names, the kind of every layer, and ReGLA's own choices."""

import difflib
import math
import os
from collections.abc import Collection
from dataclasses import asdict, field
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig

from regla.layers.defaults import DEFAULTS, Mixer
from regla.layers.feature_maps import FEATURE_MAPS, num_features
from regla.layers.gates import GATE_AXES, GATES, SPACINGS, check_gate_start, default_rank
from regla.layers.norms import NORMS
from regla.layers.recurrence import UPDATE_RULES, check_rule
from regla.layers.window import check_window
from regla.models.hub import AUTO_MAP, write_hub_module
from regla.ops.dispatch import BACKENDS
from regla.ops.features import KEY_MAX
from regla.ops.output_norm import ACTIVATIONS

#: The format of saved models (config.json and the names of the weights). Folders without a version are of version 1.
#: A version grows where an older regla would load a model and compute something else. What a later version leaves out
#: stands in REMOVED_OPTIONS and REMOVED_CHOICES, what it adds in NEW_OPTIONS.
FORMAT_VERSION = 3

#: Options of earlier versions: the value that changed nothing, with which a model still loads, and the last git
#: revision of regla that had the option.
REMOVED_OPTIONS: dict[str, tuple[Any, str]] = {"qk_temperature": (False, "e07f40d")}

#: Values that an option no longer takes, each with the last git revision of regla that knew it.
REMOVED_CHOICES: dict[tuple[str, str], str] = {("gate_half_life_over", "layers"): "e07f40d"}

#: Options that came with a version, with the value that changes nothing: where an older folder does not name them, it
#: means this value, whatever the default is by now.
NEW_OPTIONS: dict[int, dict[str, Any]] = {
    3: {
        "update_rule": "additive",
        "beta_max": 1.0,
        "linear_conv_activation": None,
        "gate_half_life": None,
        "gate_half_life_over": "channels",
        "softmax_rope": True,
        "window_branch": 0,
        "window_sinks": 0,
        "window_dropout": 0.0,
    }
}

LAYER_TYPES = ("linear_attention", "full_attention", "sliding_attention")


@strict
class ReGLAConfig(PreTrainedConfig):
    """Configuration of `ReGLAModel` and `ReGLAForCausalLM`.

    The arguments of `transformers.LlamaConfig` keep their names, defaults and meaning: vocab_size, hidden_size,
    intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads (None: as many as query heads),
    head_dim (None: hidden_size / num_attention_heads), hidden_act, max_position_embeddings, initializer_range,
    rms_norm_eps, use_cache, pad/bos/eos_token_id, tie_word_embeddings, rope_parameters, attention_bias,
    attention_dropout (softmax layers only), mlp_bias. ReGLA's own:

    Args:
        layer_types: one of "linear_attention" (ReGLA), "full_attention" (softmax with RoPE) and "sliding_attention"
            (softmax over a sliding window) for each layer; None makes every layer linear.
        sliding_window: of "sliding_attention" layers: a token attends to itself and the sliding_window - 1 tokens
            before it.
        update_rule: of the state, "additive" (the paper's) or "delta", which replaces what the state answers for a key.
        beta_max: of the delta rule: beta, the share of the old answer that is replaced, lies between 0 and this number,
            at most 2. Above 1 eigenvalues of the transition may be negative.
        feature_map: of queries and keys in linear layers; "safe_exp" is the paper's (section 3.1). The delta rule
            wants features of unit length, such as "unit_silu".
        gate: the forget gate; "refined" is the paper's (section 3.3), "refined_low_rank" the same with fewer
            parameters, "sigmoid" a plain one, "mamba2" Mamba-2's, with its start.
        gate_axis: the axis of the state that the gate decays, "value", "key" or "both" (docs/results/defaults.md: why),
            or "head": one number a head, for the whole of its state. The delta rule takes "key" and "head".
        feature_dim: features of a head, for the maps that leave a choice (`regla.layers.ReGLAAttention`); None: the
            map's own. "cosformer" reaches as far as max_position_embeddings.
        key_max: the stabiliser of the safe exponential, "decay", "running" or "sequence" (the paper's letter, not
            causal: it cannot be decoded token by token).
        attention_norm: the normalisation of the linear layers' output, per head (section 3.2).
        linear_rope: rotate queries and keys of linear layers too, before the feature map.
        linear_conv_kernel_dim: taps of the causal convolution on q, k and v of linear layers; 0 leaves it out.
        linear_conv_activation: None, "silu" or "sigmoid": behind that convolution.
        qk_norm: normalise q and k of linear layers, with a learnt gain.
        qk_calibration: shift and scale q and k of linear layers before the feature map; conversions set it from data.
        qk_initializer_range: standard deviation of the weights of q and k in linear layers at the start; None means
            initializer_range. hidden_size^-1/2 gives q and k unit variance.
        attention_out_bias: a bias on the output projection of attention, linear and softmax; None means as on q, k, v
            (attention_bias).
        output_gate: None, "silu" or "sigmoid": a gate on the normalised output of linear layers.
        value_head_dim: channels of one value head in linear layers; None means head_dim.
        gate_low_rank_dim: rank of low-rank gates; None means hidden_size / 8.
        gate_bias, refine_bias: where the biases of the forget gate and of the refine gate start.
        gate_half_life: where the forget gate starts, in tokens until half is forgotten; takes the place of gate_bias.
            A number for all channels alike; a pair [shortest, longest] is log-spaced over gate_half_life_over.
        gate_half_life_over: "channels" (of each head) or "heads" (all channels of a head alike).
        window_branch: tokens of a softmax attention beside the recurrence of linear layers, whose share each head
            learns; 0 for none. It has RoPE where linear_rope says so.
        window_sinks: first tokens of the text that it sees, too.
        window_dropout: how likely it is, in training, that a text goes without it.
        softmax_conv_kernel_dim, softmax_qk_norm, softmax_output_gate, softmax_output_norm: what linear layers have,
            for softmax layers: the convolution on q, k and v, the normalisation of q and k before RoPE, the gate on
            the output, the RMS norm of the output per head. All off, a softmax layer is Llama's.
        softmax_rope: rotate queries and keys of softmax layers; without, order comes from linear layers alone.
        backend: of the operation, "auto", "recurrent", "chunked", "native" or "triton".
        format_version: of saved models; set by the package.

    Raises:
        ValueError: a value that does not fit; the sentence names it, what is expected, and the fix.

    >>> config = ReGLAConfig(num_hidden_layers=4, layer_types=["linear_attention", "full_attention"] * 2)
    """

    model_type = "regla"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = DEFAULTS.norm_eps
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None
    attention_bias: bool = DEFAULTS.bias
    attention_dropout: int | float = 0.0
    mlp_bias: bool = False

    layer_types: list[str] | None = None
    sliding_window: int | None = None
    update_rule: str = DEFAULTS.update_rule
    beta_max: int | float = DEFAULTS.beta_max
    feature_map: str = DEFAULTS.feature_map
    feature_dim: int | None = None
    gate: str = DEFAULTS.gate
    gate_axis: str = DEFAULTS.gate_axis
    key_max: str = DEFAULTS.key_max
    attention_norm: str = DEFAULTS.norm
    linear_rope: bool = False
    linear_conv_kernel_dim: int = DEFAULTS.conv_size
    linear_conv_activation: str | None = DEFAULTS.conv_activation
    qk_norm: bool = DEFAULTS.qk_norm
    qk_calibration: bool = DEFAULTS.qk_calibration
    qk_initializer_range: int | float | None = None
    attention_out_bias: bool | None = None
    output_gate: str | None = DEFAULTS.output_gate
    value_head_dim: int | None = None
    gate_low_rank_dim: int | None = DEFAULTS.gate_low_rank_dim
    gate_bias: int | float = 0.0
    refine_bias: int | float = 0.0
    gate_half_life: int | float | list[int | float] | None = field(default_factory=lambda: _half_life(DEFAULTS))
    gate_half_life_over: str = DEFAULTS.gate_half_life_over
    window_branch: int = DEFAULTS.window_branch
    window_sinks: int = DEFAULTS.window_sinks
    window_dropout: int | float = DEFAULTS.window_dropout
    softmax_conv_kernel_dim: int = 0
    softmax_qk_norm: bool = False
    softmax_output_gate: str | None = None
    softmax_output_norm: bool = False
    softmax_rope: bool = True
    backend: str = DEFAULTS.backend
    format_version: int = FORMAT_VERSION

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.value_head_dim is None:
            self.value_head_dim = self.head_dim
        if self.gate_low_rank_dim is None:
            self.gate_low_rank_dim = default_rank(self.hidden_size)
        if self.attention_out_bias is None:
            self.attention_out_bias = self.attention_bias
        if self.layer_types is None:
            self.layer_types = ["linear_attention"] * self.num_hidden_layers
        self.format_version = checked_format(self.format_version)
        kwargs = _without_removed_options(kwargs)
        kwargs["auto_map"] = AUTO_MAP
        self.check()
        super().__post_init__(**kwargs)

    @property
    def num_features(self) -> int:
        """Features of a head of linear layers: the rows of its state."""
        assert self.head_dim is not None and self.value_head_dim is not None
        return num_features(self.feature_map, self.head_dim, self.value_head_dim, self.feature_dim)

    @property
    def uses_rope(self) -> bool:
        """Whether any layer rotates its queries and keys."""
        return self.linear_rope or (
            self.softmax_rope and any(kind != "linear_attention" for kind in self.layer_types or ())
        )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers; a folder of an older format means what its regla computed."""
        return super().from_dict(_as_written(config_dict), **kwargs)

    def check(self) -> None:
        """Raise a ValueError that names the first value that does not fit."""
        for name, known in KNOWN.items():
            value = getattr(self, name)
            if value not in known:
                if (name, value) in REMOVED_CHOICES:
                    raise ValueError(
                        f"{name} is {value!r}, which was removed after git revision {REMOVED_CHOICES[name, value]}: "
                        f"use regla of that revision, or one of {', '.join(map(repr, known))}"
                    )
                raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, known))}")
        for name in POSITIVE:
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} is {value}; expected a whole number above 0")
        if self.hidden_act not in ACT2FN:
            near = difflib.get_close_matches(self.hidden_act, ACT2FN, n=1, cutoff=0)
            raise ValueError(
                f"hidden_act is {self.hidden_act!r}; expected an activation of transformers such as {near[0]!r}"
            )
        for name in ("initializer_range", "rms_norm_eps"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} is {value}; expected a number from 0 on")
        assert self.layer_types is not None and self.num_key_value_heads is not None and self.head_dim is not None
        for index, kind in enumerate(self.layer_types):
            if kind not in LAYER_TYPES:
                expected = ", ".join(map(repr, LAYER_TYPES))
                raise ValueError(f"layer_types[{index}] is {kind!r}; expected one of {expected}")
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types has {len(self.layer_types)} entries; expected one for each of the "
                f"{self.num_hidden_layers} layers: change layer_types or num_hidden_layers"
            )
        if "sliding_attention" in self.layer_types and (self.sliding_window is None or self.sliding_window < 2):
            raise ValueError(
                f"sliding_window is {self.sliding_window}, but layer_types has 'sliding_attention'; expected a "
                "window of at least 2 tokens"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads is {self.num_attention_heads}; expected a multiple of num_key_value_heads = "
                f"{self.num_key_value_heads}, so that each key head serves whole groups of query heads"
            )
        for name in ("linear_conv_kernel_dim", "softmax_conv_kernel_dim"):
            taps = getattr(self, name)
            if taps < 0 or taps == 1:
                raise ValueError(f"{name} is {taps}; expected at least 2 taps, or 0 for none")
        if self.qk_initializer_range is not None and not 0 < self.qk_initializer_range < math.inf:
            raise ValueError(
                f"qk_initializer_range is {self.qk_initializer_range}; expected a number above 0, or None for "
                "initializer_range"
            )
        num_features(self.feature_map, self.head_dim, self.value_head_dim or self.head_dim, self.feature_dim)
        check_rule(
            self.update_rule,
            feature_map=self.feature_map,
            gate=GATES[self.gate],
            gate_axis=self.gate_axis,
            beta_max=self.beta_max,
        )
        check_window(self.window_branch, self.window_sinks, self.window_dropout)
        check_gate_start(
            GATES[self.gate],
            gate_axis=self.gate_axis,
            gate_bias=self.gate_bias,
            refine_bias=self.refine_bias,
            gate_half_life=self.gate_half_life,
            gate_half_life_over=self.gate_half_life_over,
        )
        if self.uses_rope and self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; RoPE turns pairs of channels: make it even")
        rotary = (self.rope_parameters or {}).get("partial_rotary_factor")
        if rotary not in (None, 1.0):
            raise ValueError(
                f"partial_rotary_factor in rope_parameters is {rotary}; heads are rotated as a whole: leave it out"
            )

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As in transformers; writes the module that `auto_map` names beside config.json."""
        super().save_pretrained(save_directory, *args, **kwargs)
        write_hub_module(save_directory)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Does nothing: registered, transformers would copy this file into saved folders, where it cannot run."""


KNOWN: dict[str, Collection[str | None]] = {  # the tables themselves, to which users may add
    "update_rule": UPDATE_RULES,
    "linear_conv_activation": [None, *ACTIVATIONS],
    "feature_map": FEATURE_MAPS,
    "gate": GATES,
    "gate_axis": [*GATE_AXES],
    "gate_half_life_over": [*SPACINGS],
    "key_max": [*KEY_MAX],
    "attention_norm": NORMS,
    "output_gate": [None, *ACTIVATIONS],
    "softmax_output_gate": [None, *ACTIVATIONS],
    "backend": ["auto", *BACKENDS],
}

POSITIVE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "value_head_dim",
    "gate_low_rank_dim",
)


def mixer_arguments(mixer: Mixer) -> dict[str, Any]:
    """The arguments of ReGLAConfig that make its linear layers this mixer."""
    arguments = asdict(mixer) | {"gate_half_life": _half_life(mixer)}
    return {_NAMES.get(name, name): value for name, value in arguments.items()}


_NAMES = {  # of options that models call otherwise than layers do
    "norm": "attention_norm",
    "norm_eps": "rms_norm_eps",
    "conv_size": "linear_conv_kernel_dim",
    "conv_activation": "linear_conv_activation",
    "bias": "attention_bias",
}


def _half_life(mixer: Mixer) -> int | float | list[int | float] | None:
    """As JSON has it."""
    return list(mixer.gate_half_life) if isinstance(mixer.gate_half_life, tuple) else mixer.gate_half_life


def checked_format(version: int) -> int:
    """The version that a config of this one is written in; a ValueError for one that this package does not know."""
    if version > FORMAT_VERSION:
        raise ValueError(
            f"format_version is {version}, and this regla reads models up to version {FORMAT_VERSION}; install a newer "
            "regla"
        )
    return FORMAT_VERSION


def _as_written(config: dict[str, Any]) -> dict[str, Any]:
    """The content of a config.json, and what it means by options that are newer than its format."""
    version = config.get("format_version", 1)
    for since, options in NEW_OPTIONS.items():
        if version < since:
            config = options | config
    return config


def _without_removed_options(options: dict[str, Any]) -> dict[str, Any]:
    """`options` less those that ReGLAConfig once had; a ValueError for one that was in use."""
    for name, (neutral, last) in REMOVED_OPTIONS.items():
        if name in options and options[name] != neutral:
            raise ValueError(
                f"{name} is {options[name]!r}, an option that was removed after git revision {last}: use regla of that "
                f"revision, or a model with {name}={neutral!r}"
            )
    return {name: value for name, value in options.items() if name not in REMOVED_OPTIONS}
