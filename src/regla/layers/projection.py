"""Linear maps of the same input as one product."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def project(x: Tensor, *maps: nn.Module) -> tuple[list[Tensor], Tensor | None]:
    """([map(x) for map in maps], the tensor of which they are the channels, side by side, or None).

    For training: of several products with x, each takes a pass over the memory of x's gradient; of one, none does. The
    weights are put together for that, which for a few tokens would cost more than the products. Maps that are anything
    but plain linear ones (adapters, quantised ones, ones with hooks) run by themselves.
    """
    if not torch.is_grad_enabled() or not all(map(_is_plain, maps)):
        return [map_(x) for map_ in maps], None
    linears = [map_ for map_ in maps if isinstance(map_, nn.Linear)]
    weight = torch.cat([linear.weight for linear in linears])
    bias = None
    if any(linear.bias is not None for linear in linears):
        zeros = [weight.new_zeros(linear.out_features) for linear in linears]
        bias = torch.cat([z if linear.bias is None else linear.bias for linear, z in zip(linears, zeros, strict=True)])
    together = nn.functional.linear(x, weight, bias)
    return list(together.split([linear.out_features for linear in linears], -1)), together


def _is_plain(map_: nn.Module) -> bool:
    has_hooks = map_._forward_hooks or map_._forward_pre_hooks or map_._backward_hooks or map_._backward_pre_hooks
    return type(map_) is nn.Linear and not has_hooks and "forward" not in map_.__dict__
