"""Normalisation of a head's output (paper section 3.2): what replaces the sum normaliser, and the sum normaliser.

Behind the safe exponential h is known only up to a positive factor per token and head, and that factor may be as small
as exp(-100). A layer norm forgets a factor only if its eps does not see it, hence "scale-free":

    Norm(h / max_i |h_i|), the maximum taking no gradient, in float32, then an ordinary eps.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from regla.layers.plain import is_plain
from regla.ops import call
from regla.ops.call import Gates
from regla.ops.output_norm import ACTIVATIONS, output_norm, prescale


class OutputNorm(nn.Module):
    """h [B, T, H, V] -> [B, T, H, V]. `prepare` may add value channels (and their decays) that `forward` consumes."""

    of_each_read = False  # of a feature map that reads twice: normalise each output, then put them together

    def __init__(self, num_heads: int, head_dim: int, eps: float):
        super().__init__()
        self.num_heads, self.head_dim, self.eps = num_heads, head_dim, eps

    def prepare(self, v: Tensor, gates: Gates) -> tuple[Tensor, Gates]:
        return v, gates

    def extra_repr(self) -> str:
        return f"{self.num_heads}, {self.head_dim}, eps={self.eps}"


class HeadNorm(OutputNorm):
    """`regla.ops.output_norm` with a weight [H, V]: of h, gate, activation and backend."""

    bias: nn.Parameter | None

    def __init__(self, num_heads: int, head_dim: int, eps: float):
        super().__init__(num_heads, head_dim, eps)
        self.weight = nn.Parameter(torch.ones(num_heads, head_dim))
        self.register_parameter("bias", None)

    def forward(
        self, h: Tensor, gate: Tensor | None = None, activation: str | None = None, backend: str = "auto"
    ) -> Tensor:
        eps, weight, bias = self.eps, self.weight, self.bias
        return output_norm(h, weight, bias, gate, activation=activation, eps=eps, backend=backend)


class HeadRMSNorm(HeadNorm):
    """o = w * x / sqrt(mean(x^2) + eps), x = prescale(h); per head, weight w [H, V]."""


class HeadLayerNorm(HeadNorm):
    """o = w * (x - mean x) / sqrt(var x + eps) + b, x = prescale(h); per head, w, b [H, V] (the paper's choice)."""

    def __init__(self, num_heads: int, head_dim: int, eps: float):
        super().__init__(num_heads, head_dim, eps)
        self.bias = nn.Parameter(torch.zeros(num_heads, head_dim))


class SumNorm(OutputNorm):
    """o = S_t^T phi(q_t) / (c_t^T phi(q_t)), c_t the gated sum of the keys' features (paper equations 3-7).

    The denominator is read from the same state: values of 1 are appended to v, one channel, or one for each channel
    of v where the channels decay at different rates. Needs a non-negative feature map: near a zero denominator the
    result is arbitrary, which is the paper's reason for replacing it.
    """

    of_each_read = True

    def prepare(self, v: Tensor, gates: Gates) -> tuple[Tensor, Gates]:
        if gates.gv is None or gates.gv.shape[-1] == 1:
            return torch.cat([v, torch.ones_like(v[..., :1])], -1), gates
        gv, rv = (None if x is None else torch.cat([x, x], -1) for x in (gates.gv, gates.rv))
        return torch.cat([v, torch.ones_like(v)], -1), gates._replace(gv=gv, rv=rv)

    def forward(self, h: Tensor) -> Tensor:
        numerator, denominator = prescale(h).split([self.head_dim, h.shape[-1] - self.head_dim], -1)
        tiny = torch.finfo(denominator.dtype).tiny
        return (numerator / torch.where(denominator.abs() < tiny, tiny, denominator)).to(h.dtype)


class NoNorm(OutputNorm):
    """o = h."""

    def forward(self, h: Tensor) -> Tensor:
        return h


NORMS: dict[str, type[OutputNorm]] = {
    "rmsnorm": HeadRMSNorm,
    "layernorm": HeadLayerNorm,
    "sum": SumNorm,
    "none": NoNorm,
}


def prepared(norm: nn.Module, v: Tensor, gates: Gates) -> tuple[Tensor, Gates]:
    """`OutputNorm.prepare`; another module in its place prepares nothing."""
    prepare = getattr(norm, "prepare", None)
    return (v, gates) if prepare is None else prepare(v, gates)


def head_norm(norm: nn.Module, device: torch.device) -> call.HeadNorm | None:
    """The weights of a `HeadNorm`, for a kernel that normalises; None where the module is to be called, because it is
    another one or more than that, or because its weights are kept elsewhere and come to the device with the call."""
    if not is_plain(norm, HeadRMSNorm, HeadLayerNorm):
        return None
    assert isinstance(norm, HeadNorm)
    return call.HeadNorm(norm.weight, norm.bias, norm.eps) if norm.weight.device == device else None


def normalised(norm: nn.Module | None, x: Tensor) -> Tensor:
    """norm(x) of queries or keys in the dtype of its parameters, in the dtype of x; x where there is no norm."""
    if norm is None:
        return x
    dtype = next((parameter.dtype for parameter in norm.parameters()), x.dtype)
    y: Tensor = norm(x.to(dtype))
    return y.to(x.dtype)


def norm_and_gate(norm: nn.Module, h: Tensor, gate: Tensor | None, activation: str | None, backend: str) -> Tensor:
    """norm(h) * activation(gate), [B, T, H, V], for outputs h [B, T, H, V] and logits [B, T, H V] of the output gate.
    A `HeadNorm` does both in one call."""
    if isinstance(norm, HeadNorm):
        o: Tensor = norm(h, gate, activation, backend)
        return o
    return output_gated(norm(h), gate, activation)


def output_gated(o: Tensor, gate: Tensor | None, activation: str | None) -> Tensor:
    """o * activation(gate); o [B, T, H, V], gate [B, T, H V] or None."""
    return o if gate is None or activation is None else o * ACTIVATIONS[activation](gate).reshape(o.shape)
