"""Forward-mode derivatives and transforms of torch.func: right, or an error in one sentence; never silently zero."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import jvp, vmap

from regla.layers import ReGLAAttention, init_linear_attention
from regla.ops import gated_linear_attention, log_refined_gate, regla_attention, safe_exp_attention
from regla.ops.dispatch import why_not_native, why_not_triton

NAMES = ("q", "k", "v", "gate", "refine")


def skip_without(backend):
    x = torch.ones(1, 1, 1, 16)
    reason = {"native": why_not_native, "triton": why_not_triton}.get(backend, lambda *_: None)(x, x)
    if reason is not None:
        pytest.skip(reason)


def directional(function, x, tangent):
    """By reverse mode."""
    x = x.detach().requires_grad_()
    (grad,) = torch.autograd.grad(function(x), x)
    return (grad * tangent).sum()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("T", [1, 9])
@pytest.mark.parametrize("backend", ["auto", "recurrent"])
def test_the_derivative(backend, T, name):
    inputs = dict(zip(NAMES, torch.randn(5, 1, T, 2, 4).unbind(0), strict=True))
    tangent, weights = torch.randn(1, T, 2, 4), torch.randn(1, T, 2, 4)

    def loss(x, backend=backend):
        h, (S, _) = regla_attention(**inputs | {name: x}, backend=backend, output_final_state=True)
        return (h * weights).sum() + (S * 2.0**-48).sum()

    expected = directional(lambda x: loss(x, "recurrent"), inputs[name], tangent)
    torch.testing.assert_close(jvp(loss, (inputs[name],), (tangent,))[1], expected, rtol=1e-4, atol=1e-5)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(loss(forward_ad.make_dual(inputs[name], tangent))).tangent
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("T", [1, 9])
@pytest.mark.parametrize("backend", ["chunked", "native", "triton"])
def test_an_error_where_there_is_none(backend, T):
    skip_without(backend)
    q, k, v, gate, refine = torch.randn(5, 1, T, 2, 16).unbind(0)
    functions = (
        lambda x: regla_attention(q, k, x, gate, refine, backend=backend)[0],
        lambda x: regla_attention(q, k, v, gate, x, backend=backend)[0],
        lambda x: gated_linear_attention(q, x, v, backend=backend)[0],
        lambda x: safe_exp_attention(x, k, v, backend=backend)[0],
    )
    sentence = rf"backend='{backend}' has no forward-mode derivative .*; use 'auto' or 'recurrent', or reverse mode"
    for function in functions:
        with pytest.raises(ValueError, match=sentence):
            jvp(function, (v,), (torch.ones_like(v),))
        with forward_ad.dual_level(), pytest.raises(ValueError, match=sentence):
            function(forward_ad.make_dual(v, torch.ones_like(v)))


@pytest.mark.parametrize("backend", ["chunked", "native"])
def test_what_has_no_tangent_runs_as_ever(backend):
    """Within forward mode, too."""
    skip_without(backend)
    inputs = torch.randn(5, 1, 9, 2, 16).unbind(0)
    expected, _ = regla_attention(*inputs, backend=backend)
    with forward_ad.dual_level():
        assert torch.equal(regla_attention(*inputs, backend=backend)[0], expected)


def test_the_gate():
    a, c, t = torch.randn(3, 50).double().unbind(0)
    expected = directional(lambda x: log_refined_gate(x, c).sum(), a, t)
    torch.testing.assert_close(jvp(lambda x: log_refined_gate(x, c).sum(), (a,), (t,))[1], expected)
    torch.testing.assert_close(vmap(log_refined_gate)(a, c), log_refined_gate(a, c))


def test_a_layer():
    layer = ReGLAAttention(16, 2)
    init_linear_attention(layer, std=0.4)
    x, tangent = torch.randn(2, 1, 6, 16).unbind(0)
    found = jvp(lambda x: layer(x)[0].sin().sum(), (x,), (tangent,))[1]
    torch.testing.assert_close(found, directional(lambda x: layer(x)[0].sin().sum(), x, tangent), rtol=1e-3, atol=1e-4)


def test_vmap_is_a_loop_or_an_error():
    inputs, batch = torch.randn(4, 1, 5, 2, 4).unbind(0), torch.randn(3, 1, 5, 2, 4)

    def run(v, backend):
        q, k, gate, refine = inputs
        return regla_attention(q, k, v, gate, refine, backend=backend)[0]

    for backend in ("recurrent", "chunked"):
        expected = torch.stack([run(v, backend) for v in batch])
        torch.testing.assert_close(vmap(lambda v, b=backend: run(v, b))(batch), expected)
