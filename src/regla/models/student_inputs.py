"""What a student's base model is given, in the form that its linear layers and the original's code take.

Shapes: B batch, T tokens of this call, L columns of an attention mask (tokens in the cache plus T).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.masking_utils import create_masks_for_generate

from regla.models.cache import CACHE, one_cache
from regla.models.families import last_position
from regla.models.inputs import (
    LayerMasks,
    current_columns,
    packed_positions,
    positions,
    seen_tokens,
    settle_cache,
    settle_packing,
)

#: Under which the original's code hands `LinearTokens` on, from the base model to its attention modules.
TOKENS = "regla_tokens"

_LINEAR, _SOFTMAX = "linear_attention", "softmax"  # keys of a dict of masks


class LinearTokens(NamedTuple):
    """What a linear layer has to know of the tokens of a call."""

    mask: Tensor | None = None
    """[B, T] bool, True for real tokens; None: all are."""
    cu_seqlens: Tensor | None = None
    """[N + 1] int, boundaries of packed documents."""


def prepared(model: Any, blocks: Iterable[nn.Module], arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the original's forward, from those of the student's.

    It settles what is a cache and makes it hold states, counts positions without padding, and finds padding and packed
    documents.

    Raises:
        ValueError: documents are packed in a way that has no meaning, a mask that linear layers cannot follow, a cache
            of another model, or one in training with gradient checkpointing.
    """
    tokens = arguments.get("input_ids") if arguments.get("inputs_embeds") is None else arguments["inputs_embeds"]
    if tokens is None:
        return arguments  # the original says what is missing
    B, T = tokens.shape[:2]
    cache = one_cache(arguments.pop("past_key_values", None), arguments.pop("cache", None))
    attention_mask, position_ids = arguments.get("attention_mask"), arguments.get("position_ids")
    use_cache = arguments.get("use_cache")
    cu_seqlens = settle_packing(B, attention_mask, position_ids, cache, use_cache, arguments.get("cu_seq_lens_q"))
    if cu_seqlens is not None:
        use_cache, position_ids = False, packed_positions(cu_seqlens, T)
    again = torch.is_grad_enabled() and bool(checkpointed(model, blocks))
    cache, use_cache = settle_cache(model, model.linear_config, cache, use_cache, checkpointed=again)
    theirs, real = _split(attention_mask, cache, tokens)
    if real is not None and arguments.get("inputs_embeds") is not None:  # which may hold anything there
        arguments["inputs_embeds"] = torch.where(real[..., None], tokens, 0.0)
    if position_ids is None:
        position_ids = positions(_counted(attention_mask, cache, real), cache, tokens)
    _check_positions(position_ids, seen_tokens(cache) + T, last_position(model.config))
    return arguments | {
        "attention_mask": theirs,
        "position_ids": position_ids,
        "use_cache": use_cache,
        CACHE: cache,
        TOKENS: LinearTokens(real, cu_seqlens),
    }


def checkpointed(model: nn.Module, blocks: Iterable[nn.Module]) -> list[nn.Module]:
    """Of a base model and its blocks: those whose backward pass would recompute them."""
    return [one for one in (model, *blocks) if getattr(one, "gradient_checkpointing", False) and one.training]


def set_checkpointing(modules: Iterable[Any], enabled: bool) -> None:
    """Turn gradient checkpointing of these modules on or off."""
    for module in modules:
        module.gradient_checkpointing = enabled


def masks_for_generate(
    config: Any,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    past_key_values: Cache | None = None,
    position_ids: Tensor | None = None,
    *,
    cache: Cache | None = None,
    **kwargs: Any,
) -> LayerMasks:
    """The original's masks for a cache of fixed size, and beside them the real tokens [B, 1, T, 1] for linear layers.

    Takes the place of transformers' `create_masks_for_generate`. Four dimensions, tokens in the third as in a causal
    mask, because that is how transformers' exporters put the masks of several decoding steps together.
    """
    cache = one_cache(past_key_values, cache)
    theirs = create_masks_for_generate(
        config, inputs_embeds, attention_mask, position_ids=position_ids, **{CACHE: cache}, **kwargs
    )
    masks = theirs if isinstance(theirs, dict) else {_SOFTMAX: theirs}
    if attention_mask is None:
        return masks | {_LINEAR: None}
    real = current_columns(attention_mask, cache, inputs_embeds.shape[1])
    return masks | {_LINEAR: real.to(device=inputs_embeds.device, dtype=torch.bool)[:, None, :, None]}


def _split(mask: Any, cache: Cache | None, tokens: Tensor) -> tuple[Any, Tensor | None]:
    """The mask for the original's code, and the real tokens [B, T] of this call (None: all)."""
    if mask is None:
        return None, None
    if isinstance(mask, dict):
        softmax = {kind: value for kind, value in mask.items() if kind != _LINEAR}
        real = mask.get(_LINEAR)
        return softmax.get(_SOFTMAX, softmax), None if real is None else real[:, 0, :, 0]
    if mask.ndim == 4:
        return mask, _real_of_causal(mask, cache, tokens.shape[1])
    real = current_columns(mask, cache, tokens.shape[1])
    return mask, real.to(device=tokens.device, dtype=torch.bool)


def _real_of_causal(mask: Tensor, cache: Cache | None, T: int) -> Tensor:
    """The real tokens [B, T] of a causal mask [B, 1, T, L], True or 0 where a query sees a key: those that see
    themselves.

    Raises:
        ValueError: it is more than causality and padding, such as blocks, which a state cannot follow.
    """
    sees = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0
    seen = seen_tokens(cache)
    keys, queries = torch.arange(mask.shape[-1], device=mask.device), torch.arange(T, device=mask.device) + seen
    real = sees.gather(-1, queries[None, :, None].expand(len(sees), -1, 1))[..., 0]
    if not torch.compiler.is_compiling():
        real_keys = sees[:, -1:] | (keys[None, None] > queries[-1])  # what the last query does not see is padding
        causal = (keys <= queries[:, None]) & real_keys
        if not torch.equal(causal & real[..., None], sees & real[..., None]):
            raise ValueError(
                "attention_mask has 4 dimensions and more in it than causality and padding, which linear layers cannot "
                "follow; pass [B, past + T] with 0 for padding, or cu_seq_lens_q for packed documents"
            )
    return real


def _check_positions(position_ids: Tensor, columns: int | Tensor, limit: int | None) -> None:
    """Raise a ValueError for a position that a model with a table of them has not learnt."""
    if limit is None or torch.compiler.is_compiling() or not columns > limit:
        return
    if int(position_ids.max()) >= limit:  # padding is no position
        raise ValueError(
            f"position {int(position_ids.max())} is asked for, and the model has learnt {limit}; give fewer tokens"
        )


def _counted(mask: Any, cache: Cache | None, real: Tensor | None) -> Any:
    """The form of a mask that `positions` counts by."""
    if isinstance(mask, dict) or mask is None or mask.ndim == 2:
        return mask
    assert real is not None
    if cache is None or not int(cache.get_seq_length()):
        return real
    if not bool(real.all()):
        raise ValueError(
            "attention_mask has 4 dimensions, which behind a cache does not tell positions; pass position_ids too"
        )
    return None
