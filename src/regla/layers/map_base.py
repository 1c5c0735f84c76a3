"""What a feature map is to a layer: its size, what it is given, how its outputs are read."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class MapOptions(NamedTuple):
    """What a layer constructs its feature map with."""

    query_heads: int
    key_heads: int
    channels: int  # K, of a query or key
    features: int  # F, of phi of it: what `FeatureMap.features` gave
    key_max: str = "decay"
    horizon: int = 2048


class FeatureMap(nn.Module):
    """phi: `forward(q [B, T, HQ, K], k [B, T, H, K])` returns the features of q and k, [B, T, HQ, F] and [B, T, H, F].

    A layer constructs its map with one argument, `MapOptions`. Parameters and buffers start at `start(name)`, where
    `regla.layers.init` puts them, too. Most maps are the same function of q and k: these define `phi`.

    key_max: how the stabiliser of an exponential map runs along the recurrence ("decay", "running" or "sequence", see
        `regla.ops.safe_exp_key`); such a map hands logits on, and the recurrence forms exp of them, as the stabiliser
        is part of it. None: the map needs none.
    """

    key_max: str | None = None
    needs_positions = False  # `forward(q, k, positions)`, positions [B or 1, T] of the tokens in their text
    reads = 1  # queries that each query head becomes, [B, T, HQ * reads, F]; `merge` puts their outputs together
    variance_reduced = True  # of exponentials: scale outputs by `regla.ops.features.variance_reduction`
    delta = True  # whether it goes with the delta rule, that is whether keys may have a length of at most 1

    @classmethod
    def features(cls, channels: int, asked: int | None) -> int:
        """F for keys of so many channels; `asked` is the option `feature_dim`. ValueError for one that cannot be."""
        return only(channels, asked)

    def start(self, name: str) -> Tensor:
        """The start of a parameter or buffer, on the CPU."""
        raise ValueError(f"parameter {name} of {type(self).__name__} has no initial distribution: give it a `start`")

    def phi(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.phi(q), self.phi(k)

    def merge(self, h: Tensor) -> Tensor:
        """Outputs [B, T, HQ * reads, V] -> [B, T, HQ, V]."""
        return h

    def own_parameter(self, name: str, *shape: int, trains: bool = True) -> None:
        """Register a parameter, or a buffer that is saved with the model, at its start."""
        value = torch.empty(shape)
        with torch.no_grad():
            value.copy_(self.start(name))
        if trains:
            self.register_parameter(name, nn.Parameter(value))
        else:
            self.register_buffer(name, value)


def only(features: int, asked: int | None) -> int:
    """`features`, which is all that a map can give."""
    if asked not in (None, features):
        raise ValueError(f"feature_dim is {asked}, but this feature map gives {features} of a head: leave it out")
    return features


def multiple(of: int, default: int, asked: int | None) -> int:
    """The number that is asked for, a multiple of `of`; or the default."""
    if asked is not None and (asked < 1 or asked % of):
        raise ValueError(f"feature_dim is {asked}; expected a multiple of {of} for this feature map, or None")
    return default if asked is None else asked


def wide(x: Tensor) -> Tensor:
    """x in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=-1)


def of_head(x: Tensor, weight: Tensor) -> Tensor:
    """x [B, T, HX, K] times the weight [H, F, K] of its head, [B, T, HX, F], in float32 at least; consecutive groups of
    HX / H heads share one. Autocast would round products whose digits an exponential or a cosine magnifies."""
    x, heads = wide(x), weight.shape[0]
    with torch.autocast(x.device.type, enabled=False):
        grouped = x.unflatten(2, (heads, -1))
        return torch.einsum("bthgk,hfk->bthgf", grouped, weight.to(x.dtype)).flatten(2, 3)
