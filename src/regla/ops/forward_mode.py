"""Whether forward-mode differentiation (torch.func.jvp, torch.autograd.forward_ad) goes through tensors."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.autograd import forward_ad


def has_tangents(tensors: Iterable[Tensor]) -> bool:
    """Whether any of them is a dual tensor."""
    if getattr(forward_ad, "_current_level", 0) < 0:  # forward mode is off, which spares looking
        return False
    return any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)
