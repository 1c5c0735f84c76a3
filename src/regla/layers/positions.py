"""What ties a token to its place: the short causal convolution and rotary position embedding."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from regla.ops.short_convolution import short_convolution


class ShortConvolution(nn.Module):
    """`regla.ops.short_convolution` with a weight [size, channels]: y_t = activation(x_t + sum_j w_j * x_{t-j}).

    Args:
        channels: channels of x.
        size: tokens the filter sees, the current one included.
        activation: None, "silu" or "sigmoid".

    `forward(x, mask, cu_seqlens, state)` returns (y, new state); all are as there, and so are its options.
    """

    def __init__(self, channels: int, size: int, activation: str | None = None):
        super().__init__()
        self.size, self.activation = size, activation
        self.weight = nn.Parameter(torch.zeros(size, channels))  # [j]: the token j places back

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
        state: Tensor | None,
        *,
        overwrite_state: bool = False,
        backend: str = "auto",
    ) -> tuple[Tensor, Tensor]:
        return short_convolution(
            x,
            self.weight,
            activation=self.activation,
            state=state,
            mask=mask,
            cu_seqlens=cu_seqlens,
            overwrite_state=overwrite_state,
            backend=backend,
        )

    def extra_repr(self) -> str:
        activation = "" if self.activation is None else f", activation={self.activation!r}"
        return f"{self.weight.shape[1]}, size={self.size}{activation}"


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x [B, T, H, D] by cos, sin [B or 1, T, R], R <= D: the first R channels turn, in
    pairs (i, i + R/2), as Llama's do (Su et al. 2021)."""
    cos, sin = cos[:, :, None].to(x.dtype), sin[:, :, None].to(x.dtype)
    turning, still = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turning.chunk(2, -1)
    turned = turning * cos + torch.cat([-second, first], -1) * sin
    return torch.cat([turned, still], -1)
