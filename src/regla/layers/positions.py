"""What ties a token to its place: the short causal convolution and rotary position embedding."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ShortConvolution(nn.Module):
    """y_t = x_t + sum_{j < size} w_j * x_{t-j}, one filter a channel, around an identity path.

    Args:
        channels: channels of x.
        size: tokens the filter sees, the current one included.

    `forward(x [B, T, channels], mask, cu_seqlens, state [B, size-1, channels])` returns (y, new state). The state holds
    the inputs before the first token (zeros: there are none). Padding counts as zeros; packed sequences start afresh.
    """

    def __init__(self, channels: int, size: int):
        super().__init__()
        self.size = size
        self.weight = nn.Parameter(torch.zeros(size, channels))  # [j]: the token j places back

    def forward(
        self, x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        B, T, channels = x.shape
        if mask is not None:
            x = torch.where(mask[..., None], x, 0.0)
        if state is None:
            state = x.new_zeros(B, self.size - 1, channels)
        history = torch.cat([state.to(x.dtype), x], 1)
        place = None
        if cu_seqlens is not None:
            token = torch.arange(T, device=x.device)
            place = token - cu_seqlens[torch.searchsorted(cu_seqlens[1:].contiguous(), token, right=True)]
        y = x
        for j in range(self.size):
            lagged = history[:, self.size - 1 - j : self.size - 1 - j + T]
            if place is not None:
                lagged = torch.where((place >= j)[:, None], lagged, 0.0)
            y = y + lagged * self.weight[j].to(x.dtype)
        return y, history[:, T:]

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, size={self.size}"


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x [B, T, H, D] by cos, sin [B or 1, T, R], R <= D: the first R channels turn, in
    pairs (i, i + R/2), as Llama's do (Su et al. 2021)."""
    cos, sin = cos[:, :, None].to(x.dtype), sin[:, :, None].to(x.dtype)
    turning, still = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turning.chunk(2, -1)
    turned = turning * cos + torch.cat([-second, first], -1) * sin
    return torch.cat([turned, still], -1)
