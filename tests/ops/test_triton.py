"""The fused kernels against the float64 definition: on a GPU, or through Triton's interpreter on a CPU."""

import itertools

import pytest
import torch

from regla.ops import regla_attention, safe_exp_attention
from regla.ops.dispatch import why_not_triton
from regla.ops.fused import Inputs

from . import definition
from .test_causality import change
from .test_forms import (
    AXES,
    DECAYS,
    FORWARD,
    GRADIENT,
    SHAPES,
    assert_equal_to_definition,
    assert_gated_linear_attention_is_the_definition,
    backward,
    gate_logits,
    make,
    normalised,
    some_state,
)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, where infinities are meant

SMALL = (4, 2, 20, 33)  # HQ, H, K, V; the interpreter takes seconds for a few chunks
LENGTHS = [
    (37, SMALL),
    *((T, SHAPES[T % 5]) for T in (1, 2, 65)),
    *(pytest.param(T, SHAPES[T % 5], marks=pytest.mark.slow) for T in (200, 257, 258, 259)),
]


@pytest.fixture(autouse=True)
def _needs_triton():
    x = torch.ones(1, 1, 1, 16)
    reason = why_not_triton(x, x)
    if reason is not None:
        pytest.skip(reason)


def fused(*inputs, **options):
    return regla_attention(*inputs, backend="triton", output_final_state=True, **options)


FORMS = {"triton": fused}


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("scenario", ["plain", "extreme", "outliers"])
@pytest.mark.parametrize(("T", "shape"), LENGTHS)
def test_lengths_gates_and_outliers(T, shape, scenario, axis):
    _, H, K, V = shape
    state = some_state(1, H, K, V) if T in (1, 37) else (None, None)
    assert_equal_to_definition(make(T, shape, axis, scenario), axis, *state, forms=FORMS)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_with_initial_state(shape, axis):
    _HQ, H, K, V = shape
    assert_equal_to_definition(make(40, shape, axis, "extreme", B=2), axis, *some_state(2, H, K, V), forms=FORMS)


@pytest.mark.slow
@pytest.mark.parametrize("axis", AXES)
def test_gradients_behind_outliers(axis):
    """They are as large as the outputs are small: through the kernel they must not overflow."""
    for seed in range(12):
        torch.manual_seed(seed)
        assert_equal_to_definition(make(200, (2, 2, 48, 48), axis, "outliers"), axis, forms=FORMS)


def slowly_forgotten_outlier(T, K, axis, at):
    """Keys of 100 and more at token `at`. One channel of an axis, another at each token, stays open; the others decay
    by 1.4 bits, with both axes by 0.7 on each: the outlier decays to what follows, while its unit stays."""
    q, k, v = (torch.randn(1, T, 1, K) for _ in range(3))
    k[:, at] += 100.0
    gate = torch.full((1, T, 1, 2 * K if axis == "both" else K), -0.5 if axis == "both" else -1.5)
    for half in gate.split(K, -1):
        half.scatter_(-1, torch.randint(K, (1, T, 1, 1)), 16.0)
    return [q, k, v, gate, torch.zeros_like(gate)]


@pytest.mark.parametrize("axis", AXES)
def test_a_slowly_forgotten_outlier(axis):
    for seed in range(2):
        torch.manual_seed(seed)
        assert_equal_to_definition(slowly_forgotten_outlier(160, 32, axis, 5), axis, forms=FORMS)


@pytest.mark.parametrize("axis", AXES)
def test_gradients_where_almost_nothing_is_left(axis):
    """Behind an outlier that a reset took out of the state but not out of the running maximum, keys of -20 leave
    outputs of 2^-90 and gradients of 2^90, which meet what was before the reset times 0: not infinity times 0."""
    q, k, v, gate, refine = make(24, (1, 1, 16, 16), axis, "plain")
    with torch.no_grad():
        k[:, 0], k[:, 8:] = 80.0, k[:, 8:] - 20
        gate[:, 8] = -1000.0
    leaves = [x.detach().requires_grad_() for x in (q, k, v, gate, refine)]
    h, _ = fused(*leaves, gate_axis=axis, key_max="running")
    weights = torch.randn_like(h)
    grads = torch.autograd.grad((h / h.detach().norm(dim=-1, keepdim=True) * weights).sum(), leaves)
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.slow
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("shape", [(2, 2, 64, 64), (1, 1, 128, 128), (2, 1, 64, 128), (2, 1, 128, 64)])
def test_ordinary_head_sizes(shape, axis):
    _HQ, H, K, V = shape
    for scenario in ("plain", "extreme"):
        assert_equal_to_definition(make(150, shape, axis, scenario), axis, *some_state(1, H, K, V), forms=FORMS)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize(
    "shape", [(1, 1, 160, 24), (2, 1, 24, 160), pytest.param((2, 1, 256, 256), marks=pytest.mark.slow)]
)
def test_wide_heads_in_slices(shape, axis):
    _HQ, H, K, V = shape
    assert_equal_to_definition(make(37, shape, axis, "extreme"), axis, *some_state(1, H, K, V), forms=FORMS)


@pytest.mark.parametrize("axis", ["value", "key"])
def test_wide_heads_of_bfloat16_with_a_mask(axis):
    inputs = [x.bfloat16().requires_grad_() for x in make(40, (2, 1, 160, 144), axis, "plain", B=2)]
    wide = [x.detach().float().requires_grad_() for x in inputs]
    mask = torch.rand(2, 40) < 0.7
    h = regla_attention(*inputs, gate_axis=axis, mask=mask, backend="triton")[0]
    expected = regla_attention(*wide, gate_axis=axis, mask=mask, backend="recurrent")[0]
    d = (1e-9 * torch.randn(h.shape)).bfloat16().float()  # a GPU drops what 2^-48 of it leaves
    grads, expected_grads = (torch.autograd.grad((x.float() * d).sum(), y) for x, y in ((h, inputs), (expected, wide)))
    for x, y in zip(grads, expected_grads, strict=True):
        assert (x - y).norm() <= 0.01 * y.norm()
    h, expected = (normalised(x.float()) for x in (h, expected))
    assert (h - expected)[mask].norm() <= 0.01 * expected[mask].norm()


@pytest.mark.parametrize("axis", AXES)
def test_masks_anywhere(axis):
    mask = torch.rand(2, 40) < 0.7
    mask[0, :20], mask[1, 35:] = False, False
    inputs = make(40, SMALL, axis, "outliers", B=2)
    state = some_state(2, 2, 20, 33)
    assert_equal_to_definition(inputs, axis, *state, mask, forms=FORMS)
    real = mask[..., None, None]
    h, _ = fused(*inputs, gate_axis=axis, mask=mask)
    h_nan, _ = fused(*(torch.where(real, x, torch.nan) for x in inputs), gate_axis=axis, mask=mask)
    assert torch.equal(h, h_nan) and (h[~mask] == 0).all()


@pytest.mark.parametrize("axis", AXES)
def test_nothing_leaves_nothing(axis):
    """Not a bit of what counts the passings of a state from chunk to chunk."""
    inputs = [x.bfloat16() for x in make(150, SMALL, axis, "extreme")]
    h, (S, m) = fused(*inputs, gate_axis=axis, mask=torch.zeros(1, 150, dtype=torch.bool))
    assert (h == 0).all() and (S == 0).all() and (m == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("axis", AXES)
def test_a_nan_stays_one(axis, dtype):
    """In its channel, in every later chunk and in the state."""
    inputs = [x.to(dtype) for x in make(100, (1, 1, 16, 16), axis, "plain")]
    inputs[2][0, 5, 0, 3] = torch.nan
    h, (S, _m) = fused(*inputs, gate_axis=axis)
    assert h[0, 5:, 0, 3].isnan().all() and S[0, 0, :, 3].isnan().all()
    assert not h[0, :, 0, :3].isnan().any() and not S[0, 0, :, :3].isnan().any()


@pytest.mark.parametrize("axis", AXES)
def test_packing_equals_separate_sequences(axis):
    lengths = [1, 32, 33, 2]
    bounds = torch.tensor([0, *itertools.accumulate(lengths)])
    _HQ, H, K, V = SMALL
    inputs = make(int(bounds[-1]), SMALL, axis, "extreme")
    S0, m0 = some_state(len(lengths), H, K, V)
    results = []
    for backend in ("triton", "chunked"):
        leaves = [x.clone().requires_grad_() for x in [*inputs, S0]]
        h, (S, m) = regla_attention(
            *leaves[:5],
            gate_axis=axis,
            initial_state=(leaves[5], m0),
            cu_seqlens=bounds,
            output_final_state=True,
            backend=backend,
        )
        results.append([normalised(h), S, m, *backward(h, S, leaves)])
    h, h_chunked = results[0][0], results[1][0]
    assert definition.per_token(h, h_chunked.double()) <= FORWARD
    for x, expected in zip(*results, strict=True):
        assert x.isfinite().all()
        assert definition.overall(x, expected.double()) <= GRADIENT


@pytest.mark.parametrize("decays", DECAYS)
def test_gated_linear_attention(decays):
    assert_gated_linear_attention_is_the_definition(40, SMALL, decays, "triton", closed=-torch.inf)


def assert_no_gate_is_the_recurrence(T):
    q, k, v, _, _ = make(T, SMALL, "value", "outliers")
    for key_max in ("decay", "running"):
        h, (S, m) = safe_exp_attention(q, k, v, key_max=key_max, backend="triton", output_final_state=True)
        expected, (S_ref, m_ref) = safe_exp_attention(
            q, k, v, key_max=key_max, backend="recurrent", output_final_state=True
        )
        assert definition.per_token(normalised(h), normalised(expected).double()) <= FORWARD
        assert definition.overall(S, S_ref.double()) <= FORWARD and torch.allclose(m, m_ref)


def test_no_gate_and_the_running_maximum():
    assert_no_gate_is_the_recurrence(40)


def assert_no_bit_of_the_past_changes(axis, kind, dtype=torch.float32):
    inputs = [x.to(dtype) for x in make(66, (1, 1, 16, 16), axis, "outliers")]
    before, _ = fused(*inputs, gate_axis=axis)
    for at in (1, 31, 32, 33, 63, 64, 65):
        after, _ = fused(*change(inputs, at, kind), gate_axis=axis)
        assert torch.equal(after[:, :at], before[:, :at]), f"token {at}"
        assert not torch.equal(after[:, at:], before[:, at:])


@pytest.mark.parametrize("kind", ["noise", "outlier", "reset", "open"])
@pytest.mark.parametrize("axis", AXES)
def test_no_bit_of_the_past_changes(axis, kind):
    assert_no_bit_of_the_past_changes(axis, kind)


@pytest.mark.parametrize("kind", ["noise", "outlier", "reset", "open"])
@pytest.mark.parametrize("axis", AXES)
def test_no_bit_of_the_past_changes_in_bfloat16(axis, kind):
    assert_no_bit_of_the_past_changes(axis, kind, torch.bfloat16)


def fast_gates(T, K, axis, most):
    """Logits of channels that decay by 1 to `most` bits a token; with both axes by half of it each."""
    bits = torch.linspace(1.0, most, K).repeat(1 + (axis == "both")) / (1 + (axis == "both"))
    decay = torch.exp2(-bits) + torch.zeros(1, T, 1, 1)
    return [torch.log(decay / (1 - decay)) + 0.1 * torch.randn(1, T, 1, len(bits)), torch.zeros(1, T, 1, len(bits))]


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize(
    ("most", "outlier"),
    [(4.5, None), (4.5, 25.0), (4.5, 100.0), (10.0, None), (10.0, 25.0), (10.0, 100.0), (30.0, None), (30.0, 25.0)],
)
def test_fast_gates_in_bfloat16(most, outlier, axis):
    """Within 1 % of float32, and no bit of the past changes, where chunks decay by far more than 2^-60: by up to
    2^-144, and by up to 2^-960."""
    q, k, v = (torch.randn(1, 80, 1, 32) for _ in range(3))
    if outlier is not None:
        k[:, 40, :, 5] = outlier
    gate, refine = fast_gates(80, 32, axis, most)
    gate[..., 0] = 9.0  # a channel that hardly forgets keeps the unit up
    inputs = [x.bfloat16() for x in (q, k, v, gate, refine)]
    weights = torch.randn(1, 80, 1, 32)
    results = []
    for backend, dtype in (("chunked", torch.float32), ("triton", torch.bfloat16)):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        h, (S, _) = regla_attention(*leaves, gate_axis=axis, output_final_state=True, backend=backend)
        if not results:  # the same for both: what rounding it costs, where the outlier's gradients cancel, is no error
            d_h = (weights / h.detach().abs().amax(-1, keepdim=True)).bfloat16()
        grads = torch.autograd.grad([h, S], leaves, [d_h.to(dtype), torch.full_like(S, 2.0**-48)])
        results.append([normalised(h), S, *grads])
    for expected, value in zip(*results, strict=True):
        assert definition.overall(value, expected.double()) <= 1e-2
    before, _ = fused(*inputs, gate_axis=axis)
    for at in (33, 50, 60, 63):
        for kind in ("outlier", "reset", "open"):
            after, _ = fused(*change(inputs, at, kind), gate_axis=axis)
            assert torch.equal(after[:, :at], before[:, :at]), f"{kind} at token {at}"


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("size", [1e-22, 1e-30])
def test_tiny_values_in_bfloat16(size, axis):
    """Within 1 % of float32 where values are tiny, so that gradients of outputs in their own unit are huge, and chunks
    decay by more than 2^-60, but by less than 2^-150."""
    q, k, v = (torch.randn(1, 80, 1, 32) for _ in range(3))
    gate, refine = fast_gates(80, 32, axis, 5.5 if axis == "both" else 4.4)
    gate[..., 0] = 9.0
    inputs = [x.bfloat16() for x in (q, k, size * v, gate, refine)]
    weights = torch.randn(1, 80, 1, 32)
    results = []
    for backend, dtype in (("chunked", torch.float32), ("triton", torch.bfloat16)):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        h, _ = regla_attention(*leaves, gate_axis=axis, backend=backend)
        if not results:
            d_h = (weights / h.detach().abs().amax(-1, keepdim=True)).bfloat16()
        results.append([normalised(h), *torch.autograd.grad(h, leaves, d_h.to(dtype))])
    for expected, value in zip(*results, strict=True):
        assert definition.overall(value, expected.double()) <= 1e-2


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("most", [4.0, 30.0])
def test_groups_and_masks_in_bfloat16(most, axis):
    """Two queries to a state and masked tokens, the first ones and a few; chunks with far tokens and without."""
    q, k, v = torch.randn(1, 100, 2, 32), torch.randn(1, 100, 1, 32), torch.randn(1, 100, 1, 32)
    mask = torch.ones(1, 100, dtype=torch.bool)
    mask[:, [0, 1, 2, 40, 41, 70]] = False
    inputs = [x.bfloat16() for x in (q, k, v, *fast_gates(100, 32, axis, most))]
    weights = torch.randn(1, 100, 2, 32) * mask[..., None, None]
    results = []
    for backend, dtype in (("chunked", torch.float32), ("triton", torch.bfloat16)):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        h, (S, _) = regla_attention(*leaves, gate_axis=axis, mask=mask, output_final_state=True, backend=backend)
        if not results:
            d_h = (weights / h.detach().abs().amax(-1, keepdim=True).clamp(min=1e-37)).bfloat16()
        grads = torch.autograd.grad([h, S], leaves, [d_h.to(dtype), torch.full_like(S, 2.0**-48)])
        results.append([h[mask] / h[mask].abs().amax(-1, keepdim=True), S, *grads])
    for expected, value in zip(*results, strict=True):
        assert definition.overall(value, expected.double()) <= 1e-2


def test_where_the_backward_pass_goes_over_the_tree():
    """The signs of the factors: wherever a chunk has far tokens; of chunks that decay beyond 2^-60 at outputs so small
    that their gradients are large, but for masked tokens."""
    operation = pytest.importorskip("regla.ops.triton.operation")
    q, k, v = (torch.randn(1, 128, 1, 32).bfloat16() for _ in range(3))
    v[:, :64] *= 1e-30
    gate, refine = (x.bfloat16() for x in fast_gates(128, 32, "key", 3.0))
    gate[..., 0], gate[:, :32], gate[:, 100:104, :, 1:] = 9.0, 9.0, -50.0
    mask = torch.ones(1, 128, dtype=torch.bool)
    mask[:, 38] = False
    inputs = Inputs(q, k, v, gate, refine, None, None, mask, None, None, None)
    *_, factors, _states = operation.forward(inputs, 1.0, True, True, True)
    over_tree = (factors[0, :, 0] < 0).view(4, 32)
    assert over_tree.all(1).tolist() == [False, False, False, True]
    assert over_tree.any(1).tolist() == [False, True, False, True]
    assert over_tree[1].sum() == 31 and not over_tree[1, 6]


@pytest.mark.parametrize("axis", AXES)
def test_channels_far_below_the_unit_in_bfloat16(axis):
    """One channel of the keys holds the unit, the queries read the others, 2^-144 of it: gates that later forget fast
    take nothing from earlier rows."""
    q, k, v = torch.zeros(1, 64, 1, 16), torch.randn(1, 64, 1, 16) - 100, torch.randn(1, 64, 1, 16)
    q[..., 0], k[..., 0] = -160.0, 0.0
    outputs = []
    for later in (0.05, 3.8 if axis == "both" else 5.0):
        gate = torch.full((1, 64, 1, 16), -0.05)
        gate[:, 48:] = -later
        gate[..., 0] = -0.01
        gates = {"key": {"gk": gate}, "value": {"gv": gate}, "both": {"gk": gate, "gv": gate}}[axis]
        h, _ = safe_exp_attention(
            *(x.bfloat16() for x in (q, k, v)),
            **{name: x.bfloat16() for name, x in gates.items()},
            backend="triton",
            key_max="running",
        )
        outputs.append(h[:, :48])
    assert torch.equal(*outputs)
    assert outputs[0].abs().amax(-1).min() > 0


@pytest.mark.parametrize("axis", AXES)
def test_any_split_into_calls_on_any_backend(axis):
    """States pass from one backend to the other."""
    inputs = make(80, SMALL, axis, "outliers")
    whole, (S, _m) = regla_attention(*inputs, gate_axis=axis, output_final_state=True, backend="chunked")
    state, parts = None, []
    for (lo, hi), backend in zip(
        itertools.pairwise([0, 40, 41, 45, 80]), ("triton", "recurrent", "chunked", "triton"), strict=True
    ):
        h, state = regla_attention(
            *(x[:, lo:hi] for x in inputs),
            gate_axis=axis,
            initial_state=state,
            output_final_state=True,
            backend=backend,
        )
        parts.append(h)
    assert definition.per_token(normalised(torch.cat(parts, 1)), normalised(whole).double()) <= FORWARD
    assert definition.overall(state[0], S.double()) <= FORWARD


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("scenario", ["plain", "extreme", "outliers"])
def test_bfloat16(axis, scenario):
    """Within 1 % of float32 on the same rounded inputs, outputs, states and gradients; the same bits every time.

    The gradients are those of a random functional of the raw output, each token's and head's in its own unit: what
    comes through a normalisation has nothing left along the output, and the next test shows what that does.
    """
    inputs = [x.bfloat16() for x in make(80, (2, 2, 64, 64), axis, scenario)]
    weights = torch.randn(1, 80, 2, 64)
    results = []
    for backend, dtype in (("triton", torch.bfloat16), ("triton", torch.bfloat16), ("chunked", torch.float32)):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        h, (S, _) = regla_attention(*leaves, gate_axis=axis, output_final_state=True, backend=backend)
        assert h.dtype == dtype and S.dtype == torch.float32
        unit = h.detach().float().abs().amax(-1, keepdim=True)
        grads = torch.autograd.grad((h.float() / unit * weights).sum() + (S * 2.0**-48).sum(), leaves)
        results.append([normalised(h), S, *grads])
    for value, again, expected in zip(*results, strict=True):
        assert torch.equal(value, again)
        assert definition.overall(value, expected.double()) <= 1e-2


@pytest.mark.parametrize("axis", AXES)
def test_bfloat16_behind_a_norm(axis):
    """Gradients that come through a normalisation are cancellations: the float32 form by itself, with no more than its
    output and that output's gradient rounded to bfloat16, is about as far away as the kernels."""
    for scenario in ("plain", "extreme"):
        inputs = [x.bfloat16() for x in make(80, (2, 2, 64, 64), axis, scenario)]
        gradients = []
        for backend, dtype, rounded in (
            ("chunked", torch.float32, False),
            ("chunked", torch.float32, True),
            ("triton", torch.bfloat16, False),
        ):
            leaves = [x.to(dtype).requires_grad_() for x in inputs]
            h, (S, _) = regla_attention(*leaves, gate_axis=axis, output_final_state=True, backend=backend)
            gradients.append(backward((h.bfloat16() if rounded else h).float(), S, leaves))
        for exact, by_rounding, by_kernels in zip(*gradients, strict=True):
            least = definition.overall(by_rounding, exact.double())
            assert definition.overall(by_kernels, exact.double()) <= 2 * max(least, 5e-3)


def test_strided_inputs():
    """Heads as views of one projection, and a layout that needs a copy."""
    B, T, H, K = 2, 40, 2, 16
    qkv = torch.randn(B, T, 3 * H * K).split(H * K, -1)
    q, k, v = (x.unflatten(-1, (H, K)) for x in qkv)
    gate, refine = gate_logits("plain", B, H, T, K)
    gate, refine = gate.transpose(1, 2), refine.transpose(1, 2)
    h, _ = fused(q, k, v, gate, refine)
    expected, _ = fused(*(x.contiguous() for x in (q, k, v, gate, refine)))
    assert torch.equal(h, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("axis", AXES)
def test_compiled(axis, request):
    if request.config.getoption("--device") != "cuda":
        pytest.skip("run with --device cuda")
    torch.use_deterministic_algorithms(False)
    forms = {"compiled": torch.compile(fused, fullgraph=True)}
    for scenario in ("plain", "extreme", "outliers"):
        assert_equal_to_definition(make(130, SHAPES[4], axis, scenario, B=2), axis, forms=forms)


@pytest.mark.parametrize("axis", AXES)
def test_any_strides(axis):
    """Masks, boundaries, states and their gradients that are views."""
    q, k, v, gate, refine = make(40, SHAPES[4], axis, "plain", B=2)
    mask = (torch.rand(40, 2) < 0.8).T
    S = torch.randn(3, *v.shape[-1:], k.shape[-1], 2).permute(3, 0, 2, 1)
    m = torch.randn(3, 2).T
    results = []
    for options in ({"mask": mask}, {"cu_seqlens": torch.tensor([0, 9, 7, 9, 40, 9])[::2]}):
        B = 2 if "mask" in options else 1
        state = (S, m)
        for backend in ("triton", "chunked"):
            leaves = [x[:B].clone().requires_grad_() for x in (q, k, v, gate, refine)]
            h, (last, _) = regla_attention(
                *leaves, gate_axis=axis, backend=backend, initial_state=state, output_final_state=True, **options
            )
            results.append([h, last, *torch.autograd.grad(normalised(h).sum() + last.sum(), leaves)])
        ours, theirs = results[-2:]
        for name, x, y in zip(("h", "S", "q", "k", "v", "gate", "refine"), ours, theirs, strict=True):
            assert definition.overall(x, y.double()) <= GRADIENT, name
