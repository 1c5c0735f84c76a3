"""Cache layers for ReGLA states inside transformers' own DynamicCache and StaticCache.

transformers builds its `LinearAttentionLayer` for every "linear_attention" layer of a config. That layer counts no
tokens, so a model without softmax layers has no `get_seq_length`; it copies states in place, which breaks gradients
across calls; and it can neither repeat nor select batch rows. `adopt_cache` puts the layers below in its place, in the
one cache it is given: other models of the process keep theirs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    StaticCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast

from regla.layers.attention import ReGLAState
from regla.models.configuration import ReGLAConfig

# Slots of `recurrent_states`; the convolution's state is slot 0 of `conv_states`.
S_SLOT, M_SLOT, WINDOW_SLOT, SEEN_SLOT = SLOTS = 0, 1, 2, 3


#: What transformers calls the cache among arguments and results: "cache" since 5.24. Models take both names.
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


def one_cache(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    """The cache given under one of its two names; a ValueError if both are given."""
    if past_key_values is not None and cache is not None:
        raise ValueError("cache and past_key_values are both given, two names of one thing; pass one of them")
    return cache if past_key_values is None else past_key_values


class ReGLACacheLayer(LinearAttentionLayer, CacheLayerMixin):
    """The state (S, m, conv, window, seen) of one linear layer and the number of tokens it has seen.

    Its size does not depend on that number. S and m are float32 whatever the model's dtype. A new state replaces the
    old tensors, so gradients flow through any number of calls; the decode kernel, which knows no gradients, overwrites
    them.
    """

    is_compileable = False  # the token count is a Python number, as in transformers' DynamicLayer

    def __init__(self) -> None:
        CacheLayerMixin.__init__(self)
        LinearAttentionLayer.__init__(self, number_of_states=len(SLOTS))
        self.cumulative_length: int | Tensor = 0

    def read(self) -> ReGLAState | None:
        """The state after the tokens seen so far; None before the first."""
        S, m, window, seen = (self.recurrent_states[slot] for slot in SLOTS)
        return None if S is None or m is None else ReGLAState(S, m, self.conv_states[0], window, seen)

    def write(self, state: ReGLAState, num_tokens: int) -> None:
        """Take over the state after `num_tokens` more tokens (padding counts, as it does in a key-value cache)."""
        self.dtype, self.device = state.S.dtype, state.S.device
        self._store(state._replace(conv=None if state.conv is None else _owned(state.conv, self.conv_states[0])))
        self.has_previous_state = dict.fromkeys((S_SLOT, M_SLOT), True)
        self.is_initialized = True
        self._count(num_tokens)

    def get_seq_length(self) -> int | Tensor:
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that softmax layers of the same model see."""
        return int(self.cumulative_length) + query_length, 0

    def get_max_length(self) -> int:
        return -1  # any number of tokens fits

    def reset(self) -> None:
        """Forget all tokens."""
        self.__init__()  # type: ignore[misc]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the batch rows `indices` [N'], in this order."""
        self._apply(lambda state: state.index_select(0, indices.to(state.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every batch row `repeats` times."""
        self._apply(lambda state: state.repeat_interleave(repeats, dim=0))

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError(
            f"crop({tokens_to_remove}) was asked of a linear layer's cache, whose state sums up all tokens; "
            "to take tokens back, keep a copy of the cache from before them"
        )

    def update(self, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        raise ValueError(
            "keys and values were given to a linear layer's cache; make a cache of this model's own config"
        )

    def _apply(self, function: Callable[[Tensor], Tensor]) -> None:
        state = self.read()
        if state is not None:
            self._store(state.each(function))

    def _store(self, new: ReGLAState) -> None:
        old = self.read() or (None,) * len(new)
        S, m, conv, window, seen = (None if n is None else self._replace(o, n) for o, n in zip(old, new, strict=True))
        self.recurrent_states = {S_SLOT: S, M_SLOT: m, WINDOW_SLOT: window, SEEN_SLOT: seen}
        self.is_recurrent_states_initialized = {slot: x is not None for slot, x in self.recurrent_states.items()}
        self.conv_states[0] = conv
        self.is_conv_states_initialized[0] = conv is not None

    def _replace(self, old: Tensor | None, new: Tensor) -> Tensor:
        return new

    def _count(self, num_tokens: int) -> None:
        self.cumulative_length += num_tokens


class ReGLAStaticCacheLayer(ReGLACacheLayer):
    """The same at fixed addresses, for compiled decoding: states and token count are tensors written in place.

    A state that takes part in a gradient is still replaced, not overwritten.
    """

    is_compileable = True

    def __init__(self, max_cache_len: int) -> None:
        super().__init__()
        self.max_cache_len = max_cache_len
        # A tensor, since a changing Python number would recompile the model at every token.
        self.cumulative_length: Tensor = torch.zeros((), dtype=torch.long)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.max_cache_len, 0

    def reset(self) -> None:
        self._apply(torch.zeros_like)  # zeros are an empty state
        self.has_previous_state = dict.fromkeys((S_SLOT, M_SLOT), False)
        self.cumulative_length.zero_()

    def _replace(self, old: Tensor | None, new: Tensor) -> Tensor:
        if new is old or new.requires_grad or (old is not None and old.requires_grad):
            return new
        if old is None or old.shape != new.shape:
            old = _at_fixed_address(torch.empty_like(new))
        return old.copy_(new)

    def _count(self, num_tokens: int) -> None:
        assert self.device is not None
        if self.cumulative_length.device != self.device:
            self.cumulative_length = _at_fixed_address(self.cumulative_length.to(self.device))
        self.cumulative_length.add_(num_tokens)


class SoftmaxCacheLayer(DynamicLayer):
    """transformers' layer, but `reset` forgets: in 5.17 it leaves zeros that count as tokens."""

    def reset(self) -> None:
        self.__init__()  # type: ignore[misc]


class SlidingCacheLayer(DynamicSlidingWindowLayer):
    """The last `sliding_window - 1` keys and values; `reset` forgets, as above."""

    def reset(self) -> None:
        self.__init__(self.sliding_window)  # type: ignore[misc]


class ConvCacheLayer(CacheLayerMixin):
    """Part of a softmax layer's cache: the last inputs of its short convolution beside the keys and values."""

    conv_state: Tensor | None = None  # [B, taps - 1, channels]; None before the first token

    def write_conv_state(self, new: Tensor) -> None:
        self.conv_state = _owned(new, self.conv_state)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self._apply_conv(lambda state: state.index_select(0, beam_idx.to(state.device)))

    def _apply_conv(self, function: Callable[[Tensor], Tensor]) -> None:
        if self.conv_state is not None:
            self.write_conv_state(function(self.conv_state))


class DynamicConvCacheLayer(ConvCacheLayer):
    """Part of a cache of any length."""

    is_croppable = False  # the inputs before the last few tokens are gone

    def reset(self) -> None:
        super().reset()
        self.conv_state = None

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._apply_conv(lambda state: state.index_select(0, indices.to(state.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._apply_conv(lambda state: state.repeat_interleave(repeats, dim=0))

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError(
            f"crop({tokens_to_remove}) was asked of the cache of a softmax layer with a convolution, whose earlier "
            "inputs are gone; to take tokens back, keep a copy of the cache from before them"
        )


class SoftmaxConvCacheLayer(DynamicConvCacheLayer, SoftmaxCacheLayer):
    """Keys, values and the convolution's state, growing."""


class SlidingConvCacheLayer(DynamicConvCacheLayer, SlidingCacheLayer):
    """The last `sliding_window - 1` keys and values, and the convolution's state."""


class StaticConvCacheLayer(ConvCacheLayer):
    """The same at fixed addresses, written in place."""

    def write_conv_state(self, new: Tensor) -> None:
        if self.conv_state is None or self.conv_state.shape != new.shape:
            self.conv_state = _at_fixed_address(torch.empty_like(new))
        if self.conv_state is not new:
            self.conv_state.copy_(new)

    def reset(self) -> None:
        super().reset()
        if self.conv_state is not None:
            self.conv_state.zero_()  # zeros are an empty state


class SoftmaxConvStaticCacheLayer(StaticConvCacheLayer, StaticLayer):
    """Keys, values and the convolution's state."""


class SlidingConvStaticCacheLayer(StaticConvCacheLayer, StaticSlidingWindowLayer):
    """Those of a window."""


def cache_bytes(cache: Cache) -> int:
    """Bytes of everything a cache holds: states of linear layers, keys and values of softmax layers."""
    return sum(tensor.numel() * tensor.element_size() for layer in cache.layers for tensor in _tensors(layer))


def expected_cache_bytes(config: ReGLAConfig, tokens: int, element_bytes: int = 2) -> int:
    """Bytes that one sequence of `tokens` leaves behind: keys and values of softmax layers (`element_bytes` each, 2 for
    bfloat16), and the float32 states (S [H, F, V], m [H]) of linear ones, whatever their length, with the keys and
    values of their window branch and the 8-byte count of tokens that goes with them. Convolutions are left out."""
    assert config.layer_types is not None and config.num_key_value_heads and config.head_dim and config.value_head_dim
    state = 4 * config.num_key_value_heads * (config.num_features * config.value_head_dim + 1)
    if config.window_branch:
        kept_tokens = config.window_sinks + config.window_branch - 1
        channels = config.head_dim + config.value_head_dim
        state += config.num_key_value_heads * kept_tokens * channels * element_bytes + 8
    keys_and_values = 2 * config.num_key_value_heads * config.head_dim * element_bytes
    kept = {"linear_attention": 0, "full_attention": tokens}
    if config.sliding_window is not None:
        kept["sliding_attention"] = min(tokens, config.sliding_window - 1)
    return sum(state if kind == "linear_attention" else keys_and_values * kept[kind] for kind in config.layer_types)


def _tensors(layer: Any) -> list[Tensor]:
    parts = layer.read() if isinstance(layer, ReGLACacheLayer) else (layer.keys, layer.values)
    return [x for x in (*(parts or ()), getattr(layer, "conv_state", None)) if x is not None]


def adopt_cache(cache: Cache, config: ReGLAConfig) -> None:
    """Make `cache` able to hold this model's states, in place.

    Raises:
        ValueError: not a transformers Cache, or one that another model has used or was made for.
    """
    if not isinstance(cache, Cache):
        raise ValueError(
            f"past_key_values is a {type(cache).__name__}; expected a cache of transformers: "
            "DynamicCache(config=model.config)"
        )
    assert config.layer_types is not None
    if cache.layer_class_to_replicate is not None:  # made without a config: its layers would appear one by one
        while len(cache.layers) < len(config.layer_types):
            cache.layers.append(cache.layer_class_to_replicate())
    if len(cache.layers) != len(config.layer_types):
        raise ValueError(
            f"past_key_values has {len(cache.layers)} layers and the model {len(config.layer_types)}; "
            "make the cache of this model's config: DynamicCache(config=model.config)"
        )
    for index, kind in enumerate(config.layer_types):
        layer = cache.layers[index]
        if kind == "full_attention":
            if config.softmax_conv_kernel_dim:
                cache.layers[index] = _with_conv_state(layer, index)
            elif type(layer) is DynamicLayer and not layer.is_initialized:
                cache.layers[index] = SoftmaxCacheLayer()
            continue
        if kind == "sliding_attention":
            cache.layers[index] = _with_window(layer, index, config)
            continue
        if isinstance(layer, ReGLACacheLayer):
            continue
        used = [
            getattr(layer, "is_initialized", False),
            *getattr(layer, "is_recurrent_states_initialized", {}).values(),
        ]
        if any(used):
            raise ValueError(
                f"layer {index} of past_key_values, a {type(layer).__name__}, already holds another model's states; "
                "make a new cache: DynamicCache(config=model.config)"
            )
        if isinstance(cache, StaticCache):
            cache.layers[index] = ReGLAStaticCacheLayer(cache.get_max_length())
        else:
            cache.layers[index] = ReGLACacheLayer()


def fork_cache(cache: Cache, rows: Sequence[int] | Tensor) -> Cache:
    """A new cache whose batch row i is row `rows[i]` of `cache`, which stays as it is.

    Rows may repeat, change their order and be left out: one prefix continues in several ways, or some of several
    prefixes do. The copy is exact. Any model of transformers may own the cache, hybrids included.

    Args:
        cache: a DynamicCache that a model has filled.
        rows: int [N'], each from 0 to the cache's batch size - 1.

    Raises:
        ValueError: a static cache, whose tensors have one batch size, or a row that the cache has not.

    Example:
        cache = model(prefix_1T).past_key_values
        logits_3T = model(continuations_3T, past_key_values=fork_cache(cache, [0, 0, 0])).logits
    """
    if not isinstance(cache, Cache) or isinstance(cache, StaticCache):
        raise ValueError(f"cache is a {type(cache).__name__}, which cannot be forked; expected a DynamicCache")
    index = torch.as_tensor(rows, dtype=torch.long)
    if not (batch_size := rows_of(cache)):
        raise ValueError("cache is empty, so it has no rows to fork; give it to the model with some tokens first")
    if index.ndim != 1 or not len(index) or int(index.min()) < 0 or int(index.max()) >= batch_size:
        raise ValueError(
            f"rows is {index.tolist()}; expected a list of batch rows of the cache, each from 0 to {batch_size - 1}"
        )
    fork = copy.copy(cache)
    fork.layers = [_fork_layer(layer, index) for layer in cache.layers]
    return fork


def _fork_layer(layer: CacheLayerMixin, rows: Tensor) -> CacheLayerMixin:
    fork = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, dict):  # the states of linear layers, which a layer exchanges in its dict
            setattr(fork, name, dict(value))
    fork.reorder_cache(rows)  # type: ignore[arg-type]  # selects rows, which need not be as many as before
    return fork


def rows_of(cache: Cache) -> int:
    """The batch size of what a cache holds; 0 if it is empty."""
    for layer in cache.layers:
        for part in (getattr(layer, "keys", None), *getattr(layer, "recurrent_states", {}).values()):
            if part is not None and part.numel():
                return len(part)
    return 0


def _with_conv_state(layer: object, index: int) -> ConvCacheLayer:
    """A layer in the place of `layer` that can hold a convolution's state, or `layer` if it can already."""
    if isinstance(layer, ConvCacheLayer):
        return layer
    kind = type(layer)
    if isinstance(layer, DynamicLayer) and kind in (DynamicLayer, SoftmaxCacheLayer) and not layer.get_seq_length():
        return SoftmaxConvCacheLayer()
    if isinstance(layer, StaticLayer) and kind is StaticLayer and not layer.get_seq_length():
        static = SoftmaxConvStaticCacheLayer(layer.max_cache_len)
        if layer.keys is not None and layer.values is not None:  # allocated ahead of the first token
            static.lazy_initialization(layer.keys[:, :, :0], layer.values[:, :, :0])
        return static
    raise ValueError(
        f"layer {index} of past_key_values, a {kind.__name__}, cannot hold the state of a softmax layer's convolution, "
        "or is in use; make a new cache: DynamicCache(config=model.config)"
    )


def _with_window(layer: object, index: int, config: ReGLAConfig) -> object:
    """`layer` if it keeps the window of this model, or one that does in the place of an unused one."""
    window, with_conv = config.sliding_window, bool(config.softmax_conv_kernel_dim)
    assert window is not None
    if isinstance(layer, SlidingConvCacheLayer if with_conv else SlidingCacheLayer):
        if layer.sliding_window == window:
            return layer
    elif isinstance(layer, DynamicLayer) and not layer.get_seq_length():
        return SlidingConvCacheLayer(window) if with_conv else SlidingCacheLayer(window)
    elif isinstance(layer, StaticSlidingWindowLayer) and layer.max_cache_len <= window:
        if isinstance(layer, ConvCacheLayer) == with_conv:
            return layer
        if with_conv and not layer.get_seq_length():
            static = SlidingConvStaticCacheLayer(layer.max_cache_len, window)
            if layer.keys is not None and layer.values is not None:  # allocated ahead of the first token
                static.lazy_initialization(layer.keys[:, :, :0], layer.values[:, :, :0])
            return static
    raise ValueError(
        f"layer {index} of past_key_values, a {type(layer).__name__}, does not keep a window of {window} tokens, or is "
        "in use; make a new cache: DynamicCache(config=model.config)"
    )


def _owned(new: Tensor, old: Tensor | None) -> Tensor:
    """A convolution's new state for a cache that holds `old`, which may have been overwritten with it."""
    # Otherwise it may be a view of the inputs of the whole call, which it would keep alive.
    return new if new is old else new.clone()


def _at_fixed_address(tensor: Tensor) -> Tensor:
    # CUDA graphs skip copying inputs whose address is marked as fixed; marking is impossible while tracing.
    if not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(tensor)
    return tensor
