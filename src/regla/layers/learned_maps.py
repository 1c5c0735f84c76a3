"""Feature maps with parameters that train: T2R, Hedgehog, PolaFormer."""

from __future__ import annotations

import torch
from torch import Tensor

from regla.layers.map_base import FeatureMap, MapOptions, multiple, of_head, only, wide


class T2R(FeatureMap):
    """phi(x) = max(W x + b, 0), W [F, K] and b of each state head, one map for queries and keys (Kasai et al. 2021,
    arXiv 2103.13076, section 2.2).

    W starts at random so that the variance stays, b at 0. The query heads of a group share the map of their key head.
    `feature_dim` is the paper's feature size k, K unless given; the paper takes less than K, which is quicker.
    """

    weight: Tensor
    bias: Tensor
    delta = False

    def __init__(self, options: MapOptions):
        super().__init__()
        self.size = (options.key_heads, options.features, options.channels)
        self.own_parameter("weight", *self.size)
        self.own_parameter("bias", *self.size[:2])

    @classmethod
    def features(cls, channels: int, asked: int | None) -> int:
        return multiple(1, channels, asked)

    def start(self, name: str) -> Tensor:
        if name == "bias":
            return torch.zeros(self.size[:2], device="cpu")
        return torch.randn(self.size, device="cpu") * self.size[-1] ** -0.5

    def phi(self, x: Tensor) -> Tensor:
        group = x.shape[2] // self.size[0]
        return torch.relu(of_head(x, self.weight) + self.bias.repeat_interleave(group, 0)).to(x.dtype)


class Hedgehog(FeatureMap):
    """phi(x) = softmax(W x + b) (+) softmax(-W x - b), each over its K channels (Zhang et al. 2024, arXiv 2402.04347,
    section 4.2: exp, which the paper normalises over the features to keep it bounded).

    F = 2 K. W [K, K] and b of each head, other ones for queries than for keys, start at the identity and 0. The paper
    trains the maps alone first, to give the weights of softmax attention; attention transfer of `regla linearize` is
    such a stage, by the outputs.
    """

    q_weight: Tensor
    q_bias: Tensor
    k_weight: Tensor
    k_bias: Tensor
    delta = False

    def __init__(self, options: MapOptions):
        super().__init__()
        self.channels = options.channels
        self.heads = {"q": options.query_heads, "k": options.key_heads}
        for which, heads in self.heads.items():
            self.own_parameter(f"{which}_weight", heads, self.channels, self.channels)
            self.own_parameter(f"{which}_bias", heads, self.channels)

    @classmethod
    def features(cls, channels: int, asked: int | None) -> int:
        return only(2 * channels, asked)

    def start(self, name: str) -> Tensor:
        heads = self.heads[name[0]]
        if name.endswith("bias"):
            return torch.zeros(heads, self.channels, device="cpu")
        return torch.eye(self.channels, device="cpu").repeat(heads, 1, 1)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return _both_signs(q, self.q_weight, self.q_bias), _both_signs(k, self.k_weight, self.k_bias)


def _both_signs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y = of_head(x, weight) + bias
    return torch.cat([y.softmax(-1), (-y).softmax(-1)], -1).to(x.dtype)


class PolaFormer(FeatureMap):
    """Queries and keys by their signs, with a learnt power (Meng et al. 2025, arXiv 2501.15061, section 4):

        x+ = max(x, 0)^p,  x- = max(-x, 0)^p,  p = 1 + 4 sigmoid(w), w of each head and channel
        same signs:      phi(q) = q+ (+) q-,  phi(k) = k+ (+) k-     reads the first half of the values
        opposite signs:  phi(q) = q- (+) q+,  phi(k) = k+ (+) k-     reads the second half

    F = 2 K, w starts at 0. Keys have one form, so the state is one: S_t = decayed S_{t-1} + phi(k_t) v_t^T. A query
    reads it twice and keeps half of the values each time; a sum norm divides each by its own sum. The paper is about
    images and not causal: it sums keys and values over all tokens, scales q and k by a learnt factor, adds a depthwise
    convolution of the values, and weighs both halves by coefficients from the token, as `output_gate` does here.
    """

    power: Tensor
    reads = 2
    delta = False
    alpha = 4.0  # powers lie between 1 and 1 + alpha

    def __init__(self, options: MapOptions):
        super().__init__()
        self.heads, self.channels = options.key_heads, options.channels
        self.own_parameter("power", self.heads, self.channels)

    @classmethod
    def features(cls, channels: int, asked: int | None) -> int:
        return only(2 * channels, asked)

    def start(self, name: str) -> Tensor:
        return torch.zeros(self.heads, self.channels, device="cpu")

    def signs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x+, x- [B, T, heads, K]."""
        power = 1 + self.alpha * torch.sigmoid(wide(self.power))
        power = power.repeat_interleave(x.shape[2] // self.heads, 0)
        return torch.relu(wide(x)) ** power, torch.relu(-wide(x)) ** power

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        positive, negative = self.signs(q)
        same, opposite = torch.cat([positive, negative], -1), torch.cat([negative, positive], -1)
        phi_q = torch.stack([same, opposite], 3).flatten(2, 3)
        return phi_q.to(q.dtype), torch.cat(self.signs(k), -1).to(k.dtype)

    def merge(self, h: Tensor) -> Tensor:
        same, opposite = h.unflatten(2, (-1, 2)).unbind(3)
        half = h.shape[-1] // 2
        return torch.cat([same[..., :half], opposite[..., half:]], -1)
