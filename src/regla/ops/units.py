"""The units that gradients are worked on in: powers of two, one for each sequence and state head.

The gradient of a state, decayed from token to token, soon consists of denormal numbers, which are slow and lose digits;
and the features of the safe exponential, up to 2^48, leave little room at the other end of float32. So the largest
gradient of the outputs is brought to about 2^36 and that of the final state to at most 2^60. Gradients of outputs and
of the final state that are so unequal that no unit suits both are propagated one after the other and added up: a
gradient is linear in them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_OF_OUTPUTS, _OF_STATE = 36, 60
NOTHING = -10_000  # stands for the exponent of 0
_MOST = 120  # a unit and its inverse are numbers of float32
_SUITS_BOTH = (-80, 100)  # exponents of a state's gradient above those of the outputs' that one unit leaves digits for


def top_exponents(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """e with max |x| < 2^e over `dims`. What is not finite counts as 1: it stays what it is in any unit."""
    top = x.detach().abs().amax(dims)
    top = top if top.dtype == torch.float64 else top.float()
    exponent = torch.frexp(torch.where(top.isfinite(), top, 1.0)).exponent
    return torch.where(top == 0, NOTHING, exponent)


def no_unit_suits(outputs: Tensor, state: Tensor) -> bool:
    """Whether the gradients of some sequence's and head's outputs and final state, whose exponents these are [N, H],
    need units of their own. Assumed on a GPU, where reading the answer would make the host wait."""
    if not outputs.is_cpu:
        return True
    apart = state - outputs
    given = (outputs > NOTHING) & (state > NOTHING)
    return bool((given & ((apart < _SUITS_BOTH[0]) | (apart > _SUITS_BOTH[1]))).any())


def unit_exponents(outputs: Tensor | None, state: Tensor | None) -> Tensor:
    """The exponents of the units [N, H], from those of the gradients of the outputs and of the final state."""
    wanted = [e - room for e, room in ((outputs, _OF_OUTPUTS), (state, _OF_STATE)) if e is not None]
    largest = wanted[0] if len(wanted) == 1 else torch.maximum(*wanted)
    return -largest.clamp(-_MOST, _MOST)


def with_gradient_times(factor: float, x: Tensor) -> Tensor:
    """x, whose gradient is multiplied by `factor` on its way back."""
    y: Tensor = _ScaledGradient.apply(x, factor)
    return y


class _ScaledGradient(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, factor: float) -> Tensor:  # type: ignore[override]
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return d * ctx.factor, None
