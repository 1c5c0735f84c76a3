"""Feature maps of queries and keys, one class each; `FEATURE_MAPS` names them. Here are those without parameters."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regla.layers.learned_maps import T2R, Hedgehog, PolaFormer
from regla.layers.map_base import FeatureMap, MapOptions, multiple, only, unit, wide
from regla.layers.random_maps import RFA, FavorPlus
from regla.ops.features import unit_safe_exp, unit_silu


class SafeExp(FeatureMap):
    """phi(q) = exp(q - max q), phi(k) = exp(k - m): bounded and non-negative (paper section 3.1)."""

    delta = False

    def __init__(self, options: MapOptions):
        super().__init__()
        self.key_max = options.key_max

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return q, k


class UnscaledSafeExp(SafeExp):
    """The same without the variance reduction factor on the outputs, which no norm but "none" lets through."""

    variance_reduced = False


class ElementwiseMap(FeatureMap):
    """The same function `phi` of every token's q and k, that keeps the number of channels."""

    def __init__(self, options: MapOptions):
        super().__init__()


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
        return unit(wide(x)).to(x.dtype)


class UnitSilu(ElementwiseMap):
    """phi(x) = silu(x) / |silu(x)|_2."""

    def phi(self, x: Tensor) -> Tensor:
        return unit_silu(x)


class DPFP(ElementwiseMap):
    """phi(x)_{2K(i-1)+j} = r_j r_{i+j}, r = max([x, -x], 0) with 2 K channels, i = 1..nu, j counted around: products of
    channels, so that keys overlap less (Schlag et al. 2021, arXiv 2102.11174, section 5.3).

    F = 2 K nu; nu = 1 unless `feature_dim` says otherwise.
    """

    delta = False

    def __init__(self, options: MapOptions):
        super().__init__(options)
        self.nu = options.features // (2 * options.channels)

    @classmethod
    def features(cls, channels: int, asked: int | None) -> int:
        return multiple(2 * channels, 2 * channels, asked)

    def phi(self, x: Tensor) -> Tensor:
        r = torch.relu(torch.cat([x, -x], -1))
        return torch.cat([r * r.roll(-i, -1) for i in range(1, self.nu + 1)], -1)


class SumDPFP(DPFP):
    """DPFP divided by the sum of its features, as the same paper has it with the delta rule (section 4.2): keys are at
    most 1 long."""

    delta = True

    def phi(self, x: Tensor) -> Tensor:
        features = super().phi(wide(x))
        return (features / features.sum(-1, keepdim=True).clamp_min(torch.finfo(features.dtype).tiny)).to(x.dtype)


class Focused(ElementwiseMap):
    """phi(x) = |r| / |r^3| r^3, r = max(x, 0), powers per channel (FLatten: Han et al. 2023, arXiv 2308.00442, section
    3.2, with its p = 3): sharper directions, the same length.

    The paper is about images: it adds a depthwise convolution of the values, and its code scales the channels.
    """

    delta = False

    def phi(self, x: Tensor) -> Tensor:
        r = torch.relu(wide(x))
        # phi does not change with a factor that is given back, and powers of small numbers would vanish.
        top = r.detach().amax(-1, keepdim=True).clamp_min(torch.finfo(r.dtype).tiny)
        return (unit((r / top) ** 3) * r.norm(dim=-1, keepdim=True)).to(x.dtype)


class CosFormer(FeatureMap):
    """phi(x_i) = r cos(pi i / 2M) (+) r sin(pi i / 2M), r = max(x, 0), for the token at place i, so that
    phi(q_i) phi(k_j) = r_q r_k cos(pi (i - j) / 2M) (Qin et al. 2022, arXiv 2202.08791, section 3).

    F = 2 K. M is the option `horizon`, at least the length of a text: weights fall to 0 at a distance of M, and beyond
    are negative. The layer counts the tokens of a text in its state, so decoding goes on at the right place.
    """

    needs_positions = True
    delta = False

    def __init__(self, options: MapOptions):
        super().__init__()
        self.horizon = options.horizon

    @classmethod
    def features(cls, channels: int, asked: int | None) -> int:
        return only(2 * channels, asked)

    def forward(self, q: Tensor, k: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        assert positions is not None
        # The turn is taken off first: far places would leave no digits to the angle.
        angle = (positions % (4 * self.horizon)).to(wide(q).dtype) * (math.pi / (2 * self.horizon))
        cos, sin = (x[:, :, None, None] for x in (angle.cos(), angle.sin()))
        r_q, r_k = torch.relu(wide(q)), torch.relu(wide(k))
        phi_q, phi_k = (torch.cat([r * cos, r * sin], -1) for r in (r_q, r_k))
        return phi_q.to(q.dtype), phi_k.to(k.dtype)


FEATURE_MAPS: dict[str, type[FeatureMap]] = {
    "safe_exp": SafeExp,
    "safe_exp_unscaled": UnscaledSafeExp,
    "identity": Identity,
    "relu": ReLU,
    "one_plus_elu": OnePlusELU,
    "unit_safe_exp": UnitSafeExp,
    "unit_identity": UnitIdentity,
    "unit_silu": UnitSilu,
    "t2r": T2R,
    "hedgehog": Hedgehog,
    "dpfp": DPFP,
    "sum_dpfp": SumDPFP,
    "favor_plus": FavorPlus,
    "rfa": RFA,
    "cosformer": CosFormer,
    "focused": Focused,
    "polaformer": PolaFormer,
}


def num_features(name: str, K: int, V: int, asked: int | None) -> int:
    """F of the map of this name, for keys of K and values of V channels; `asked` is the option `feature_dim`.

    Raises:
        ValueError: a number of features or channels that the map cannot have.
    """
    feature_map = FEATURE_MAPS[name]
    if V % feature_map.reads:
        raise ValueError(f"value_head_dim is {V}; the feature map {name!r} reads its halves: make it even")
    return feature_map.features(K, asked)
