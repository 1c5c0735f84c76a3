"""Masks, positions and packing: what `forward` is given, in the form the layers take.

Shapes: B batch, T tokens of this call, L columns of an attention mask (tokens in the cache plus T), N documents.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, StaticCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from regla.models.cache import CACHE, adopt_cache, one_cache
from regla.models.configuration import ReGLAConfig
from regla.ops.call import owners

LayerMasks = dict[str, Tensor | None]

_SOFTMAX_MASKS = {
    "full_attention": create_causal_mask,
    "sliding_attention": create_sliding_window_causal_mask,
}


def layer_masks(
    config: ReGLAConfig,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    past_key_values: Cache | None = None,
    position_ids: Tensor | None = None,
    *,
    cache: Cache | None = None,
    **kwargs: Any,
) -> LayerMasks:
    """The mask of each layer type: [B, T] bool of real tokens for "linear_attention", causal for "full_attention",
    causal within the window for "sliding_attention". A convolution in softmax layers needs the former, too.

    Restarting position_ids make the causal mask block-diagonal, if there is neither mask nor cache.
    """
    past_key_values = one_cache(past_key_values, cache)
    if attention_mask is not None and attention_mask.ndim != 2:
        raise ValueError(
            f"attention_mask has {attention_mask.ndim} dimensions; linear layers need to know which tokens are real: "
            "pass [B, past + T], 0 for padding"
        )
    assert config.layer_types is not None
    masks: LayerMasks = {}
    if "linear_attention" in config.layer_types or config.softmax_conv_kernel_dim:
        masks["linear_attention"] = attention_mask
        if attention_mask is not None:
            columns = current_columns(attention_mask, past_key_values, inputs_embeds.shape[1])
            masks["linear_attention"] = columns.to(device=inputs_embeds.device, dtype=torch.bool)
    for kind, create in _SOFTMAX_MASKS.items():
        if kind in config.layer_types:
            masks[kind] = create(
                config=config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                **{CACHE: past_key_values},
            )
    return masks


def masks_for_generate(*args: Any, **kwargs: Any) -> LayerMasks:
    """`layer_masks`, that of linear layers as [B, 1, T, 1].

    Replaces transformers' `create_masks_for_generate`, which leaves this mask out when T = 1, although a prompt that
    is fed token by token begins with padding. Four dimensions, tokens in the third as in a causal mask, because that
    is how transformers' exporters put the masks of several decoding steps together.
    """
    masks = layer_masks(*args, **kwargs)
    real = masks.get("linear_attention")
    return masks if real is None else masks | {"linear_attention": real[:, None, :, None]}


def token_mask(masks: LayerMasks) -> Tensor | None:
    """[B, T] bool, True for real tokens, from `layer_masks` or `masks_for_generate`."""
    mask = masks.get("linear_attention")
    return mask if mask is None or mask.ndim == 2 else mask[:, 0, :, 0]


def positions(
    attention_mask: Tensor | LayerMasks | None, past_key_values: Cache | None, inputs_embeds: Tensor
) -> Tensor:
    """Positions [B or 1, T] of the tokens of this call: the number of real tokens before each, in the cache too."""
    T = inputs_embeds.shape[1]
    if isinstance(attention_mask, dict):
        if attention_mask.get("linear_attention") is not None:
            raise ValueError("attention_mask is a dict of masks, which does not tell positions; pass position_ids too")
        attention_mask = None
    if attention_mask is None:
        return (torch.arange(T, device=inputs_embeds.device) + seen_tokens(past_key_values))[None]
    counts = attention_mask.to(inputs_embeds.device).long().cumsum(-1)
    return current_columns((counts - 1).clamp(min=0), past_key_values, T)


def current_columns(table: Tensor, past_key_values: Cache | None, T: int) -> Tensor:
    """The columns of `table` [B, L] that belong to the T tokens of this call.

    L counts the tokens in the cache and those of this call; behind a static cache it may also be the cache's length.
    """
    columns, seen = table.shape[1], seen_tokens(past_key_values)
    if isinstance(past_key_values, StaticCache):
        # It counts in a tensor, and reading that would make a GPU wait, so take the columns by index.
        return table if columns == T else table.index_select(1, torch.arange(T, device=table.device) + seen)
    if columns != seen + T:
        raise ValueError(
            f"attention_mask has {columns} columns; expected {seen + T}: one for each of {seen} tokens in the cache "
            f"and the {T} of this call"
        )
    return table[:, seen:]


def settle_packing(
    B: int,
    attention_mask: Any,
    position_ids: Tensor | None,
    past_key_values: Cache | None,
    use_cache: bool | None,
    cu_seqlens: Tensor | None,
) -> Tensor | None:
    """Boundaries of packed documents: `cu_seqlens`, or where positions restart, if there is neither mask nor cache.

    Raises:
        ValueError: they come with something that has no meaning for them.
    """
    if cu_seqlens is None and position_ids is not None and attention_mask is None and past_key_values is None:
        cu_seqlens = packed_boundaries(position_ids)
    if cu_seqlens is not None:
        check_packing(B, attention_mask, past_key_values, use_cache)
    return cu_seqlens


def settle_cache(
    model: Any, config: ReGLAConfig, past_key_values: Cache | None, use_cache: bool | None, *, checkpointed: bool
) -> tuple[Cache | None, bool]:
    """The cache of a call, able to hold states, and whether there is to be one.

    Args:
        model: its config has the default of use_cache, which training has not.
        config: the layers that the cache serves.
        past_key_values: what was given.
        use_cache: what was asked for.
        checkpointed: whether the backward pass will compute blocks again.

    Raises:
        ValueError: a cache that cannot be this model's, or one to be written twice.
    """
    if checkpointed:
        if past_key_values is not None:
            raise ValueError(
                "past_key_values is given in training with activation checkpointing, whose second forward pass "
                "would write the cache again; call model.gradient_checkpointing_disable(), or leave the cache out"
            )
        use_cache = False
    if use_cache is None:
        use_cache = bool(model.config.use_cache and not model.training)
    if past_key_values is None and use_cache:
        past_key_values = DynamicCache(config=model.config)
    if past_key_values is not None:
        adopt_cache(past_key_values, config)
    return past_key_values, use_cache


def packed_boundaries(position_ids: Tensor) -> Tensor | None:
    """Boundaries [N + 1] of the documents of one row, where position_ids [1, T] restart; None if nowhere.

    While compiling, numbers cannot be read: restarts are then an error when the compiled model runs.
    """
    restarts = position_ids[:, 1:] - position_ids[:, :-1] != 1
    if torch.compiler.is_compiling():
        torch._assert_async(~restarts.any(), "position_ids restart in a compiled model; pass cu_seq_lens_q as well")
        return None
    if not restarts.any():
        return None
    if position_ids.shape[0] != 1:
        raise ValueError(
            f"position_ids restart inside a row of a batch of {position_ids.shape[0]}; packed documents need a batch "
            "of 1: concatenate the rows"
        )
    T = position_ids.shape[1]
    inner = restarts[0].nonzero().flatten() + 1
    return torch.cat([inner.new_zeros(1), inner, inner.new_full((1,), T)])


def packed_positions(cu_seqlens: Tensor, T: int) -> Tensor:
    """Positions [1, T] that restart at every boundary of `cu_seqlens` [N + 1]."""
    start = cu_seqlens.long()[owners(cu_seqlens, T).clamp(max=cu_seqlens.shape[0] - 1)]
    return (torch.arange(T, device=cu_seqlens.device) - start)[None]


def check_packing(batch_size: int, attention_mask: Any, past_key_values: Cache | None, use_cache: bool | None) -> None:
    """Raise a ValueError if packed documents come with something that has no meaning for them."""
    if past_key_values is not None or use_cache:
        raise ValueError(
            "documents are packed and a cache is asked for; a cache holds one sequence per row: pass use_cache=False"
        )
    if attention_mask is not None:
        raise ValueError("documents are packed and attention_mask is given; packed rows have no padding: leave it out")
    if batch_size != 1:
        raise ValueError(f"documents are packed into a batch of {batch_size} rows; concatenate them into one row")


def seen_tokens(past_key_values: Cache | None) -> int | Tensor:
    """How many tokens the cache holds, padding included."""
    return 0 if past_key_values is None else past_key_values.get_seq_length()
