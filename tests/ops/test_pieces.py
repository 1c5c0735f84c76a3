"""Decays inside a chunk, cut into pieces: where one piece is not enough, and where numbers are at their limits."""

import pytest
import torch

from regla.ops import chunked, gated_linear_attention, regla_attention
from regla.ops.pieces import REACH_KEY, REACH_VALUE, pieces
from regla.ops.slab import Part

from . import definition
from .test_forms import AXES, GLA, GRADIENT, SHAPES, make

C = 32


def log_decays(rate: float, *shape: int) -> torch.Tensor:
    """Of `rate` per token on average, 5 % of the tokens hard resets."""
    g = -2 * rate * torch.rand(shape)
    return torch.where(torch.rand(shape) < 0.05, -1000.0, g)


@pytest.mark.parametrize("rate", [0.1, 2.0, 30.0])
@pytest.mark.parametrize("reach", [REACH_VALUE, REACH_KEY])
def test_factors_multiply_to_the_decay(rate, reach):
    """The sum over the pieces of grow_t shrink_s is exp(decay over (s, t])."""
    M, D = 5, 7
    g = log_decays(rate, M, C, D)
    product, owners = torch.zeros(M, C, C, D, dtype=torch.float64), torch.zeros(M, C, D)
    for p in pieces(g, reach):
        rows = torch.arange(M) if p.rows is None else p.rows
        grow = p.grow.double()
        if p.far is not None:
            grow[p.far[0]] *= p.far[1]
        for factor in (p.grow, p.shrink) if p.far is None else (p.grow, p.shrink, p.far[1]):
            assert ((factor == 0) | (factor.abs() >= torch.finfo(torch.float32).tiny)).all() and factor.isfinite().all()
        product[rows] += grow[:, :, None] * p.shrink[:, None].double()
        owners[rows] += p.shrink > 0
    assert (owners == 1).all()
    start = torch.arange(C)
    between = (start[:, None, None] >= start[None, None]) & (start[None, None] > start[None, :, None])  # u in (s, t]
    expected = torch.einsum("tsu,mud->mtsd", between.double(), g.double()).exp()
    seen = (start[:, None] >= start)[None, :, :, None] & (expected > 1e-30)
    assert ((product - expected).abs() / expected)[seen.expand_as(expected)].max() < 1e-5


def test_slow_gates_need_one_piece():
    assert len(pieces(torch.full((3, C, 4), -1.1), REACH_KEY)) == 1
    assert len(pieces(torch.full((3, C, 4), -1.4), REACH_VALUE)) == 1
    fast = torch.full((3, C, 4), -0.1)
    fast[1, 20, 2] = -60.0
    one, two = pieces(fast, REACH_VALUE)
    assert one.rows is None and two.rows.tolist() == [1]


def outcome(inputs, dtype, **options):
    """Output, final state and gradients of a fixed random functional of both."""
    leaves = [None if x is None else x.to(dtype).requires_grad_() for x in inputs]
    if dtype == torch.float64 and not options:
        o, S = definition.gla(*leaves[:5], leaves[1].shape[-1] ** -0.5, leaves[5])
    else:
        o, S = gated_linear_attention(
            *leaves[:5], initial_state=leaves[5], output_final_state=True, backend="chunked", **options
        )
    generator = torch.Generator(o.device).manual_seed(3)
    functional = sum((x * torch.randn(x.shape, generator=generator).to(dtype)).sum() for x in (o, S))
    return [o, S, *torch.autograd.grad(functional, [x for x in leaves if x is not None])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("rate", [1.5, 5.0])
def test_lifted_keys_large_values_and_fast_gates(rate, axis, dtype):
    B, T, H, K, V, lift = 1, 100, 2, 64, 24, 2.0**48
    gk = log_decays(rate, B, T, H, K) if axis != "value" else None
    gv = log_decays(rate, B, T, H, V) if axis != "key" else None
    q, k, v = torch.rand(B, T, 2 * H, K), lift * torch.rand(B, T, H, K), 100 * torch.randn(B, T, H, V)
    inputs = [q, k, v, gk, gv, 100 * lift * torch.randn(B, H, K, V)]
    expected = outcome(inputs, torch.float64)
    found = outcome(inputs, dtype, validate=True)
    for i, (a, b) in enumerate(zip(expected, found, strict=True)):
        assert b.isfinite().all()
        assert definition.overall(b, a) <= (GLA if i < 2 else GRADIENT) * (1 if dtype == torch.float32 else 1e-8)


@pytest.mark.parametrize(("axis", "rate"), [("value", 6.0), ("key", 4.5)])
def test_what_decays_by_more_than_a_number_holds(axis, rate):
    """A state of 1e33 decayed by e^-120 or e^-90 in one chunk still outweighs what is written meanwhile."""
    q, k, v = torch.rand(1, 20, 1, 8), 1e-30 * torch.rand(1, 20, 1, 8), torch.rand(1, 20, 1, 8)
    g = torch.full((1, 20, 1, 8), -rate)
    gk, gv = (g, None) if axis == "key" else (None, g)
    S = 1e33 * torch.rand(1, 1, 8, 8)
    expected, _ = definition.gla(*(x if x is None else x.double() for x in (q, k, v, gk, gv)), 1.0, S.double())
    o, _ = gated_linear_attention(q, k, v, gk, gv, scale=1.0, initial_state=S, backend="chunked")
    assert definition.per_token(o, expected) < 1e-5


@pytest.mark.parametrize("axis", ["value", "key"])
def test_a_reset_takes_no_gradient(axis):
    """Not even from rounding: what lies before a reset is exactly nothing behind it."""
    q, k, v = torch.randn(3, 2, 70, 3, 16).unbind(0)
    g = -torch.rand(2, 70, 3, 16)
    reset = torch.rand(g.shape) < 0.05
    g = torch.where(reset, -1000.0, g).requires_grad_()
    o, _ = gated_linear_attention(q, k, v, **{"gv" if axis == "value" else "gk": g}, backend="chunked")
    (grad,) = torch.autograd.grad(o.square().sum(), g)
    assert (grad[reset] == 0).all() and (grad[~reset] != 0).float().mean() > 0.9


@pytest.mark.parametrize("axis", AXES)
def test_fast_gates_do_not_leak_the_future(axis):
    inputs = make(100, SHAPES[4], axis, "plain", B=2)
    inputs[3] = inputs[3] - 2
    before, _ = regla_attention(*inputs, gate_axis=axis, backend="chunked")
    for at in (1, 16, 31, 32, 50, 99):
        changed = [x.clone() for x in inputs]
        for x in changed:
            x[:, at:] += 3 * torch.randn_like(x[:, at:])
        after, _ = regla_attention(*changed, gate_axis=axis, backend="chunked")
        assert torch.equal(after[:, :at], before[:, :at]), f"token {at}"


def test_gradients_of_the_state_alone():
    """Where no loss looks at the output."""
    inputs = [torch.randn(1, 70, 2, 8) for _ in range(3)] + [-torch.rand(1, 70, 2, 8)]
    grads = []
    for backend in ("recurrent", "chunked"):
        leaves = [x.clone().requires_grad_() for x in inputs]
        q, k, v, g = leaves
        _, S = gated_linear_attention(q, k, v, gv=g, output_final_state=True, backend=backend)
        grads.append(torch.autograd.grad(S.square().sum(), [k, v, g]))
    for expected, grad in zip(*grads, strict=True):
        assert definition.overall(grad, expected.double()) <= GRADIENT


def test_slabs_do_not_matter(monkeypatch):
    """All heads at once, one head, one head of some of the sequences: the same numbers."""
    B, H = 5, 3
    inputs = [torch.randn(B, 100, n, 8) for n in (2 * H, H, H)] + [-torch.rand(B, 100, H, 8) for _ in range(2)]
    inputs.append(torch.randn(B, H, 8, 8))
    expected = outcome(inputs, torch.float32)
    heads = [Part(slice(None), slice(h, h + 1)) for h in range(H)]
    some = [Part(slice(b, b + 2), slice(h, h + 1)) for h in range(H) for b in range(0, B, 2)]
    for parts in (heads, some):
        monkeypatch.setattr(chunked, "_slabs", lambda *_, parts=parts: iter(parts))
        for a, b in zip(expected, outcome(inputs, torch.float32), strict=True):
            assert definition.overall(b, a.double()) <= 1e-6


def test_slabs_cover_every_head_of_every_sequence():
    for B, H, numel in [(4, 12, 1 << 17), (4, 12, 1 << 22), (3, 5, 1 << 10), (5, 2, 1 << 18), (1, 1, 1 << 30)]:
        seen = torch.zeros(B, H)
        for part in chunked._slabs(B, H, numel, torch.device("cpu")):
            seen[part.batch, part.heads] += 1
        assert (seen == 1).all()
