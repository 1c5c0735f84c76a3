"""Every form of the recurrence equals the float64 definition: outputs, final states and all gradients."""

import functools
import itertools

import pytest
import torch
from torch import Tensor

from regla.layers.norms import HeadRMSNorm
from regla.ops import gate_decays, gated_linear_attention, regla_attention, safe_exp_attention
from regla.ops.dispatch import why_not_native
from regla.ops.features import LIFT

from . import definition

LENGTHS = [1, 2, 37, 65, 200, 257]
SHAPES = [(2, 2, 33, 65), (3, 3, 48, 80), (9, 9, 16, 8), (12, 12, 8, 16), (9, 3, 16, 24)]  # HQ, H, K, V
AXES = ["value", "key", "both"]
FORWARD, GLA, GRADIENT = 1e-4, 1e-5, 2e-4


def gate_logits(scenario: str, *shape: int) -> tuple[Tensor, Tensor]:
    """Logits (gate, refine). "extreme": gates from 1 - 1e-7 (logit 16) to e^-60, 5 % of the tokens hard resets."""
    if scenario == "plain":
        return torch.randn(2, *shape).unbind(0)
    a = torch.where(torch.rand(shape) < 0.5, 16 * torch.rand(shape), -60 * torch.rand(shape) ** 3)
    a = torch.where(torch.rand(shape) < 0.5, a, 16 + torch.rand(shape))
    a = torch.where(torch.rand(*shape[:3], 1) < 0.05, -1000.0, a)
    return a, 4 * torch.randn(shape)


def width(axis: str, K: int, V: int) -> int:
    return {"value": V, "key": K, "both": K + V}[axis]


def make(T: int, shape: tuple[int, int, int, int], axis: str, scenario: str, B: int = 1) -> list[Tensor]:
    HQ, H, K, V = shape
    q, k, v = torch.randn(B, T, HQ, K), 2 * torch.randn(B, T, H, K), torch.randn(B, T, H, V)
    if scenario == "outliers":
        # In a sequence of a token or two, one; more would leave nothing but outliers, and gradients that are all 0.
        for size in (25.0, -25.0, 80.0, -80.0, 100.0) if T > 2 else (100.0,):
            b, t, h, i = (int(torch.randint(n, ())) for n in (B, T, H, K))
            k[b, t, h, i] = size
    return [q, k, v, *gate_logits("extreme" if scenario == "extreme" else "plain", B, T, H, width(axis, K, V))]


def some_state(N: int, H: int, K: int, V: int) -> tuple[Tensor, Tensor]:
    return 2.0**48 * torch.randn(N, H, K, V), 5 * torch.randn(N, H)


def normalised(h: Tensor) -> Tensor:
    return HeadRMSNorm(h.shape[2], h.shape[3], eps=1e-6).to(h.dtype)(h)


def step_by_step(q, k, v, gate, refine, *, initial_state, mask=None, **options):
    state, h = initial_state, []
    for t in range(k.shape[1]):
        now = slice(t, t + 1)
        part, state = regla_attention(
            *(x[:, now] for x in (q, k, v, gate, refine)),
            initial_state=state,
            mask=None if mask is None else mask[:, now],
            output_final_state=True,
            **options,
        )
        h.append(part)
    return torch.cat(h, 1), state


def chunked(*inputs, **options):
    return regla_attention(*inputs, backend="chunked", output_final_state=True, **options)


def native(*inputs, **options):
    return regla_attention(*inputs, backend="native", output_final_state=True, **options)


def _forms():
    """By name; the C kernels where the tests make their tensors on a CPU and there is a compiler."""
    forms = {"chunked": chunked, "step by step": functools.partial(step_by_step, backend="recurrent")}
    if why_not_native(torch.ones(1), torch.ones(1)) is None:
        forms |= {"native": native, "native step by step": functools.partial(step_by_step, backend="native")}
    return forms


def skip_without(backend):
    reason = why_not_native(torch.ones(1), torch.ones(1)) if backend == "native" else None
    if reason is not None:
        pytest.skip(reason)


def backward(h: Tensor, S: Tensor, leaves: list[Tensor], mask: Tensor | None = None) -> tuple[Tensor, ...]:
    """Gradients of a fixed random functional of the normalised output and the final state."""
    generator = torch.Generator(h.device).manual_seed(7)
    weights = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in (h, S)]
    out = normalised(h)
    if mask is not None:
        out = torch.where(mask[..., None, None], out, 0.0)
    return torch.autograd.grad((out * weights[0]).sum() + (S * 2.0**-48 * weights[1]).sum(), leaves)


def reference(inputs: list[Tensor], axis: str, S0: Tensor | None, m0: Tensor | None, mask: Tensor | None = None):
    leaves = [x.double().requires_grad_() for x in inputs] + ([] if S0 is None else [S0.double().requires_grad_()])
    q, k, v, gate, refine = leaves[:5]
    gk, gv = gate_decays(definition.log_refined_gate(gate, refine), axis, k.shape[-1], v.shape[-1])
    S = leaves[5] if S0 is not None else None
    h, S, m = definition.regla(q, k, v, gk, gv, S, None if m0 is None else m0.double(), mask)
    return h, S, m, backward(h, S, leaves, mask)


def assert_equal_to_definition(inputs, axis, S0=None, m0=None, mask=None, forms=None):
    h_ref, S_ref, m_ref, grads_ref = reference(inputs, axis, S0, m0, mask)
    keep = torch.ones(h_ref.shape[:2], dtype=torch.bool) if mask is None else mask
    for form, run in (forms or _forms()).items():
        leaves = [x.clone().requires_grad_() for x in inputs] + ([] if S0 is None else [S0.clone().requires_grad_()])
        state = None if S0 is None else (leaves[5], m0)
        h, (S, m) = run(*leaves[:5], gate_axis=axis, initial_state=state, mask=mask)
        assert definition.per_token(normalised(h)[keep], normalised(h_ref)[keep]) <= FORWARD, form
        seen = m_ref > -1e29
        assert torch.allclose(m.double()[seen], m_ref[seen], rtol=0, atol=1e-3), form
        assert definition.overall(S, S_ref) <= FORWARD, form
        names = ["q", "k", "v", "gate", "refine", "initial state"]
        for name, grad, expected in zip(names, backward(h, S, leaves, mask), grads_ref, strict=False):
            assert grad.isfinite().all(), f"{form}: gradient of {name}"
            assert definition.overall(grad, expected) <= GRADIENT, f"{form}: gradient of {name}"


CASES = [
    pytest.param(T, axis, marks=pytest.mark.slow if T == 200 or (T == 257 and axis != "both") else ())
    for T, axis in itertools.product(LENGTHS, AXES)
]


@pytest.mark.parametrize(("T", "axis"), CASES)
@pytest.mark.parametrize("scenario", ["plain", "extreme", "outliers"])
def test_lengths_gates_and_outliers(T, scenario, axis):
    shape = SHAPES[(LENGTHS.index(T) + AXES.index(axis)) % len(SHAPES)]
    _, H, K, V = shape
    # A first token alone has h along v whatever q and k are: their gradients are 0, and no relative error exists.
    state = some_state(1, H, K, V) if T == 1 else (None, None)
    assert_equal_to_definition(make(T, shape, axis, scenario), axis, *state)


@pytest.mark.parametrize(("shape", "axis"), list(itertools.product(SHAPES, AXES)))
def test_shapes_with_initial_state(shape, axis):
    _HQ, H, K, V = shape
    assert_equal_to_definition(make(65, shape, axis, "extreme", B=2), axis, *some_state(2, H, K, V))


@pytest.mark.parametrize("axis", AXES)
def test_masks_anywhere(axis):
    mask = torch.rand(3, 70) < 0.7
    mask[0, :20], mask[1, 50:] = False, False
    inputs = make(70, SHAPES[4], axis, "outliers", B=3)
    assert_equal_to_definition(inputs, axis, *some_state(3, 3, 16, 24), mask)


@pytest.mark.parametrize("backend", ["chunked", "native"])
@pytest.mark.parametrize("axis", AXES)
def test_padding_holds_anything(axis, backend):
    """The output and the gradients of the real tokens do not see what padding holds, not even nan."""
    skip_without(backend)
    mask = torch.rand(2, 40) < 0.6
    inputs = make(40, SHAPES[4], axis, "plain", B=2)
    results = []
    for junk in (0.0, torch.nan):
        leaves = [torch.where(mask[..., None, None], x, junk).requires_grad_() for x in inputs]
        h, _ = regla_attention(*leaves, gate_axis=axis, mask=mask, backend=backend)
        assert (h[~mask] == 0).all()
        grads = torch.autograd.grad(h.square().sum(), leaves)
        assert all((grad[~mask] == 0).all() for grad in grads)
        results.append([h, *grads])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("backend", ["chunked", "recurrent", "native"])
def test_packing_equals_separate_sequences(axis, backend):
    skip_without(backend)
    lengths = [1, 63, 64, 65, 2, 30]
    bounds = torch.tensor([0, *itertools.accumulate(lengths)])
    _HQ, H, K, V = SHAPES[4]
    inputs = make(int(bounds[-1]), SHAPES[4], axis, "extreme")
    S0, m0 = some_state(len(lengths), H, K, V)
    leaves = [x.clone().requires_grad_() for x in [*inputs, S0]]
    h, (S, m) = regla_attention(
        *leaves[:5],
        gate_axis=axis,
        initial_state=(leaves[5], m0),
        cu_seqlens=bounds,
        output_final_state=True,
        backend=backend,
    )
    grads = backward(h, S, leaves)
    expected = [
        reference([x[:, lo:hi] for x in inputs], axis, S0[n : n + 1], m0[n : n + 1])
        for n, (lo, hi) in enumerate(itertools.pairwise(bounds.tolist()))
    ]
    h_ref = torch.cat([e[0] for e in expected], 1)
    assert definition.per_token(normalised(h), normalised(h_ref)) <= FORWARD
    assert definition.overall(S, torch.cat([e[1] for e in expected])) <= FORWARD
    assert torch.allclose(m.double(), torch.cat([e[2] for e in expected]), rtol=0, atol=1e-3)
    # The functional of `backward` differs from sequence to sequence, so its gradients need a packed reference.
    packed = [x.double().requires_grad_() for x in [*inputs, S0]]
    parts = []
    for n, (lo, hi) in enumerate(itertools.pairwise(bounds.tolist())):
        q, k, v, gate, refine = (x[:, lo:hi] for x in packed[:5])
        gk, gv = gate_decays(definition.log_refined_gate(gate, refine), axis, K, V)
        parts.append(definition.regla(q, k, v, gk, gv, packed[5][n : n + 1], m0[n : n + 1].double()))
    expected_grads = backward(torch.cat([p[0] for p in parts], 1), torch.cat([p[1] for p in parts]), packed)
    for grad, reference_grad in zip(grads, expected_grads, strict=True):
        assert grad.isfinite().all()
        assert definition.overall(grad, reference_grad) <= GRADIENT


DECAYS = ["none", "key", "value", "both", "scalar key", "scalar value", "scalar both"]


def assert_gated_linear_attention_is_the_definition(T, shape, decays, backend, closed=-1000.0):
    """Outputs, state and gradients; one gate in twenty has the log-decay `closed`, the others 1e-7 to 55."""
    HQ, H, K, V = shape
    widths = (1, 1) if "scalar" in decays else (K, V)

    def log_decay(channels):
        g = -torch.exp(torch.empty(1, T, H, channels).uniform_(-16, 4))
        return torch.where(torch.rand(1, T, H, 1) < 0.05, closed, g)

    gk = log_decay(widths[0]) if "key" in decays or "both" in decays else None
    gv = log_decay(widths[1]) if "value" in decays or "both" in decays else None
    inputs = [torch.randn(1, T, n, d) for n, d in ((HQ, K), (H, K), (H, V))]
    inputs += [gk, gv, torch.randn(1, H, K, V)]
    outcomes = []
    for dtype in (torch.float64, torch.float32):
        leaves = [None if x is None else x.to(dtype).requires_grad_() for x in inputs]
        if dtype == torch.float64:
            o, S = definition.gla(*leaves[:5], K**-0.5, leaves[5])
        else:
            o, S = gated_linear_attention(
                *leaves[:5], initial_state=leaves[5], output_final_state=True, backend=backend
            )
        generator = torch.Generator(o.device).manual_seed(3)
        functional = sum((x * torch.randn(x.shape, generator=generator).to(dtype)).sum() for x in (o, S))
        outcomes.append([o, S, *torch.autograd.grad(functional, [x for x in leaves if x is not None])])
    for i, (expected, value) in enumerate(zip(*outcomes, strict=True)):
        assert value.isfinite().all()
        assert definition.overall(value, expected) <= (GLA if i < 2 else GRADIENT)


@pytest.mark.parametrize("decays", DECAYS)
@pytest.mark.parametrize("backend", ["chunked", "recurrent", "native"])
@pytest.mark.parametrize("T", LENGTHS)
def test_gated_linear_attention(T, backend, decays):
    skip_without(backend)
    shape = SHAPES[LENGTHS.index(T) % len(SHAPES)]
    assert_gated_linear_attention_is_the_definition(T, shape, decays, backend)


@pytest.mark.parametrize("backend", ["chunked", "native"])
@pytest.mark.parametrize("outlier", [25.0, 80.0, 100.0])
@pytest.mark.parametrize("axis", AXES)
def test_recovery_after_an_outlier(axis, outlier, backend):
    """A key outlier is forgotten at the rate of the slowest channel; then the output is what it was without it."""
    skip_without(backend)
    T, at = 360, 20
    inputs = make(T, (2, 2, 16, 16), axis, "plain")
    inputs[3] = inputs[3].clamp_max(1.0)  # gates of at most 0.73, refined 0.93: e^-100 takes at most some 100 tokens
    inputs[4] = inputs[4].clamp_max(0.0)
    clean, _ = regla_attention(*inputs, gate_axis=axis, backend=backend)
    inputs[1][0, at, :, 3] = outlier
    h, (_, m) = regla_attention(*inputs, gate_axis=axis, output_final_state=True, backend=backend)
    assert (m < 10).all()
    assert definition.per_token(normalised(h)[:, :at], normalised(clean)[:, :at].double()) == 0
    assert definition.per_token(normalised(h)[:, at : at + 1], normalised(clean)[:, at : at + 1].double()) > 0.1
    assert definition.per_token(normalised(h)[:, -1:], normalised(clean)[:, -1:].double()) < 1e-4
    # The running maximum never comes down: the same outlier leaves later keys nothing to be told apart by.
    h, (_, m) = regla_attention(*inputs, gate_axis=axis, key_max="running", output_final_state=True, backend=backend)
    assert (m == outlier).all()


def test_the_lift_keeps_digits_behind_an_outlier(monkeypatch):
    """The stabiliser by itself does not: it comes down by the slowest channel of each token, the state by its own."""
    inputs = make(257, (2, 2, 16, 64), "value", "plain")
    inputs[1][0, 20, :, 3] = 108.0
    expected = normalised(reference(inputs, "value", None, None)[0])
    worst = {}
    for lift in (0, LIFT):
        monkeypatch.setattr("regla.ops.features.LIFT", lift)
        worst[lift] = definition.per_token(normalised(regla_attention(*inputs, backend="chunked")[0]), expected)
    assert worst[LIFT] < 1e-5 and worst[0] > 1e-4


@pytest.mark.parametrize("backend", ["chunked", "native"])
@pytest.mark.parametrize("cuts", [[100], [1, 2, 3], [64, 128], [63, 65, 199]])
@pytest.mark.parametrize("axis", AXES)
def test_any_split_into_calls(axis, cuts, backend):
    skip_without(backend)
    inputs = make(200, SHAPES[4], axis, "outliers", B=2)
    options = {"gate_axis": axis, "output_final_state": True, "backend": backend}
    whole, (S, _m) = regla_attention(*inputs, **options)
    state, parts = None, []
    for lo, hi in itertools.pairwise([0, *cuts, 200]):
        h, state = regla_attention(*(x[:, lo:hi] for x in inputs), initial_state=state, **options)
        parts.append(h)
    assert definition.per_token(normalised(torch.cat(parts, 1)), normalised(whole).double()) <= FORWARD
    assert definition.overall(state[0], S.double()) <= FORWARD


@pytest.mark.parametrize("backend", ["chunked", "native"])
def test_zeros_are_an_empty_state(backend):
    """Also where every key lies far below 0, the m of an empty state."""
    skip_without(backend)
    q, k, v, gate, refine = make(50, SHAPES[4], "value", "plain")
    k = k - 95
    zeros = torch.zeros(1, 3, 16, 24), torch.zeros(1, 3)
    for key_max in ("decay", "running"):
        h, _ = regla_attention(q, k, v, gate, refine, key_max=key_max, backend=backend)
        h_zeros, _ = regla_attention(q, k, v, gate, refine, initial_state=zeros, key_max=key_max, backend=backend)
        assert torch.equal(h, h_zeros)
        assert h.isfinite().all() and h.abs().amax(-1).min() > 1e-6
    nothing = torch.zeros(1, 50, dtype=torch.bool)
    _, state = regla_attention(q, k, v, gate, refine, mask=nothing, output_final_state=True, backend=backend)
    assert all((x == 0).all() for x in state)


@pytest.mark.parametrize("backend", ["chunked", "native"])
def test_total_reset(backend):
    """A log-decay of -inf on every channel of both axes forgets entirely, without nan."""
    skip_without(backend)
    q, k, v = torch.randn(3, 1, 80, 2, 8).unbind(0)
    gk, gv = (-torch.rand(2, 1, 80, 2, 8)).unbind(0)
    gk[:, 40], gv[:, 40] = -torch.inf, -torch.inf
    for options in ({"gk": gk}, {"gv": gv}, {"gk": gk, "gv": gv}):
        leaves = {name: g.clone().requires_grad_() for name, g in options.items()}
        h, _ = safe_exp_attention(q, k, v, **leaves, backend=backend)
        fresh, _ = safe_exp_attention(
            q[:, 40:], k[:, 40:], v[:, 40:], **{n: g[:, 40:] for n, g in options.items()}, backend=backend
        )
        assert definition.per_token(normalised(h)[:, 40:], normalised(fresh).double()) <= FORWARD
        assert all(g.isfinite().all() for g in torch.autograd.grad(h.sum(), list(leaves.values())))


@pytest.mark.parametrize("backend", ["chunked", "native"])
def test_bfloat16_inputs_and_float32_state(backend):
    skip_without(backend)
    inputs = make(100, SHAPES[4], "value", "plain")
    expected, _ = regla_attention(*inputs, backend=backend)
    h, (S, m) = regla_attention(*(x.bfloat16() for x in inputs), output_final_state=True, backend=backend)
    assert h.dtype == torch.bfloat16 and S.dtype == m.dtype == torch.float32
    assert definition.overall(normalised(h), normalised(expected).double()) < 0.05
    with torch.autocast(expected.device.type, torch.bfloat16):
        h, _ = regla_attention(*inputs, backend=backend)
    assert torch.equal(h, expected)


@pytest.mark.slow
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("form", [chunked, native])
def test_compiled(axis, form):
    skip_without(form.__name__)
    torch.use_deterministic_algorithms(False)
    forms = {"compiled": torch.compile(form, fullgraph=True)}
    for scenario in ("plain", "extreme", "outliers"):
        assert_equal_to_definition(make(130, SHAPES[4], axis, scenario, B=2), axis, forms=forms)


@pytest.mark.parametrize("backend", ["auto", "recurrent", "chunked", "native", "triton"])
def test_an_empty_batch(backend):
    skip_without(backend)
    x = torch.zeros(0, 5, 2, 16, requires_grad=True)
    h, (S, m) = regla_attention(x, x, x, x, x, backend=backend, output_final_state=True)
    assert h.shape == (0, 5, 2, 16) and S.shape == (0, 2, 16, 16) and m.shape == (0, 2)
    h.sum().backward()
    assert x.grad.shape == x.shape
