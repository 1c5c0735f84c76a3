"""Forget gates: hidden states in, log-decays of the state out. One paper idea each."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from regla.ops import gate_decays, log_refined_gate


class Decays(NamedTuple):
    """Log-decays of the key axis [B, T, H, K or 1] and the value axis [B, T, H, V or 1], and a factor on the values
    written [B, T, H, 1]; None stands for no decay, and for 1."""

    gk: Tensor | None = None
    gv: Tensor | None = None
    write: Tensor | None = None


class Gate(nn.Module):
    """x [B, T, hidden] -> Decays, in float32."""

    def __init__(self, hidden_size: int, num_heads: int, K: int, V: int, axis: str, low_rank_dim: int):
        super().__init__()
        self.num_heads, self.K, self.V, self.axis = num_heads, K, V, axis
        self.build(hidden_size, low_rank_dim)

    def build(self, hidden_size: int, low_rank_dim: int) -> None:
        """Make the parameters."""

    def channels(self) -> int:
        """Gate channels per head for the gate's axis."""
        return {"value": self.V, "key": self.K, "both": self.K + self.V}[self.axis]

    def heads(self, x: Tensor) -> Tensor:
        """[B, T, H*D] -> [B, T, H, D] float32."""
        return x.unflatten(-1, (self.num_heads, -1)).to(torch.promote_types(x.dtype, torch.float32))


class NoGate(Gate):
    """Nothing is forgotten (paper equations 3-5)."""

    def forward(self, x: Tensor) -> Decays:
        return Decays()


class ScalarGate(Gate):
    """S_t = g_t S_{t-1} + (1 - g_t) k_t v_t^T, g_t = sigmoid(W x + b), one number a head (paper equations 6-7)."""

    def build(self, hidden_size: int, low_rank_dim: int) -> None:
        self.proj = nn.Linear(hidden_size, self.num_heads)

    def forward(self, x: Tensor) -> Decays:
        a = self.heads(self.proj(x))
        return Decays(gk=logsigmoid(a), write=torch.sigmoid(-a))


class FastDecayGate(Gate):
    """Decay on both axes: f_t = sigmoid(W_f x + b_f), z_t = sigmoid(W_z x + b_z) (paper equations 9-10; Mao 2022)."""

    def build(self, hidden_size: int, low_rank_dim: int) -> None:
        self.key_proj = nn.Linear(hidden_size, self.num_heads * self.K)
        self.value_proj = nn.Linear(hidden_size, self.num_heads * self.V)

    def forward(self, x: Tensor) -> Decays:
        return Decays(logsigmoid(self.heads(self.key_proj(x))), logsigmoid(self.heads(self.value_proj(x))))


class GLAGate(Gate):
    """Key-axis decay sigmoid(W_2 W_1 x + b)^(1/16) with a low-rank W_2 W_1 (Yang et al. 2024, arXiv 2312.06635)."""

    def build(self, hidden_size: int, low_rank_dim: int) -> None:
        self.down = nn.Linear(hidden_size, low_rank_dim, bias=False)
        self.proj = nn.Linear(low_rank_dim, self.num_heads * self.K)

    def forward(self, x: Tensor) -> Decays:
        return Decays(gk=logsigmoid(self.heads(self.proj(self.down(x)))) / 16)


class SigmoidGate(Gate):
    """F_t = sigmoid(W_g x + b_g) on the chosen axis: the refining gate's baseline."""

    def build(self, hidden_size: int, low_rank_dim: int) -> None:
        self.proj = nn.Linear(hidden_size, self.num_heads * self.channels())

    def forward(self, x: Tensor) -> Decays:
        log_decay = logsigmoid(self.heads(self.proj(x)))
        return Decays(*gate_decays(log_decay, self.axis, self.K, self.V))


class RefinedGate(Gate):
    """F_t = (1 - r) g^2 + r (1 - (1 - g)^2), g = sigmoid(W_g x + b_g), r = sigmoid(W_r x + b_r) (equations 11-13)."""

    def build(self, hidden_size: int, low_rank_dim: int) -> None:
        self.proj = nn.Linear(hidden_size, self.num_heads * self.channels())
        self.refine_proj = nn.Linear(hidden_size, self.num_heads * self.channels())

    def forward(self, x: Tensor) -> Decays:
        log_decay = log_refined_gate(self.heads(self.proj(x)), self.heads(self.refine_proj(x)))
        return Decays(*gate_decays(log_decay, self.axis, self.K, self.V))


GATES: dict[str, type[Gate]] = {
    "none": NoGate,
    "scalar": ScalarGate,
    "fast_decay": FastDecayGate,
    "gla": GLAGate,
    "sigmoid": SigmoidGate,
    "refined": RefinedGate,
}
GATE_AXES = ("value", "key", "both")
