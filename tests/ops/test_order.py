"""Nothing relies on the order in which a GPU starts CTAs: a CTA takes its chunk by a ticket."""

import os

import pytest
import torch

from regla.ops import gate_decays, gated_linear_attention

from .test_forms import make

pytestmark = [
    pytest.mark.usefixtures("operation"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="a GPU chooses the order itself"),
]


@pytest.mark.parametrize("packed", [False, True])
def test_the_last_ctas_first(packed, monkeypatch):
    """The same bits, forward and backward. (Without the safe exponential, whose stabiliser a CTA waits for: in the
    interpreter, which runs one CTA at a time, for ever if its chunks come in the wrong order.)"""
    from triton.runtime.interpreter import InterpreterBuilder

    in_order = InterpreterBuilder.set_grid_idx

    def reversed_order(self, x, y, z):
        in_order(self, *(size - 1 - at for size, at in zip(self.grid_dim, (x, y, z), strict=True)))

    q, k, v, gate, _ = make(100, (2, 1, 16, 16), "value", "plain")
    leaves = [q, k, v, -gate.abs()]
    bounds = torch.tensor([0, 40, 100]) if packed else None
    results = []
    for order in (in_order, reversed_order):
        monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", order)
        some = [x.clone().requires_grad_() for x in leaves]
        gk, gv = gate_decays(some[3], "value", k.shape[-1], v.shape[-1])
        h, S = gated_linear_attention(*some[:3], gk, gv, cu_seqlens=bounds, output_final_state=True, backend="triton")
        torch.manual_seed(1)
        loss = (h * torch.randn_like(h)).sum() + (S * torch.randn_like(S)).sum()
        results.append([h, S, *torch.autograd.grad(loss, some)])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
