"""Every form of the gated delta rule equals the definition in float64: outputs, final states and all gradients."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from regla.layers.feature_maps import UnitSafeExp
from regla.ops import gated_delta_attention
from regla.ops.dispatch import why_not_native, why_not_triton

from .definition import overall, per_token

FORWARD, GRADIENT = 1e-5, 2e-5  # of float32 against float64, over sums of some hundred terms
LENGTHS = [1, 2, 31, 65, 200]
SHAPES = [(2, 2, 33, 17), (3, 3, 16, 24), (6, 3, 16, 8)]  # HQ, H, K, V
DECAYS = ["none", "head", "channel", "extreme"]
WITH_KERNELS = [(1, "channel"), (31, "none"), (65, "head"), (65, "extreme")]  # Triton's interpreter is slow


def definition(q, k, v, beta, gk, S, mask=None):
    """S' = Diag(exp g) S, S = S' + beta k (v - S'^T k)^T, o = K^-1/2 S^T q: one token, one head at a time."""
    B, T, HQ, K = q.shape
    H = k.shape[2]
    o = []
    for t in range(T):
        real = torch.ones(B, dtype=torch.bool) if mask is None else mask[:, t]
        decayed = S if gk is None else gk[:, t].exp()[..., None] * S
        u = beta[:, t, :, None] * (v[:, t] - torch.einsum("bhkv,bhk->bhv", decayed, k[:, t]))
        S = torch.where(real[:, None, None, None], decayed + torch.einsum("bhk,bhv->bhkv", k[:, t], u), S)
        read = torch.einsum("bhgk,bhkv->bhgv", q[:, t].unflatten(1, (H, HQ // H)), S).flatten(1, 2) * K**-0.5
        o.append(torch.where(real[:, None, None], read, 0.0))
    return torch.stack(o, 1), S


def make(T: int, shape: tuple[int, int, int, int], decay: str, B: int = 1, parallel: bool = False, top: float = 1.0):
    """q, k, v, beta, gk, S: beta with a fifth of zeros and of its largest value, `top`; extreme decays with resets."""
    HQ, H, K, V = shape
    q, k = torch.randn(B, T, HQ, K), torch.randn(B, T, H, K)
    if parallel:  # where forward substitution is worst
        k = k[:, :1] + 1e-3 * k
    phi = UnitSafeExp("decay").phi if top == 1.0 else lambda x: normalize(x, dim=-1)
    beta = top * torch.rand(B, T, H)
    chance = torch.rand(B, T, H)
    beta = torch.where(chance < 0.2, 0.0, torch.where(chance > 0.8, top, beta))
    gk = None
    if decay != "none":
        gk = -(torch.rand(B, T, H, 1 if decay == "head" else K) ** 4)
    if decay == "extreme":
        gk = torch.where(torch.rand(B, T, H, 1) < 0.05, -1000.0, 60 * gk)
    return phi(q), phi(k), torch.randn(B, T, H, V), beta, gk, torch.randn(B, H, K, V)


def backward(o: Tensor, S: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(x.shape, generator=generator, device="cpu").to(x) for x in (o, S)]
    return torch.autograd.grad((o * weights[0]).sum() + (S * weights[1]).sum(), leaves)


def run(inputs, backend, **options):
    leaves = [None if x is None else x.clone().requires_grad_() for x in inputs]
    q, k, v, beta, gk, S0 = leaves
    o, S = gated_delta_attention(
        q, k, v, beta, gk, initial_state=S0, output_final_state=True, backend=backend, **options
    )
    return o.detach(), S.detach(), backward(o, S, [x for x in leaves if x is not None])


def quick_backends():
    """All but the kernels for GPUs."""
    x = torch.ones(1, 1, 1, 16)
    return ["recurrent", "chunked"] + (["native"] if why_not_native(x, x) is None else [])


def backends():
    x = torch.ones(1, 1, 1, 16)
    return quick_backends() + (["triton"] if why_not_triton(x, x) is None else [])


def assert_equal_to_definition(inputs, mask=None, only=None):
    leaves = [None if x is None else x.double().requires_grad_() for x in inputs]
    o, S = definition(*leaves, mask)
    expected = backward(o, S, [x for x in leaves if x is not None])
    for backend in only or backends():
        found, state, grads = run(inputs, backend, mask=mask)
        assert overall(found, o.detach()) <= FORWARD, backend
        assert overall(state, S.detach()) <= FORWARD, backend
        for index, (grad, right) in enumerate(zip(grads, expected, strict=True)):
            assert grad.isfinite().all() and overall(grad, right) <= GRADIENT, (backend, index)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("T", LENGTHS)
def test_lengths_and_decays(T, decay):
    shape = SHAPES[(LENGTHS.index(T) + DECAYS.index(decay)) % len(SHAPES)]
    only = None if (T, decay) in WITH_KERNELS else quick_backends()
    assert_equal_to_definition(make(T, shape, decay), only=only)


@pytest.mark.parametrize("top", [1.0, 2.0])
@pytest.mark.parametrize("decay", ["none", "channel"])
def test_nearly_parallel_keys(decay, top):
    only = None if top == 2.0 and decay == "none" else quick_backends()
    assert_equal_to_definition(make(97, (2, 2, 16, 16), decay, parallel=True, top=top), only=only)


def test_masks_anywhere():
    mask = torch.rand(2, 70) < 0.7
    mask[0, :20], mask[1, 50:] = False, False
    assert_equal_to_definition(make(70, SHAPES[2], "extreme", B=2), mask, quick_backends())


def test_padding_holds_anything(backend):
    mask = torch.tensor([[False, True, True, False, True, False]])
    q, k, v, beta, gk, S = make(6, (2, 2, 16, 8), "channel")
    results = []
    for junk in (0.0, torch.nan):
        filled = [torch.where(mask.view(1, 6, *(1,) * (x.ndim - 2)), x, junk) for x in (q, k, v, beta, gk)]
        results.append(run([*filled, S], backend, mask=mask))
    for (o, state, grads), (o_, state_, grads_) in itertools.pairwise(results):
        assert torch.equal(o, o_) and torch.equal(state, state_) and (o[~mask] == 0).all()
        assert all(torch.equal(a, b) for a, b in zip(grads, grads_, strict=True))


@pytest.mark.parametrize("decay", ["none", "channel", "extreme"])
def test_kernels_in_bfloat16(decay):
    """Operands are rounded to 2^-9; a result is some of them deep."""
    inputs = [x.bfloat16() if x is not None else None for x in make(70, (2, 1, 32, 32), decay)]
    inputs[-1] = inputs[-1].float()
    if why_not_triton(inputs[0], inputs[2]) is not None:
        pytest.skip("no GPU and no interpreter")
    leaves = [None if x is None else x.double().requires_grad_() for x in inputs]
    o, S = definition(*leaves)
    found, state, grads = run(inputs, "triton")
    for x, right in zip(
        (found, state, *grads), (o, S, *backward(o, S, [x for x in leaves if x is not None])), strict=True
    ):
        assert overall(x, right.detach()) <= 2.0**-7


@pytest.mark.parametrize("name", ["q", "k", "v", "beta", "gk"])
def test_a_nan_is_not_hidden(name, backend):
    """A NaN of one token is in everything that the definition computes from it."""
    inputs = make(40, (1, 1, 16, 8), "extreme")
    inputs[["q", "k", "v", "beta", "gk"].index(name)][:, 3, 0] = torch.nan
    expected, expected_state, expected_grads = run(inputs, "recurrent", validate=False)
    o, state, grads = run(inputs, backend, validate=False)
    for x, right in zip((o, state, *grads), (expected, expected_state, *expected_grads), strict=True):
        assert (x.isnan() | ~right.isnan()).all()


def test_packed_sequences(backend):
    """One with no token among them: its state is its initial state."""
    bounds = [0, 1, 34, 34, 40]
    q, k, v, beta, gk, _ = make(40, SHAPES[2], "channel" if backend == "triton" else "extreme")
    S = torch.randn(4, 3, 16, 8)
    o, state, grads = run([q, k, v, beta, gk, S], backend, cu_seqlens=torch.tensor(bounds))
    leaves = [x.double().requires_grad_() for x in (q, k, v, beta, gk, S)]
    parts = []
    for n, (lo, hi) in enumerate(itertools.pairwise(bounds)):
        S_n = leaves[5][n : n + 1]
        parts.append(definition(*(x[:, lo:hi] for x in leaves[:5]), S_n) if hi > lo else (None, S_n))
    o_, state_ = torch.cat([o for o, _ in parts if o is not None], 1), torch.cat([S for _, S in parts])
    assert overall(o, o_.detach()) <= FORWARD and overall(state, state_.detach()) <= FORWARD
    for grad, right in zip(grads, backward(o_, state_, leaves), strict=True):
        assert overall(grad, right) <= GRADIENT


def test_causal_to_the_last_bit(backend):
    q, k, v, beta, gk, S = make(40, (1, 1, 16, 8), "extreme")
    at = 35
    before, _ = gated_delta_attention(q, k, v, beta, gk, initial_state=S, backend=backend)
    for x in (q, k, v, beta, gk):
        changed = [y.clone() for y in (q, k, v, beta, gk)]
        index = next(i for i, y in enumerate((q, k, v, beta, gk)) if y is x)
        changed[index][:, at:] = changed[index][:, at:] * 0.3
        after, _ = gated_delta_attention(*changed, initial_state=S, backend=backend)
        assert torch.equal(before[:, :at], after[:, :at])
        assert not torch.equal(before[:, at:], after[:, at:])


def test_any_split_into_calls(backend):
    q, k, v, beta, gk, S = make(60, SHAPES[0], "extreme")
    whole, final = gated_delta_attention(q, k, v, beta, gk, initial_state=S, output_final_state=True, backend=backend)
    parts = []
    for lo, hi in itertools.pairwise([0, 1, 40, 60]):
        o, S = gated_delta_attention(
            *(x[:, lo:hi] for x in (q, k, v, beta, gk)), initial_state=S, output_final_state=True, backend=backend
        )
        parts.append(o)
    assert per_token(torch.cat(parts, 1), whole.double()) <= 1e-4 and overall(S, final.double()) <= FORWARD


def test_what_the_state_answers_is_replaced():
    """With beta 1 and one key, the state holds the last value alone; the additive rule would hold their sum."""
    k = normalize(torch.randn(1, 1, 1, 8), dim=-1).expand(1, 5, 1, 8)
    v = torch.randn(1, 5, 1, 4)
    o, _ = gated_delta_attention(k, k, v, torch.ones(1, 5, 1), scale=1.0)
    torch.testing.assert_close(o, v)


@pytest.mark.parametrize("backend", ["chunked", "native"], indirect=True)
def test_memory_grows_with_the_length_alone(backend):
    """A state is kept per chunk and no pairs of tokens: what is saved for the backward pass doubles with the length."""

    def saved(T):
        sizes = []
        q, k, v, beta, gk, S = (x.requires_grad_() for x in make(T, (1, 1, 16, 16), "channel"))
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            gated_delta_attention(q, k, v, beta, gk, initial_state=S, backend=backend)
        return sum(sizes)

    assert saved(1024) < 2.1 * saved(512)


def test_bad_input():
    q, k, v, beta, gk, _ = make(4, (2, 2, 16, 8), "channel")
    with pytest.raises(ValueError, match=r"beta has shape \[1, 4, 2, 1\] on .*; expected \[B, T, H\] = \[1, 4, 2\]"):
        gated_delta_attention(q, k, v, beta[..., None], gk)
    names = "'auto', 'recurrent', 'chunked', 'native', 'triton'"
    with pytest.raises(ValueError, match=f"backend is 'cuda'; expected one of {names}"):
        gated_delta_attention(q, k, v, beta, gk, backend="cuda")
    with pytest.raises(ValueError, match=r"gk holds 0\.5; log-decays are"):
        gated_delta_attention(q, k, v, beta, 0 * gk + 0.5, validate=True)
    with pytest.raises(ValueError, match="mask and cu_seqlens are both given"):
        gated_delta_attention(q, k, v, beta, gk, mask=torch.ones(1, 4) > 0, cu_seqlens=torch.tensor([0, 4]))
