"""Softmax attention over the last tokens and the first few alone: what an original does without training where its
attention is cut. A baseline for conversions. Its cache keeps every token.

Shapes: B batch, T tokens of this call, L keys.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

SINKS = 4
"""First tokens that every query sees: where many heads look when there is nothing to look for."""

_ARGUMENTS = ("past_key_values", "layer_past", "cache")


def limit_attention(attention: nn.Module, window: int, sinks: int) -> None:
    """From now on each query of this attention module of an original sees the last `window` tokens, itself included,
    and the first `sinks` real ones."""
    attention.register_forward_pre_hook(partial(_narrow, window=window, sinks=sinks), with_kwargs=True)


def _narrow(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, window: int, sinks: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    kind = module.config._attn_implementation
    if kind not in ("sdpa", "eager"):
        raise ValueError(
            f"attn_implementation is {kind!r}, which takes no mask of a window with first tokens; load the model with "
            "attn_implementation='sdpa'"
        )
    x = args[0] if args else kwargs["hidden_states"]
    caches = [kwargs[name] for name in _ARGUMENTS if kwargs.get(name) is not None]
    past = int(caches[0].get_seq_length(module.layer_idx)) if caches else 0
    mask_BTL = window_mask(kwargs.get("attention_mask"), past, x.shape[1], window, sinks, x.device)
    if kind == "eager":
        mask_BTL = torch.where(mask_BTL, 0.0, torch.finfo(x.dtype).min).to(x.dtype)
    return args, kwargs | {"attention_mask": mask_BTL}


def window_mask(mask: Tensor | None, past: int, T: int, window: int, sinks: int, device: torch.device) -> Tensor:
    """[B or 1, 1, T, L], True where a query sees a key: what the causal mask [B, 1, T, L] allows (None: all of the
    past) and is near or among the first real tokens."""
    L = past + T if mask is None else mask.shape[-1]
    keys_L = torch.arange(L, device=device)
    distance_TL = torch.arange(past, past + T, device=device)[:, None] - keys_L
    near_TL = (distance_TL >= 0) & (distance_TL < window)
    if mask is None:
        return ((near_TL | (keys_L < sinks)) & (distance_TL >= 0))[None, None]
    sees_BTL = (mask if mask.dtype == torch.bool else mask >= 0)[:, 0]
    real_BL = sees_BTL[:, -1]
    first_BL = real_BL & (real_BL.cumsum(-1) <= sinks)
    return ((near_TL | first_BL[:, None]) & sees_BTL)[:, None]
