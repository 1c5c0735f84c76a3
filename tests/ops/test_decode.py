"""The decode kernels, step by step, against the float64 definition: in C, and on a GPU or Triton's interpreter."""

import pytest
import torch
from torch import library

from regla.layers.norms import HeadLayerNorm, HeadRMSNorm
from regla.ops import gate_decays, regla_attention, safe_exp_attention
from regla.ops.attention import safe_exp_step_
from regla.ops.dispatch import step_engine, why_not_native, why_not_triton
from regla.ops.features import variance_reduction
from regla.ops.fused import _step_operation

from . import definition
from .test_forms import AXES, FORWARD, make, normalised, some_state

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, where infinities are meant

SHAPES = [(3, 1, 16, 24), (2, 2, 24, 16), (1, 1, 33, 65)]  # HQ, H, K, V


@pytest.fixture(params=["triton", "native"], autouse=True)
def engine(request):
    x = torch.ones(1, 1, 1, 16)
    reason = {"triton": why_not_triton, "native": why_not_native}[request.param](x, x)
    if reason is not None:
        pytest.skip(reason)
    return request.param


def logits(gate, refine, axis, K, V):
    """The arguments gk, gv, refine_k, refine_v."""
    (gk, gv), (refine_k, refine_v) = (gate_decays(x, axis, K, V) for x in (gate, refine))
    return {"gk": gk, "gv": gv, "refine_k": refine_k, "refine_v": refine_v}


def at(t, **tensors):
    return {name: None if x is None else x[:, t : t + 1] for name, x in tensors.items()}


def run(engine, q, k, v, S, m, **options):
    """All tokens, one after the other, S and m overwritten by each."""
    constant = {name: x for name, x in options.items() if not isinstance(x, torch.Tensor)}
    tensors = {name: x for name, x in options.items() if name not in constant}
    constant["engine"] = engine
    steps = [safe_exp_step_(S=S, m=m, **at(t, q=q, k=k, v=v, **tensors), **constant) for t in range(k.shape[1])]
    return torch.cat(steps, 1)


def empty_state(B, H, K, V):
    return torch.zeros(B, H, K, V), torch.zeros(B, H)


def assert_steps_equal_definition(engine, inputs, axis, state, mask=None):
    q, k, v, gate, refine = (x.double() for x in inputs)
    K, V = k.shape[-1], v.shape[-1]
    gk, gv = gate_decays(definition.log_refined_gate(gate, refine), axis, K, V)
    before = (None, None) if not state[0].any() else [x.double() for x in state]
    h_ref, S_ref, m_ref = definition.regla(q, k, v, gk, gv, *before, mask)
    S, m = state
    h = run(engine, *inputs[:3], S, m, **logits(*inputs[3:], axis, K, V), mask=mask)
    keep = torch.ones(k.shape[:2], dtype=torch.bool) if mask is None else mask
    assert definition.per_token(normalised(h)[keep], normalised(h_ref)[keep]) <= FORWARD
    seen = m_ref > -1e29
    assert torch.allclose(m.double()[seen], m_ref[seen], rtol=0, atol=1e-3)
    assert definition.overall(S, S_ref) <= FORWARD


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("scenario", ["plain", "extreme", "outliers"])
def test_steps_equal_the_definition(engine, scenario, axis):
    shape = SHAPES[AXES.index(axis)]
    _, H, K, V = shape
    state = some_state(1, H, K, V) if scenario == "extreme" else empty_state(1, H, K, V)
    assert_steps_equal_definition(engine, make(25, shape, axis, scenario), axis, state)


@pytest.mark.parametrize("size", [25.0, -25.0, 80.0, -80.0, 100.0])
def test_an_outlier_and_a_reset(engine, size):
    """Tokens behind an outlier key, and behind gates of e^-1000 that then make all forgotten."""
    inputs = make(16, SHAPES[0], "value", "plain")
    inputs[1][:, 4, :, 3] = size
    inputs[3][:, 10] = -1000.0
    assert_steps_equal_definition(engine, inputs, "value", empty_state(1, 1, 16, 24))


def test_an_output_that_would_vanish_is_held(engine):
    """Where the query looks past the outlier: the raw output as the recurrence gives it, not some 2^-120."""
    q, k, v, gate, refine = make(2, SHAPES[0], "value", "plain")
    k[:, 0, :, 3], q[:, 1, :, 3] = 100.0, -80.0
    S, m = empty_state(1, 1, 16, 24)
    h = run(engine, q, k, v, S, m, **logits(gate, refine, "value", 16, 24))
    expected, _ = regla_attention(q, k, v, gate, refine, backend="recurrent")
    assert definition.per_token(h, expected.double()) <= FORWARD
    assert 0.99 * 2.0**-60 < h[:, 1].abs().amax(-1).max() < 2.0**-50


@pytest.mark.parametrize("axis", AXES)
def test_padding_leaves_the_state_as_it_is(engine, axis):
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, :5], mask[1, 4:7] = False, False
    inputs = make(12, SHAPES[0], axis, "plain", B=2)
    inputs = [torch.where(mask[..., None, None], x, torch.nan) for x in inputs]
    S, m = empty_state(2, 1, 16, 24)
    options = logits(*inputs[3:], axis, 16, 24)
    for t in range(12):
        S_before, m_before = S.clone(), m.clone()
        h = safe_exp_step_(
            engine=engine, S=S, m=m, **at(t, **dict(zip("qkv", inputs, strict=False)), **options, mask=mask)
        )
        padded = ~mask[:, t]
        assert torch.equal(S[padded], S_before[padded]) and torch.equal(m[padded], m_before[padded])
        assert (h[padded] == 0).all() and (h[~padded] != 0).all()
    clean = [torch.where(mask[..., None, None], x, 0.0) for x in inputs]
    assert_steps_equal_definition(engine, clean, axis, empty_state(2, 1, 16, 24), mask)


def test_zeros_are_an_empty_state(engine):
    """Also where every key lies far below the m of an empty state."""
    q, k, v, gate, refine = make(3, SHAPES[0], "value", "plain")
    options = logits(gate, refine, "value", 16, 24)
    S, m = empty_state(1, 1, 16, 24)
    S_other, m_other = S.clone(), m + 90
    for key_max in ("decay", "running"):
        h, h_other = (run(engine, q, k - 95, v, *s, **options, key_max=key_max) for s in ((S, m), (S_other, m_other)))
        assert torch.equal(h, h_other) and torch.equal(m, m_other) and m.item() < -80
        assert h.isfinite().all() and h.abs().amax(-1).min() > 1e-6
        for x in (S, S_other):
            x.zero_()
        m_other.fill_(90.0)


@pytest.mark.parametrize("decays", ["none", "key", "value", "both", "scalar key", "scalar value"])
@pytest.mark.parametrize("key_max", ["decay", "running"])
def test_log_decays(engine, decays, key_max):
    T, (HQ, H, K, V) = 12, SHAPES[0]

    def log_decay(channels):
        g = -torch.exp(torch.empty(1, T, H, channels).uniform_(-16, 4))
        g[:, 7] = -torch.inf
        return g

    scalar = "scalar" in decays
    gk = log_decay(1 if scalar else K) if "key" in decays or decays == "both" else None
    gv = log_decay(1 if scalar else V) if "value" in decays or decays == "both" else None
    q, k, v = torch.randn(1, T, HQ, K), 2 * torch.randn(1, T, H, K), torch.randn(1, T, H, V)
    S, m = empty_state(1, H, K, V)
    h = run(engine, q, k, v, S, m, gk=gk, gv=gv, key_max=key_max)
    expected, (S_ref, m_ref) = safe_exp_attention(
        q, k, v, gk, gv, key_max=key_max, backend="recurrent", output_final_state=True
    )
    assert definition.per_token(normalised(h), normalised(expected).double()) <= FORWARD
    assert definition.overall(S, S_ref.double()) <= FORWARD and torch.allclose(m, m_ref)


@pytest.mark.parametrize("norm", [HeadRMSNorm, HeadLayerNorm])
@pytest.mark.parametrize("shape", SHAPES[::2])
def test_the_norm_inside_is_the_layers(engine, norm, shape):
    HQ, H, K, V = shape
    module = norm(HQ, V, 1e-2)  # an eps that shows
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    inputs = make(4, shape, "value", "outliers")
    options = logits(*inputs[3:], "value", K, V)
    affine = {"weight": module.weight.detach(), "bias": None if norm is HeadRMSNorm else module.bias.detach()}
    for t in range(4):
        state = some_state(1, H, K, V)
        now = at(t, **dict(zip("qkv", inputs, strict=False)), **options)
        h = safe_exp_step_(engine=engine, **now, S=state[0].clone(), m=state[1].clone())
        o = safe_exp_step_(engine=engine, **now, S=state[0].clone(), m=state[1].clone(), **affine, eps=1e-2)
        assert definition.per_token(o, module(h).detach().double()) <= 1e-5


def test_the_public_operation_takes_it_and_copies_the_state(engine):
    q, k, v, gate, refine = make(1, SHAPES[0], "value", "plain")
    S, m = some_state(1, 1, 16, 24)
    S_kept, m_kept = S.clone(), m.clone()
    options = {"initial_state": (S, m), "output_final_state": True}
    h, (S_after, m_after) = regla_attention(q, k, v, gate, refine, backend=engine, **options)
    assert torch.equal(S, S_kept) and torch.equal(m, m_kept)
    h_ref, (S_ref, _) = regla_attention(q, k, v, gate, refine, backend="recurrent", **options)
    assert definition.per_token(normalised(h), normalised(h_ref).double()) <= FORWARD
    assert definition.overall(S_after, S_ref.double()) <= FORWARD
    h_step = safe_exp_step_(q, k, v, S, m, **logits(gate, refine, "value", 16, 24), engine=engine)
    assert torch.equal(h_step, h) and torch.equal(S, S_after) and torch.equal(m, m_after)
    first, state = regla_attention(q, k, v, gate, refine, backend=engine)
    assert state is None and definition.per_token(normalised(first), normalised(v.expand_as(h)).double()) <= FORWARD


def test_who_takes_it(engine):
    x = torch.ones(1, 1, 1, 16)
    assert step_engine(engine, "decay", x, x) == engine
    expected = "triton" if x.is_cuda else None if why_not_native(x, x) else "native"
    assert step_engine("auto", "decay", x, x) == expected
    wide = torch.ones(1, 1, 1, 256)
    assert step_engine(engine, "running", wide, wide) == engine
    assert step_engine(engine, "sequence", x, x) is None
    assert step_engine("recurrent", "decay", x, x) is None
    assert step_engine(engine, "decay", x.expand(1, 2, 1, 16), x) is None
    assert step_engine(engine, "decay", x, x, None, x.clone().requires_grad_()) is None
    too_wide = torch.ones(1, 1, 1, 257)
    assert step_engine(engine, "decay", too_wide, x) == {"native": "native", "triton": None}[engine]
    with torch.no_grad():
        assert step_engine(engine, "decay", x, x, x.clone().requires_grad_()) == engine


def test_a_state_of_other_rows_is_refused(engine):
    """A kernel would read and write past its end."""
    q, k, v, _, _ = make(1, SHAPES[0], "value", "plain", B=2)
    with pytest.raises(ValueError, match=r"initial_state has shape \[1, 1, 16, 24\]; expected \[N, H, K, V\] = \[2, 1"):
        safe_exp_step_(q, k, v, *empty_state(1, 1, 16, 24), engine=engine)


def test_gradients_of_one_token_go_elsewhere(engine):
    leaves = [x.requires_grad_() for x in make(1, SHAPES[0], "value", "plain")]
    S, m = some_state(1, 1, 16, 24)
    gradients = []
    for backend in (engine, "recurrent"):
        h, _ = regla_attention(*leaves, initial_state=(S, m), backend=backend)
        gradients.append(torch.autograd.grad(normalised(h).sum(), leaves))
    for one, other in zip(*gradients, strict=True):
        assert definition.overall(one, other.double()) <= 2e-4


@pytest.mark.parametrize("shape", [(1, 1, 160, 40), (1, 1, 40, 200)])
def test_wide_heads(engine, shape):
    _, H, K, V = shape
    assert_steps_equal_definition(engine, make(3, shape, "both", "plain"), "both", some_state(1, H, K, V))


def test_strided_inputs(engine):
    """Heads as views of one projection, gates of both axes side by side, a column of a mask, and scattered channels."""
    B, (HQ, H, K, V) = 2, (2, 2, 16, 24)
    qkv = torch.randn(B, 1, HQ * K + H * (K + V))
    q, k, v = (x.unflatten(-1, (n, -1)) for x, n in zip(qkv.split([HQ * K, H * K, H * V], -1), (HQ, H, H), strict=True))
    gate, refine = torch.randn(2, B, 1, K + V, H).unbind(0)
    gate = gate.contiguous().transpose(2, 3)
    refine = refine.transpose(2, 3).contiguous()
    mask = torch.tensor([[True, True, False], [False, True, True]])[:, 2:]
    results = []
    for dense in (False, True):
        tensors = {"q": q, "k": k, "v": v, "mask": mask, **logits(gate, refine, "both", K, V)}
        if dense:
            tensors = {name: x.clone(memory_format=torch.contiguous_format) for name, x in tensors.items()}
        S, m = torch.ones(B, H, K, V), torch.ones(B, H)
        results.append([safe_exp_step_(engine=engine, S=S, m=m, **tensors), S, m])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_the_operation_tells_the_compiler_what_it_does(engine):
    """Its schema names what it overwrites, and its fake form has the shapes of the real one."""
    q, k, v, gate, refine = make(1, SHAPES[0], "value", "plain")
    weight = torch.ones(3, 24)
    arguments = (q, k, v, None, None, gate, refine, None, *some_state(1, 1, 16, 24), weight, None)
    arguments += (variance_reduction(16), True, 1e-6, engine)
    library.opcheck(_step_operation, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("axis", AXES)
def test_bfloat16(engine, axis):
    """Within 1 % of float32 on the same rounded inputs; the same bits every time."""
    inputs = [x.bfloat16() for x in make(20, (4, 2, 64, 64), axis, "outliers")]
    results = []
    for dtype in (torch.bfloat16, torch.bfloat16, torch.float32):
        S, m = empty_state(1, 2, 64, 64)
        q, k, v, gate, refine = (x.to(dtype) for x in inputs)
        h = run(engine, q, k, v, S, m, **logits(gate, refine, axis, 64, 64))
        assert h.dtype == dtype
        results.append([normalised(h.float()), S, m])
    for value, again, expected in zip(*results, strict=True):
        assert torch.equal(value, again)
        assert definition.overall(value, expected.double()) <= 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("axis", AXES)
def test_captured_in_a_cuda_graph(engine, axis, request):
    if engine == "native" or request.config.getoption("--device") != "cuda":
        pytest.skip("run with --device cuda")
    q, k, v, gate, refine = make(1, (4, 2, 64, 64), axis, "plain", B=2)
    options = logits(gate, refine, axis, 64, 64)
    S, m = some_state(2, 2, 64, 64)
    S_kept, m_kept = S.clone(), m.clone()
    expected = [safe_exp_step_(q, k, v, S, m, **options, engine=engine).clone() for _ in range(3)]
    S_graph, m_graph = S_kept.clone(), m_kept.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        h = safe_exp_step_(q, k, v, S_graph, m_graph, **options, engine=engine)
    assert torch.equal(S_graph, S_kept)  # capturing runs nothing
    for outcome in expected:
        graph.replay()
        assert torch.equal(h, outcome)
    assert torch.equal(S_graph, S) and torch.equal(m_graph, m)
