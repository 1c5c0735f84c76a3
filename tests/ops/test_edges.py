"""At the edges of what can be given: infinite gate logits, empty sequences and batches, gradients of any size."""

import itertools

import pytest
import torch

from regla.ops import gated_linear_attention, log_refined_gate, regla_attention, safe_exp_attention
from regla.ops.dispatch import why_not_native, why_not_triton

from . import definition

BACKENDS = ["recurrent", "chunked", "native", "triton"]
AXES = ["value", "key", "both"]


def skip_without(backend):
    x = torch.ones(1, 1, 1, 16)
    reason = {"native": why_not_native, "triton": why_not_triton}.get(backend, lambda *_: None)(x, x)
    if reason is not None:
        pytest.skip(reason)


# ---- infinite logits of gates


@pytest.mark.parametrize("c", [-torch.inf, -3.0, 0.0, 3.0, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_an_infinite_logit_is_a_closed_or_an_open_gate(dtype, c):
    a = torch.tensor([-torch.inf, torch.inf], dtype=dtype, requires_grad=True)
    c = torch.full((2,), c, dtype=dtype, requires_grad=True)
    log_F = log_refined_gate(a, c)
    assert log_F.exp().tolist() == [0, 1] and log_F.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(log_F.exp().sum(), [a, c]))


@pytest.mark.parametrize("T", [1, 70])
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("refine", ["ordinary", "-inf", "inf"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_infinite_gate_logits(backend, refine, axis, T):
    """Of one channel, of a whole token, and of the first one; as with logits of 1e4 outputs, states and gradients."""
    skip_without(backend)
    T = min(T, 20) if backend == "triton" else T
    q, k, v = torch.randn(3, 2, T, 2, 16).unbind(0)
    gate, refining = torch.randn(2, 2, T, 2, 32 if axis == "both" else 16).unbind(0)
    gate[0, T // 2, 1] = -torch.inf
    gate[1, 0] = -torch.inf
    gate[0, T // 3, 0, 3], gate[0, T // 4, 0, 5] = -torch.inf, torch.inf
    if refine != "ordinary":
        refining[gate.isinf()] = float(refine)
    results = []
    for x in (gate, gate.clamp(-1e4, 1e4)):
        leaves = [y.clone().requires_grad_() for y in (q, k, v, x, refining)]
        h, (S, m) = regla_attention(*leaves, gate_axis=axis, backend=backend, output_final_state=True)
        grads = torch.autograd.grad(h.square().sum() + (S * 2.0**-48).square().sum(), leaves)
        results.append([h.detach(), S.detach(), m, *grads])
        with torch.no_grad():
            step, _ = regla_attention(*leaves, gate_axis=axis, backend=backend)
        assert torch.allclose(step, h, rtol=1e-5, atol=1e-6)
    for found, expected in zip(*results, strict=True):
        assert found.isfinite().all()
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())


# ---- gradients of any size


def gradients(attention, backend, inputs, of_outputs, of_state, cu_seqlens):
    leaves = [x.clone().requires_grad_() for x in inputs]
    q, k, v, g = leaves
    options = {"output_final_state": True, "backend": backend, "cu_seqlens": cu_seqlens, "validate": False}
    o, S = attention(q, k, v, -torch.nn.functional.softplus(g), **options)
    S = S if attention is gated_linear_attention else S[0]
    return torch.autograd.grad(of_outputs * o.sum() + of_state * S.sum(), leaves)


SIZES = [(1e-30, 1e12), (1e-30, 1.0), (1e12, 1e-30), (1.0, 1e-30), (1.0, 1.0), (0.0, 1e12)]


@pytest.mark.parametrize(("of_outputs", "of_state"), [*SIZES, (1e-38, 1.0), (1e-38, 1e12)])
@pytest.mark.parametrize("attention", [gated_linear_attention, safe_exp_attention])
@pytest.mark.parametrize("bounds", [None, [0, 3, 3, 70]])
@pytest.mark.parametrize("backend", ["chunked", "native", "recurrent"])
def test_gradients_through_outputs_and_state_of_unequal_size(backend, bounds, attention, of_outputs, of_state):
    skip_without(backend)
    if backend == "recurrent" and of_outputs == 1e-38 and attention is safe_exp_attention:
        pytest.skip("lowered by 2^48, such gradients are beyond float32, and the recurrence has no units")
    inputs = torch.randn(4, 1, 70, 2, 8).unbind(0)
    bounds = None if bounds is None else torch.tensor(bounds)
    exact = [x.double() for x in inputs]
    expected = gradients(attention, "recurrent", exact, of_outputs, of_state, bounds)
    found = gradients(attention, backend, inputs, of_outputs, of_state, bounds)
    for name, x, y in zip(("q", "k", "v", "g"), found, expected, strict=True):
        is_equal = x.isfinite().all() and definition.overall(x, y) < 1e-5
        assert is_equal or ((y == 0).all() and (x == 0).all()), name


@pytest.mark.parametrize("backend", ["chunked", "native"])
def test_every_sequence_and_head_has_its_own_size_of_gradients(backend):
    skip_without(backend)
    inputs = torch.randn(4, 1, 70, 2, 8).unbind(0)
    weights = torch.tensor([1e-30, 1e12])[:, None]
    bounds = torch.tensor([0, 30, 70])

    def run(inputs, backend):
        q, k, v, g = leaves = [x.clone().requires_grad_() for x in inputs]
        o, S = gated_linear_attention(q, k, v, -g.square(), backend=backend, output_final_state=True, cu_seqlens=bounds)
        of_tokens = torch.where(torch.arange(70)[:, None, None] < 30, weights.flip(0), weights)
        loss = (o * of_tokens.to(o.dtype)).sum() + (S * torch.stack([weights, weights.flip(0)])[..., None].to(S)).sum()
        return torch.autograd.grad(loss, leaves)

    for x, y in zip(run(inputs, backend), run([x.double() for x in inputs], "recurrent"), strict=True):
        for rows, h in itertools.product((slice(0, 30), slice(30, 70)), (0, 1)):
            assert definition.overall(x[:, rows, h], y[:, rows, h]) < 1e-5


# ---- nothing


@pytest.mark.parametrize("validate", [None, False])
@pytest.mark.parametrize("bounds", [[0, 5, 5, 8], [0, 0, 8], [0, 8, 8], [0, 0, 5, 5, 5, 8, 8]])
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_sequences_keep_their_state(backend, bounds, validate):
    """Among the others: state, m and gradient are those of the initial state, and the others are as without them."""
    skip_without(backend)
    N, T = len(bounds) - 1, bounds[-1]
    q, k, v = torch.randn(3, 1, T, 2, 16).unbind(0)
    gate, refine = torch.randn(2, 1, T, 2, 16).unbind(0)
    S0, m0 = 2.0**48 * torch.randn(N, 2, 16, 16), torch.randn(N, 2)
    S0.requires_grad_()
    options = {"output_final_state": True, "backend": backend, "validate": validate}
    inputs = q, k, v, gate, refine
    cu_seqlens = torch.tensor(bounds)
    h, (S, m) = regla_attention(*inputs, initial_state=(S0, m0), cu_seqlens=cu_seqlens, **options)
    (d_S0,) = torch.autograd.grad((S * torch.arange(1.0, N + 1)[:, None, None, None]).sum(), S0)
    for n, (lo, hi) in enumerate(itertools.pairwise(bounds)):
        if lo == hi:
            assert torch.equal(S[n], S0[n]) and torch.equal(m[n], m0[n]) and (d_S0[n] == n + 1).all()
            continue
        alone = slice(n, n + 1)
        parts = [x[:, lo:hi] for x in inputs]
        h_alone, (S_alone, m_alone) = regla_attention(*parts, initial_state=(S0[alone], m0[alone]), **options)
        assert torch.allclose(h[:, lo:hi], h_alone, rtol=1e-4, atol=1e-5)
        assert torch.allclose(S[alone], S_alone, rtol=1e-4, atol=1e-4 * 2.0**48)
        assert torch.allclose(m[alone], m_alone, atol=1e-5)
        assert d_S0[n].isfinite().all()
    empty = [n for n, (lo, hi) in enumerate(itertools.pairwise(bounds)) if lo == hi]
    for attention in (gated_linear_attention, safe_exp_attention):
        _, state = attention(q, k, v, cu_seqlens=cu_seqlens, **options)
        for x in (state,) if torch.is_tensor(state) else state:
            assert (x[empty] == 0).all() and x.isfinite().all()


@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_an_empty_batch_gives_empty_results(backend, T):
    """With every kind of gate, with a mask and with a state."""
    skip_without(backend)
    q, k, v, g = torch.randn(4, 0, T, 2, 16).unbind(0)
    mask, S, m = torch.ones(0, T, dtype=torch.bool), torch.zeros(0, 2, 16, 16), torch.zeros(0, 2)
    leaves = [x.requires_grad_() for x in (q, k, v, g)]
    for gates in ({}, {"gk": g}, {"gv": g}, {"gk": g, "gv": g[..., :1]}):
        o, S_after = gated_linear_attention(q, k, v, **gates, initial_state=S, output_final_state=True, backend=backend)
        h, state = safe_exp_attention(
            q, k, v, **gates, mask=mask, initial_state=(S, m), output_final_state=True, backend=backend
        )
        assert (
            o.shape == h.shape == v.shape and S_after.shape == state[0].shape == S.shape and state[1].shape == m.shape
        )
        grads = torch.autograd.grad(o.sum() + h.sum(), leaves, allow_unused=True)
        assert all(x is None or x.shape == v.shape for x in grads)
