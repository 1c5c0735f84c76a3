"""What is meant by two models being the same."""

import torch
from torch import nn


@torch.no_grad()
def assert_same_model(one: nn.Module, other: nn.Module, ids: torch.Tensor) -> None:
    """Weights bit for bit, and logits to the rounding of float32: a product of matrices may round otherwise where they
    lie otherwise in memory, as those read from a file do."""
    weights = dict(one.state_dict())
    for name, weight in other.state_dict().items():
        assert torch.equal(weights.pop(name), weight), name
    assert not weights
    torch.testing.assert_close(one(ids).logits, other(ids).logits, rtol=1e-5, atol=1e-5)
