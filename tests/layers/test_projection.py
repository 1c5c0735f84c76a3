"""Maps of one input as one product: the same numbers, and only where it pays and fits."""

import pytest
import torch
from torch import nn

from regla.layers import ReGLAAttention, init_linear_attention
from regla.layers.projection import project
from regla.ops import safe_exp_attention


def maps(*biases: bool) -> list[nn.Linear]:
    torch.manual_seed(0)
    return [nn.Linear(6, 4 + i, bias=bias) for i, bias in enumerate(biases)]


@pytest.mark.parametrize("biases", [(False, False, False), (True, False, True)])
def test_one_product_equals_several(biases):
    linears, x = maps(*biases), torch.randn(2, 5, 6, requires_grad=True)
    outputs, together = project(x, *linears)
    assert together is not None and torch.equal(torch.cat(outputs, -1), together)
    weights = [parameter for linear in linears for parameter in linear.parameters()]
    expected = torch.cat([linear(x) for linear in linears], -1)
    torch.testing.assert_close(together, expected)
    d = torch.randn_like(expected)
    for one, other in zip(*(torch.autograd.grad(y, [x, *weights], d) for y in (together, expected)), strict=True):
        torch.testing.assert_close(one, other)


class Adapted(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


def test_maps_that_are_more_than_linear_run_by_themselves():
    x = torch.randn(2, 5, 6)
    plain, other, hooked = maps(False, False, False)
    adapted = Adapted(6, 3)
    seen = []
    hooked.register_forward_hook(lambda *_: seen.append(1))
    wrapped = nn.Linear(6, 2)
    wrapped.forward = lambda x: x[..., :2] * 3  # as accelerate does to move weights
    for special in (adapted, hooked, wrapped):
        outputs, together = project(x, plain, special, other)
        assert together is None
        torch.testing.assert_close(outputs[1], special(x))
    assert seen
    with torch.no_grad():
        assert project(x, plain, other)[1] is None


@pytest.mark.parametrize("options", [{}, {"conv_size": 4}, {"gate_axis": "value"}, {"qk_norm": True}, {"norm": "sum"}])
@pytest.mark.parametrize("backend", ["auto", "chunked"])
def test_a_mixer_trains_the_same_in_one_product(options, backend, monkeypatch):
    layer = ReGLAAttention(24, 4, num_kv_heads=2, head_dim=6, value_head_dim=8, backend=backend, **options)
    init_linear_attention(layer, std=0.3)
    x = torch.randn(2, 70, 24, requires_grad=True)

    def gradients() -> list[torch.Tensor]:
        y, _ = layer(x)
        return [y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()], allow_unused=True)]

    together = gradients()
    monkeypatch.setattr("regla.layers.projection._is_plain", lambda _: False)
    for one, other in zip(together, gradients(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * other.abs().max().item())


def test_a_tensor_that_is_not_all_of_its_parts_is_refused():
    q, k, v, gate, refine = torch.randn(5, 1, 10, 2, 4).unbind(0)
    qkv = torch.cat([q, k, v], 2).flatten(2)
    for wrong in (qkv[..., 1:], torch.cat([qkv, qkv], -1), qkv.mT.contiguous().mT):
        with pytest.raises(ValueError, match="expected a contiguous tensor of so many, got"):
            safe_exp_attention(q, k, v, gate, None, refine_k=refine, qkv=wrong)
