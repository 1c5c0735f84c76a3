"""What fits queries and keys to an exponential feature map: learnt shifts and scales."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class QKCalibration(nn.Module):
    """q' = (q - q_mean) * q_scale, k' = (k - k_mean) * k_scale: a mean per channel, a scale (1 / temperature) per head.

    Keys that softmax attention learnt may carry a large constant in a few channels. Softmax forgets it, the same for
    every key; an exponential map of the channels does not: the feature of that channel drowns all others. It starts as
    the identity; `regla.linearize.calibrate` sets it from data, and training goes on from there.

    q: [B, T, num_heads, head_dim], k: [B, T, num_kv_heads, head_dim], behind RoPE where there is any. Both come out in
    the dtype of the parameters.
    """

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int):
        super().__init__()
        self.q_mean = nn.Parameter(torch.zeros(num_heads, head_dim))
        self.k_mean = nn.Parameter(torch.zeros(num_kv_heads, head_dim))
        self.q_scale = nn.Parameter(torch.ones(num_heads))
        self.k_scale = nn.Parameter(torch.ones(num_kv_heads))

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        # Differences of large numbers: in float32 whatever the products were rounded to.
        q_calibrated = (q.to(self.q_mean.dtype) - self.q_mean) * self.q_scale[:, None]
        k_calibrated = (k.to(self.k_mean.dtype) - self.k_mean) * self.k_scale[:, None]
        return q_calibrated, k_calibrated
