"""The delta rule from raw logits equals, in every form, the definition on what the logits stand for, in float64."""

import itertools

import pytest
import torch
from torch.nn.functional import rms_norm

from regla.ops import QKNorm, gated_delta_attention, regla_delta_attention
from regla.ops.call import Call, Forms, Gates, HeadNorm
from regla.ops.delta import attend_delta
from regla.ops.features import UNIT_MAPS
from regla.ops.output_norm import output_norm

from .definition import overall
from .test_delta import FORWARD, GRADIENT, backward, definition

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning")  # the interpreter's
NAMES = ["q", "k", "v", "beta", "gate", "refine", "S", "q_norm", "k_norm"]


def make(T, shape, B=1, per_head=False, spread=3.0):
    """q, k, v, beta, gate, refine, S, weights of the norms; the logits of gates from closed to open."""
    HQ, H, K, V = shape
    gate, refine = (spread * torch.randn(B, T, H, 1 if per_head else K) for _ in range(2))
    norms = [1 + torch.rand(K) for _ in range(2)]
    q, k = 2 * torch.randn(B, T, HQ, K), 2 * torch.randn(B, T, H, K)
    return [q, k, torch.randn(B, T, H, V), 2 * torch.randn(B, T, H), gate, refine, torch.randn(B, H, K, V), *norms]


def phi(x, feature_map):
    e = torch.exp(x) if feature_map == "unit_safe_exp" else x * torch.sigmoid(x)
    return e / e.square().sum(-1, keepdim=True).sqrt()


def by_definition(
    q, k, v, beta, gate, refine, S, q_norm, k_norm, mask=None, beta_max=1.0, eps=None, feature_map="unit_safe_exp"
):
    if eps is not None:
        q, k = rms_norm(q, q_norm.shape, q_norm, eps), rms_norm(k, k_norm.shape, k_norm, eps)
    g, r = torch.sigmoid(gate), torch.sigmoid(refine)
    F = g * (g + 2 * r * torch.sigmoid(-gate))  # (1 - r) g^2 + r (1 - (1 - g)^2) without cancellation
    q, k = phi(q, feature_map), phi(k, feature_map)
    return definition(q, k, v, beta_max * torch.sigmoid(beta), F.log(), S, mask)


def run(leaves, backend, eps=None, **options):
    *inputs, S, q_norm, k_norm = leaves
    norm = None if eps is None else QKNorm(q_norm, k_norm, eps)
    return regla_delta_attention(
        *inputs, initial_state=S, output_final_state=True, backend=backend, qk_norm=norm, **options
    )


def gradients(o, S, leaves, eps):
    return backward(o, S, leaves if eps is not None else leaves[:7])


CASES = {
    "groups": ((45, (4, 2, 16, 8)), {}),
    "one token": ((1, (1, 1, 24, 16)), {}),
    "a gate a head, beta up to 2": ((40, (2, 2, 17, 9), 1, True), {"beta_max": 2.0}),
    "deep": ((70, (2, 1, 16, 16), 1, False, 20.0), {}),
    "norm": ((35, (2, 1, 20, 16)), {"eps": 1e-6}),
    "silu, groups": ((45, (4, 2, 17, 8)), {"feature_map": "unit_silu"}),
    "silu, norm": ((35, (2, 1, 20, 16)), {"feature_map": "unit_silu", "eps": 1e-6}),
    "silu, wide heads": ((20, (1, 1, 100, 16)), {"feature_map": "unit_silu", "eps": 1e-6}),
}


@pytest.mark.parametrize("case", CASES)
def test_equal_to_the_definition(case, backend):
    sizes, options = CASES[case]
    inputs = make(*sizes)
    leaves = [x.double().requires_grad_() for x in inputs]
    o, S = by_definition(*leaves, **options)
    expected = gradients(o, S, leaves, options.get("eps"))
    leaves = [x.clone().requires_grad_() for x in inputs]
    found, state = run(leaves, backend, **options)
    assert overall(found.detach(), o.detach()) <= FORWARD and overall(state.detach(), S.detach()) <= FORWARD
    for name, x, right in zip(NAMES, gradients(found, state, leaves, options.get("eps")), expected, strict=False):
        assert x.isfinite().all() and overall(x, right) <= GRADIENT, name


@pytest.mark.parametrize("feature_map", UNIT_MAPS)
def test_padding_holds_anything(backend, feature_map):
    mask = torch.tensor([[False, True, True, False, True, False]])
    inputs = make(6, (2, 1, 16, 8))
    results = []
    for junk in (0.0, torch.nan):
        leaves = [
            x if i >= 6 else torch.where(mask.view(1, 6, *(1,) * (x.ndim - 2)), x, junk) for i, x in enumerate(inputs)
        ]
        leaves = [x.clone().requires_grad_() for x in leaves]
        o, S = run(leaves, backend, eps=1e-6, mask=mask, feature_map=feature_map)
        results.append([o, S, *gradients(o, S, leaves, 1e-6)])
    assert (results[0][0][~mask] == 0).all()
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    leaves = [x.double().requires_grad_() for x in inputs]
    o, S = by_definition(*leaves, mask=mask, eps=1e-6, feature_map=feature_map)
    for x, right in zip(results[0], (o, S, *gradients(o, S, leaves, 1e-6)), strict=True):
        assert overall(x.detach(), right.detach()) <= GRADIENT


def test_packed_sequences(backend):
    bounds = [0, 3, 3, 40]
    *inputs, _, _, _ = make(40, (2, 1, 16, 8))
    S = torch.randn(3, 1, 16, 8)
    options = {"output_final_state": True, "backend": backend}
    o, state = regla_delta_attention(*inputs, initial_state=S, cu_seqlens=torch.tensor(bounds), **options)
    for n, (lo, hi) in enumerate(itertools.pairwise(bounds)):
        if lo == hi:
            assert torch.equal(state[n], S[n])
            continue
        right = regla_delta_attention(*(x[:, lo:hi] for x in inputs), initial_state=S[n : n + 1], **options)
        assert overall(o[:, lo:hi], right[0].double()) <= FORWARD
        assert overall(state[n : n + 1], right[1].double()) <= FORWARD


STEPS = {
    "groups and a norm": ((2, 1, 16, 24), {"qk_norm": True, "norm": True}),
    "a gate a head, beta up to 2": ((2, 2, 17, 9), {"per_head": True, "beta_max": 2.0}),
    "a norm with a bias": ((1, 1, 24, 16), {"norm": True, "bias": True}),
    "silu": ((2, 1, 17, 16), {"feature_map": "unit_silu"}),
    "silu, groups and a norm": ((2, 1, 16, 24), {"feature_map": "unit_silu", "qk_norm": True, "norm": True}),
}


@pytest.mark.usefixtures("operation")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", STEPS)
def test_a_token_in_one_launch(case, dtype):
    """Equal to the recurrence, token after token, with padding among them; the state is overwritten where it lies."""
    (HQ, H, K, V), options = STEPS[case]
    *inputs, S, q_norm, k_norm = make(5, (HQ, H, K, V), B=2, per_head=options.get("per_head", False))
    inputs = [x.to(dtype) for x in inputs]
    mask = torch.tensor([[True, True, False, True, True], [False, True, True, True, False]])
    qk_norm = QKNorm(q_norm, k_norm, 1e-6) if options.get("qk_norm") else None
    norm = None
    if options.get("norm"):
        norm = HeadNorm(torch.rand(HQ, V), torch.rand(HQ, V) if options.get("bias") else None, 1e-5)
    beta_max = options.get("beta_max", 1.0)
    feature_map = options.get("feature_map", "unit_safe_exp")
    forms = Forms(feature_map, beta_max)
    right, state = regla_delta_attention(
        *(x.double() for x in inputs), feature_map=feature_map, beta_max=beta_max, initial_state=S.double(),
        output_final_state=True, mask=mask, qk_norm=qk_norm and QKNorm(q_norm.double(), k_norm.double(), 1e-6),
        backend="recurrent",
    )  # fmt: skip
    if norm is not None:
        right = output_norm(right, norm.weight, norm.bias, eps=norm.eps, backend="chunked")
    for t in range(5):
        q, k, v, beta, gate, refine = (x[:, t : t + 1] for x in inputs)
        call = Call(q, k, v, Gates(gate, refine, write=beta), K**-0.5, None, mask[:, t : t + 1], None, S, None, qk_norm)
        o, after, is_normalised = attend_delta(call, forms, "triton", norm=norm, overwrite=True)
        assert after is S and is_normalised == (norm is not None)
        real = mask[:, t]
        assert overall(o[real].double(), right[real, t : t + 1]) <= (FORWARD if dtype == torch.float32 else 2.0**-8)
    assert overall(S.double(), state) <= FORWARD


@pytest.mark.usefixtures("operation")
def test_a_step_without_gates_from_features():
    q, k, v, S = torch.randn(1, 1, 2, 16), torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 8), torch.randn(1, 1, 16, 8)
    beta, before = torch.rand(1, 1, 1), S.clone()
    options = {"initial_state": S, "output_final_state": True}
    o, after = gated_delta_attention(q, k, v, beta, backend="triton", **options)
    right, state = gated_delta_attention(q, k, v, beta, backend="recurrent", **options)
    assert torch.equal(S, before)
    assert overall(o, right.double()) <= FORWARD and overall(after, state.double()) <= FORWARD


def test_bad_input():
    inputs = make(4, (2, 1, 16, 8))[:6]
    with pytest.raises(ValueError, match="beta_max is 3; expected a number above 0 and up to 2"):
        regla_delta_attention(*inputs, beta_max=3)
    with pytest.raises(ValueError, match="feature_map is 'silu'; expected one of 'unit_safe_exp', 'unit_silu'"):
        regla_delta_attention(*inputs, feature_map="silu")
    with pytest.raises(ValueError, match=r"refine_k has shape \[1, 4, 1, 1\]; expected \[1, 4, 1, 16\]"):
        regla_delta_attention(*inputs[:5], inputs[5][..., :1])
