"""Linear maps of the same input as one product."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from regla.layers.plain import is_plain


def project(x: Tensor, *maps: nn.Module) -> tuple[list[Tensor], Tensor | None]:
    """([map(x) for map in maps], the tensor of which they are the channels, side by side, or None).

    x is [..., in], each result [..., out of that map], the tensor [..., sum of outs], in autocast's dtype.

    Together where gradients flow under autocast: of several products, each takes a pass over the memory of x's
    gradient; of one, none does. Autocast copies the weights in any case; without it the copy would only cost memory.
    Maps run by themselves if one of them is frozen, or more than a plain linear map (an adapter, a quantised one, one
    with hooks).
    """
    kind = x.device.type
    if not (torch.is_grad_enabled() and torch.is_autocast_enabled(kind)):
        return [map_(x) for map_ in maps], None
    weights = [map_.weight for map_ in maps if isinstance(map_, nn.Linear) and _trains_alone(map_)]
    biases = [map_.bias for map_ in maps if isinstance(map_, nn.Linear) and map_.bias is not None]
    fit = len(weights) == len(maps) and len(biases) in (0, len(maps))
    if not fit:
        return [map_(x) for map_ in maps], None
    # Cast first: gradients of the weights then are tensors of their own, not parts of one.
    dtype = torch.get_autocast_dtype(kind)
    weight = torch.cat([x.to(dtype) for x in weights])
    bias = torch.cat([x.to(dtype) for x in biases]) if biases else None
    together = nn.functional.linear(x, weight, bias)
    return list(together.split([x.shape[0] for x in weights], -1)), together


def split_heads(x: Tensor, heads: Sequence[tuple[int, int]]) -> list[Tensor]:
    """x [B, T, channels] -> [B, T, H, D] for each (H, D) of `heads`, side by side in x; views."""
    if len(heads) == 1:
        return [x.unflatten(-1, heads[0])]
    views = x.split([H * D for H, D in heads], -1)
    return [view.unflatten(-1, size) for view, size in zip(views, heads, strict=True)]


def _trains_alone(map_: nn.Linear) -> bool:
    """Whether it is a linear map that trains, and nothing besides."""
    return is_plain(map_, nn.Linear) and all(x.requires_grad for x in _parameters(map_))


def _parameters(map_: nn.Linear) -> list[Tensor]:
    return [map_.weight] if map_.bias is None else [map_.weight, map_.bias]
