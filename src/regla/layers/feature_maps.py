"""Feature maps of queries and keys, one class each; `FEATURE_MAPS` names them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from regla.ops.features import unit_safe_exp


class FeatureMap(nn.Module):
    """phi: `forward(q [B, T, HQ, K], k [B, T, H, K])` returns the features of q and k, in the same shapes.

    A layer constructs its map with one argument, the option `key_max`.

    key_max: how the stabiliser of an exponential map runs along the recurrence ("decay", "running" or "sequence", see
        `regla.ops.safe_exp_key`); such a map hands its logits on, and the recurrence forms the features, as the
        stabiliser is part of it. None: the map needs none.
    """

    key_max: str | None = None

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


class SafeExp(FeatureMap):
    """phi(q) = exp(q - max q), phi(k) = exp(k - m): bounded and non-negative (paper section 3.1)."""

    def __init__(self, key_max: str):
        super().__init__()
        self.key_max = key_max

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return q, k


class ElementwiseMap(FeatureMap):
    """The same function `phi` of every channel of q and k."""

    def __init__(self, key_max: str):
        super().__init__()

    def phi(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.phi(q), self.phi(k)


class Identity(ElementwiseMap):
    """phi(x) = x."""

    def phi(self, x: Tensor) -> Tensor:
        return x


class ReLU(ElementwiseMap):
    """phi(x) = max(x, 0) (Kasai et al. 2021)."""

    def phi(self, x: Tensor) -> Tensor:
        return torch.relu(x)


class OnePlusELU(ElementwiseMap):
    """phi(x) = 1 + elu(x) (Katharopoulos et al. 2020)."""

    def phi(self, x: Tensor) -> Tensor:
        return 1 + torch.nn.functional.elu(x)


class UnitSafeExp(ElementwiseMap):
    """phi(x) = e / |e|_2, e_i = exp(x_i - max_j x_j), per token and head: positive, of length 1, and without a maximum
    over time (docs/math.md)."""

    def phi(self, x: Tensor) -> Tensor:
        return unit_safe_exp(x)


class UnitIdentity(ElementwiseMap):
    """phi(x) = x / |x|_2."""

    def phi(self, x: Tensor) -> Tensor:
        return _unit(_wide(x)).to(x.dtype)


class UnitSilu(ElementwiseMap):
    """phi(x) = silu(x) / |silu(x)|_2."""

    def phi(self, x: Tensor) -> Tensor:
        return _unit(torch.nn.functional.silu(_wide(x))).to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    """x in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=-1)


FEATURE_MAPS: dict[str, type[SafeExp | ElementwiseMap]] = {
    "safe_exp": SafeExp,
    "identity": Identity,
    "relu": ReLU,
    "one_plus_elu": OnePlusELU,
    "unit_safe_exp": UnitSafeExp,
    "unit_identity": UnitIdentity,
    "unit_silu": UnitSilu,
}
