"""The safe exponential and its stabilisers."""

import math

import pytest
import torch

from regla.ops import regla_attention, safe_exp_key, safe_exp_query, variance_reduction

from .test_forms import make


def test_query_features_are_the_papers():
    q = 3 * torch.randn(2, 5, 3, 7, dtype=torch.float64)
    features = safe_exp_query(q)
    assert torch.allclose(features, q.exp() / q.exp().amax(-1, keepdim=True))
    assert (features > 0).all() and (features.amax(-1) == 1).all()


def test_stabilisers_by_their_recursions():
    k, decay = 5 * torch.randn(2, 50, 3, 7), -2 * torch.rand(2, 50, 3)
    for key_max in ("decay", "running"):
        features, unit, final = safe_exp_key(k, decay, key_max=key_max)
        m = torch.full((2, 3), -1e30)
        for t in range(50):
            previous, top = m, k[:, t].amax(-1)
            m = torch.maximum(m + (decay[:, t] if key_max == "decay" else 0), top)
            assert torch.allclose(features[:, t], (k[:, t] - m[..., None]).exp(), rtol=1e-5)
            assert torch.allclose(unit[:, t], previous - m, atol=1e-5)
        assert torch.allclose(final, m, atol=1e-5)
        assert (features > 0).all() and (features <= 1).all()


def test_sequence_maximum_is_the_papers():
    k = torch.randn(2, 50, 3, 7)
    features, _, final = safe_exp_key(k, key_max="sequence")
    largest = k.amax((1, 3))
    assert torch.equal(final, largest)
    assert torch.allclose(features, (k - largest[:, None, :, None]).exp(), rtol=1e-6)


def test_the_literal_form_with_its_scale():
    """key_max="sequence" gives the paper's h itself: sum normaliser gone, scale 1 / (e sqrt(K (e^2 - 1)))."""
    q, k, v, gate, refine = make(20, (2, 2, 5, 6), "value", "plain")
    h, _ = regla_attention(q, k, v, gate, refine, key_max="sequence")
    phi_q = (q - q.amax(-1, keepdim=True)).exp()
    phi_k = (k - k.amax((1, 3), keepdim=True)).exp()
    g, r = torch.sigmoid(gate), torch.sigmoid(refine)
    F = (1 - r) * g**2 + r * (1 - (1 - g) ** 2)
    S, expected = torch.zeros(1, 2, 5, 6), []
    for t in range(20):
        S = S * F[:, t, :, None] + phi_k[:, t, :, :, None] * v[:, t, :, None]
        expected.append(torch.einsum("bhk,bhkv->bhv", phi_q[:, t], S) / (math.e * math.sqrt(5 * (math.e**2 - 1))))
    assert torch.allclose(h, torch.stack(expected, 1), rtol=1e-4, atol=1e-7)


def test_variance_reduction_gives_unit_variance():
    K = 64
    x, y = torch.randn(2, 200_000, K, dtype=torch.float64).unbind(0)
    products = (x.exp() * y.exp()).sum(-1)
    assert math.isclose(products.var().item() * variance_reduction(K) ** 2, 1.0, rel_tol=0.2)


@pytest.mark.parametrize("outlier", [200.0, 1e4])
def test_outliers_beyond_any_range_stay_finite(outlier):
    inputs = make(100, (3, 3, 8, 8), "value", "plain")
    inputs[1][:, 30, :, 2] = outlier
    leaves = [x.requires_grad_() for x in inputs]
    h, (S, m) = regla_attention(*leaves, output_final_state=True)
    assert h.isfinite().all() and S.isfinite().all() and m.isfinite().all()
    assert (h.abs().amax(-1) > 0).all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(h.sum(), leaves))
