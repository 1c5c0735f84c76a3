"""The refined gate in log space against the paper's formula in float64."""

import pytest
import torch

from regla.ops import log_refined_gate

from . import definition


def grid(step: float):
    logits = torch.arange(-90, 90 + step, step, dtype=torch.float64)
    return torch.meshgrid(logits, logits, indexing="ij")


def test_float32_against_float64_over_the_grid():
    a, c = grid(0.25)
    expected = definition.log_refined_gate(a, c)
    value = log_refined_gate(a.float(), c.float())
    assert value.dtype == torch.float32 and (value <= 0).all()
    told_apart = expected.abs() > 1e-38
    assert told_apart.double().mean() > 0.75
    error = (value.double() - expected).abs() / expected.abs()
    assert error[told_apart].max() <= 1e-6


def test_the_float64_formula_is_the_papers():
    """Where the paper's own arrangement loses nothing, both give the same."""
    a, c = (x.clamp(-8, 8) for x in grid(0.5))
    g, r = torch.sigmoid(a), torch.sigmoid(c)
    literal = ((1 - r) * g**2 + r * (1 - (1 - g) ** 2)).log()
    assert torch.allclose(definition.log_refined_gate(a, c), literal, rtol=1e-9, atol=0)
    assert torch.allclose(log_refined_gate(a, c), literal, rtol=1e-9, atol=0)


def test_gradients_are_finite_and_exact():
    a, c = (x.requires_grad_() for x in grid(1.0))
    expected = torch.autograd.grad(definition.log_refined_gate(a, c).sum(), (a, c))
    a32, c32 = (x.detach().float().requires_grad_() for x in (a, c))
    grads = torch.autograd.grad(log_refined_gate(a32, c32).sum(), (a32, c32))
    # Where the reference's own terms, such as r (1 - r), still have their digits, and float32 its range.
    clear = c.abs() <= 15
    for grad, reference in zip(grads, expected, strict=True):
        assert grad.isfinite().all()
        error = (grad.double() - reference).abs() / reference.abs()
        assert error[clear & (reference.abs() > 1e-30)].max() <= 1e-5


def test_gradcheck():
    a, c = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True).unbind(0)
    assert torch.autograd.gradcheck(log_refined_gate, (4 * a, 4 * c))


def test_starts_as_the_plain_gate():
    a = torch.linspace(-30, 30, 101)
    assert torch.allclose(log_refined_gate(a, torch.zeros(())), torch.nn.functional.logsigmoid(a), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_give_float32(dtype):
    a = torch.linspace(-20, 20, 41, dtype=dtype)
    assert torch.equal(log_refined_gate(a, a), log_refined_gate(a.float(), a.float()))


def test_refining_keeps_the_gradient_where_a_plain_gate_saturates():
    """At equal F, dF/da of the refined gate is 1 to 2 times the plain gate's F (1 - F): more, the closer to 0 or 1."""
    for r, near in ((1e-6, 1e-4), (1 - 1e-6, 1 - 1e-4)):
        a = torch.linspace(-15, 15, 20001, dtype=torch.float64, requires_grad=True)
        log_f = log_refined_gate(a, torch.tensor(r, dtype=torch.float64).logit())
        F = log_f.exp()
        (slope,) = torch.autograd.grad(F.sum(), a)
        ratio = (slope / (F * (1 - F))).detach()
        assert (ratio > 0.999).all() and (ratio < 2.001).all()
        assert ratio[(F.detach() - near).abs().argmin()] > 1.97
