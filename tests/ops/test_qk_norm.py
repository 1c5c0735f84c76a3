"""A norm of q and k inside of the operation equals one before it, on every backend."""

import itertools

import pytest
import torch
from torch.nn.functional import rms_norm

from regla.ops import QKNorm, safe_exp_attention
from regla.ops.dispatch import why_not_native, why_not_triton

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
AXES = ["value", "key", "both"]
EPS = 1e-3


def need(backend, x):
    why_not = {"triton": why_not_triton, "native": why_not_native}.get(backend)
    reason = why_not and why_not(x, x)
    if reason:
        pytest.skip(reason)


def make(T, axis, *, B=1, HQ=4, H=2, K=20, V=33, dtype=torch.float32):
    """q, k, v and gates as keyword arguments, and the norm."""
    inputs = {"q": 3 * torch.randn(B, T, HQ, K), "k": 5 * torch.randn(B, T, H, K), "v": torch.randn(B, T, H, V)}
    for name, D in (("k", K), ("v", V)):
        if axis in ("both", {"k": "key", "v": "value"}[name]):
            inputs |= {f"g{name}": torch.randn(B, T, H, D), f"refine_{name}": torch.randn(B, T, H, D)}
    inputs = {name: x.to(dtype).requires_grad_() for name, x in inputs.items()}
    return inputs, [(1.5 * torch.randn(K)).requires_grad_() for _ in range(2)]


def results(inputs, weights, *, inside, backend, **options):
    """Outputs, and gradients of inputs and weights."""
    if inside:
        h, state = safe_exp_attention(**inputs, qk_norm=QKNorm(*weights, EPS), backend=backend, **options)
    else:
        q, k = (rms_norm(inputs[n].to(w), w.shape, w, EPS) for n, w in zip("qk", weights, strict=True))
        h, state = safe_exp_attention(**inputs | {"q": q, "k": k}, backend=backend, **options)
    torch.manual_seed(1)
    d = torch.randn(h.shape).bfloat16().to(h.dtype)  # the same for both dtypes
    loss = (h * d).sum()
    if state is not None:
        loss = loss + (2.0**-48 * state[0] * torch.randn_like(state[0])).sum()
    return h.detach(), *torch.autograd.grad(loss, [*inputs.values(), *weights])


def assert_equal(inputs, weights, tolerance, backend, **options):
    found = results(inputs, weights, inside=True, backend=backend, **options)
    expected = results(inputs, weights, inside=False, backend=backend, **options)
    for name, x, y in zip(["h", *inputs, "q weight", "k weight"], found, expected, strict=True):
        assert x.dtype == y.dtype
        assert (x - y).abs().max() <= tolerance * y.abs().max(), name


@pytest.mark.parametrize("backend", ["recurrent", "chunked", "native", "triton"])
@pytest.mark.parametrize("axis", AXES)
def test_inside_is_before(axis, backend):
    inputs, weights = make(37, axis)
    need(backend, inputs["k"])
    assert_equal(inputs, weights, 2e-4, backend, output_final_state=True)


@pytest.mark.parametrize("axis", AXES)
def test_sequences_in_segments(axis, monkeypatch):
    inputs, weights = make(132, axis, K=16, V=16)
    need("triton", inputs["k"])
    from regla.ops.triton import operation

    monkeypatch.setattr(operation, "_segments", lambda heads, chunks, **_: (-(-chunks // 2), 2, 2))
    assert_equal(inputs, weights, 2e-4, "triton", output_final_state=True)


BACKENDS = ["recurrent", "chunked", "native", "triton"]


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize(("backend", "K"), [*((backend, 20) for backend in BACKENDS), ("triton", 160)])
def test_masks_with_nothing_in_the_padding(backend, K, axis):
    inputs, weights = make(40, axis, B=2, K=K)
    need(backend, inputs["k"])
    mask = torch.rand(2, 40) < 0.6
    clean = {name: torch.where(mask[..., None, None], x, 0.0).detach().requires_grad_() for name, x in inputs.items()}
    dirty = {n: torch.where(mask[..., None, None], x, torch.nan).detach().requires_grad_() for n, x in inputs.items()}
    expected = results(clean, weights, inside=False, backend="recurrent", mask=mask)
    found = results(dirty, weights, inside=True, backend=backend, mask=mask)
    for x, y in zip(found, expected, strict=True):
        assert (x - y).abs().max() <= 2e-4 * y.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_eps(backend):
    """What is not there, at a chunk's end and behind a mask, is not divided by its size."""
    inputs, weights = make(40, "key", B=2)
    need(backend, inputs["k"])
    mask = torch.arange(40) < torch.tensor([[40], [23]])
    norm = QKNorm(*weights, 0.0)
    h, (S, _) = safe_exp_attention(**inputs, qk_norm=norm, backend=backend, mask=mask, output_final_state=True)
    grads = torch.autograd.grad(h.sum() + 2.0**-48 * S.sum(), [*inputs.values(), *weights])
    assert all(x.isfinite().all() for x in (h, S, *grads))


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_a_norm_trains_on_one_token(backend):
    inputs, weights = make(1, "key")
    need(backend, inputs["k"])
    frozen = {name: x.detach() for name, x in inputs.items()}
    h = safe_exp_attention(**frozen, qk_norm=QKNorm(*weights, EPS), backend=backend)[0]
    assert (torch.autograd.grad((h * torch.linspace(-1, 1, h.shape[-1])).sum(), weights[0])[0] != 0).any()


def test_packed_sequences():
    inputs, weights = make(70, "key")
    need("triton", inputs["k"])
    bounds = torch.tensor([0, 13, 50, 70])
    assert_equal(inputs, weights, 2e-4, "triton", cu_seqlens=bounds)
    h = safe_exp_attention(**inputs, qk_norm=QKNorm(*weights, EPS), backend="triton", cu_seqlens=bounds)[0]
    for a, b in itertools.pairwise(bounds.tolist()):
        part = {name: x[:, a:b] for name, x in inputs.items()}
        alone = safe_exp_attention(**part, qk_norm=QKNorm(*weights, EPS), backend="triton")[0]
        assert (h[:, a:b] - alone).abs().max() <= 1e-5 * alone.abs().max()


@pytest.mark.parametrize("depth", [0.0, 20.0])
@pytest.mark.parametrize("axis", AXES)
def test_bfloat16(axis, depth):
    """Gates that forget within a token, too."""
    inputs, weights = make(75, axis, K=32, V=32, dtype=torch.bfloat16)
    need("triton", inputs["k"])
    for name in ("gk", "gv"):
        if name in inputs:
            inputs[name] = (
                (inputs[name].detach() - depth * torch.rand(inputs[name].shape[-1])).bfloat16().requires_grad_()
            )
    wide = {name: x.detach().float().requires_grad_() for name, x in inputs.items()}
    expected = results(wide, weights, inside=False, backend="chunked")
    found = results(inputs, weights, inside=True, backend="triton")
    for name, x, y in zip(["h", *inputs, "q weight", "k weight"], found, expected, strict=True):
        assert (x - y).norm() <= 0.01 * y.norm(), name


def test_no_later_token_has_a_say():
    inputs, weights = make(40, "key")
    need("triton", inputs["k"])
    later = {name: torch.where(torch.arange(40)[None, :, None, None] < 17, x, 3 * x) for name, x in inputs.items()}
    a, b = (safe_exp_attention(**x, qk_norm=QKNorm(*weights, EPS), backend="triton")[0] for x in (inputs, later))
    assert torch.equal(a[:, :17], b[:, :17])


def test_one_token_and_its_state():
    inputs, weights = make(9, "key")
    norm = QKNorm(*weights, EPS)
    h = safe_exp_attention(**inputs, qk_norm=norm, backend="recurrent")[0]
    with torch.no_grad():
        _, state = safe_exp_attention(**{n: x[:, :8] for n, x in inputs.items()}, qk_norm=norm, output_final_state=True)
        last = safe_exp_attention(**{n: x[:, 8:] for n, x in inputs.items()}, qk_norm=norm, initial_state=state)[0]
    last, expected = (x / x.norm(dim=-1, keepdim=True) for x in (last, h[:, 8:]))
    assert (last - expected).abs().max() <= 1e-4


def test_weights_that_do_not_fit():
    inputs, weights = make(5, "key")
    with pytest.raises(ValueError, match=r"eps of qk_norm is -1.0; expected a number of at least 0"):
        safe_exp_attention(**inputs, qk_norm=QKNorm(*weights, -1.0))
    with pytest.raises(ValueError, match=r"weight of k in qk_norm has shape \[3\].*expected \[20\]"):
        safe_exp_attention(**inputs, qk_norm=QKNorm(weights[0], weights[1][:3], EPS))
