"""What ties a token to its place: the short causal convolution and rotary position embedding."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ShortConvolution(nn.Module):
    """y_t = x_t + sum_{j < size} w_j * x_{t-j}, one filter a channel, around an identity path.

    Args:
        channels: channels of x.
        size: tokens the filter sees, the current one included.

    `forward(x, mask, cu_seqlens, state)` returns (y, new state):

        x [B, T, channels]; mask [B, T] bool, True for real tokens, or None; cu_seqlens [N + 1] int, boundaries of
        packed sequences, each of which starts afresh, or None; state [B, size - 1, channels], the last real tokens
        before x (zeros: there are none), or None.

    Padding, wherever it lies, is passed over: x_{t-j} is the j-th last real token before x_t, and the state holds the
    last real tokens. What padding holds has no influence.
    """

    def __init__(self, channels: int, size: int):
        super().__init__()
        self.size = size
        self.weight = nn.Parameter(torch.zeros(size, channels))  # [j]: the token j places back

    def forward(
        self, x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        B, T, channels = x.shape
        if state is None:
            state = x.new_zeros(B, self.size - 1, channels)
        state = state.to(x.dtype)
        if mask is None:
            return self._convolve(x, torch.cat([state, x], 1), cu_seqlens)
        x = torch.where(mask[..., None], x, 0.0)
        if T == 1:
            y, after = self._convolve(x, torch.cat([state, x], 1), None)
            return y, torch.where(mask[..., None], after, state)
        # With the real tokens of every row moved together, to its beginning: y there, then back to their places.
        real_first = torch.argsort(~mask, dim=1, stable=True)
        history = torch.cat([state, _rows_at(x, real_first)], 1)
        y, _ = self._convolve(history[:, self.size - 1 :], history, None)
        last = mask.sum(1, keepdim=True) + torch.arange(self.size - 1, device=x.device)
        y = torch.where(mask[..., None], _rows_at(y, (mask.cumsum(1) - 1).clamp_min(0)), 0.0)
        return y, _rows_at(history, last)

    def _convolve(self, x: Tensor, history: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        """y, and the state behind `history`, which is the state before x and x."""
        T, place = x.shape[1], None
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


def _rows_at(x: Tensor, tokens: Tensor) -> Tensor:
    """x [B, T, channels] at the indices `tokens` [B, n]: [B, n, channels]."""
    return x.gather(1, tokens[..., None].expand(-1, -1, x.shape[-1]))


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x [B, T, H, D] by cos, sin [B or 1, T, R], R <= D: the first R channels turn, in
    pairs (i, i + R/2), as Llama's do (Su et al. 2021)."""
    cos, sin = cos[:, :, None].to(x.dtype), sin[:, :, None].to(x.dtype)
    turning, still = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turning.chunk(2, -1)
    turned = turning * cos + torch.cat([-second, first], -1) * sin
    return torch.cat([turned, still], -1)
