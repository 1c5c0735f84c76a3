"""Feature maps of random projections, which approximate the exponential of softmax attention: RFA, FAVOR+.

The projections are drawn with the other weights and saved with them. Both papers draw new ones while they train; here
they stay.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regla.layers.map_base import FeatureMap, MapOptions, multiple, of_head, unit, wide


class RFA(FeatureMap):
    """phi(x) = D^-1/2 [sin(w_1 u), ..., sin(w_D u), cos(w_1 u), ..., cos(w_D u)], u = x / |x|, w_i = sigma o w~_i with
    w~_i ~ N(0, I) (Peng et al. 2021, arXiv 2103.02143, section 3): phi(x) phi(y) is exp(-|sigma o (u_x - u_y)|^2 / 2)
    on average, for sigma = 1 exp(u_x u_y) up to a factor.

    F = 2 D, D = K unless `feature_dim` says otherwise; w~ [D, K] of each state head. sigma [K] of each state head
    trains and starts at 1. Features can be negative: a sum norm may divide by nearly nothing.
    """

    sigma: Tensor
    projection: Tensor

    def __init__(self, options: MapOptions):
        super().__init__()
        self.size = (options.key_heads, options.features // 2, options.channels)
        self.own_parameter("sigma", self.size[0], self.size[2])
        self.own_parameter("projection", *self.size, trains=False)

    @classmethod
    def features(cls, channels: int, asked: int | None) -> int:
        return multiple(2, 2 * channels, asked)

    def start(self, name: str) -> Tensor:
        if name == "sigma":
            return torch.ones(self.size[0], self.size[2], device="cpu")
        return torch.randn(self.size, device="cpu")

    def phi(self, x: Tensor) -> Tensor:
        angle = of_head(unit(wide(x)), self.projection * self.sigma[:, None])
        return (torch.cat([angle.sin(), angle.cos()], -1) * self.size[1] ** -0.5).to(x.dtype)


class FavorPlus(FeatureMap):
    """phi(x) = m^-1/2 exp(-|y|^2 / 2) [exp(w_1 y), ..., exp(w_m y)], y = x / K^1/4, with orthogonal w_i of the lengths
    that vectors of N(0, I) have (Choromanski et al. 2021, arXiv 2009.14794, section 2): phi(q) phi(k) is
    exp(q k / K^1/2) on average.

    m = F = K unless `feature_dim` says otherwise (the paper: about K log K); w [m, K] of each state head. The
    recurrence forms the exponentials relative to a maximum that looks back only, as for "safe_exp"; the paper's code
    takes that of all keys, which is not causal, and adds 1e-4 to every feature. Outputs differ by a factor per token,
    which every norm but "none" forgets.
    """

    projection: Tensor
    delta = False

    def __init__(self, options: MapOptions):
        super().__init__()
        self.key_max = options.key_max
        self.size = (options.key_heads, options.features, options.channels)
        self.own_parameter("projection", *self.size, trains=False)

    @classmethod
    def features(cls, channels: int, asked: int | None) -> int:
        return multiple(1, channels, asked)

    def start(self, name: str) -> Tensor:
        heads, m, K = self.size
        blocks = torch.randn(heads, -(-m // K), K, K, dtype=torch.float64, device="cpu")
        Q, R = torch.linalg.qr(blocks)
        directions = (Q * R.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]).mT  # evenly distributed, which Q is not
        lengths = torch.randn(heads, m, K, dtype=torch.float64, device="cpu").norm(dim=-1, keepdim=True)
        return directions.flatten(1, 2)[:, :m] * lengths

    def phi(self, x: Tensor) -> Tensor:
        """The logits; the factor m^-1/2 is common to all."""
        y = wide(x) * self.size[-1] ** -0.25
        return (of_head(y, self.projection) - y.square().sum(-1, keepdim=True) / 2).to(x.dtype)
