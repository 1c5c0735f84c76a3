"""Heads of 128 channels in bfloat16, whose states the kernels take in slices where the value axis does not decay."""

import itertools

import pytest
import torch

from regla.ops import QKNorm, gated_linear_attention, regla_attention, safe_exp_attention

from . import definition
from .test_causality import change
from .test_forms import make, normalised, some_state
from .test_triton import fast_gates

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter's, where infinities are meant
    pytest.mark.usefixtures("operation"),
]


def assert_near_float32(attention, inputs, mask=None):
    """Outputs, final states and gradients within 1 % of float32's on the same inputs: `attention` gives h, S of leaves
    and a backend; gradients are those of each token's output in its own unit, and of the state."""
    results, weights = [], None
    for backend, dtype in (("chunked", torch.float32), ("triton", torch.bfloat16), ("triton", torch.bfloat16)):
        leaves = [x.to(dtype if x.dtype == torch.bfloat16 else x.dtype).requires_grad_() for x in inputs]
        h, S = attention(*leaves, backend=backend)
        if weights is None:
            unit = h.detach().abs().amax(-1, keepdim=True).clamp(min=1e-37)
            weights = torch.randn(h.shape) if mask is None else torch.randn(h.shape) * mask[..., None, None]
            weights = (weights / unit).bfloat16()
            weights_S = torch.randn(S.shape) / S.detach().abs().amax().clamp(min=1e-37)
        grads = torch.autograd.grad([h, S], leaves, [weights.to(dtype), weights_S])
        results.append([normalised(h if mask is None else h[mask][None]), S, *grads])
    for expected, value, again in zip(*results, strict=True):
        assert torch.equal(value, again)
        assert definition.overall(value, expected.double()) <= 1e-2


def regla(**options):
    def attention(*leaves, backend):
        h, (S, _) = regla_attention(*leaves, gate_axis="key", output_final_state=True, backend=backend, **options)
        return h, S

    return attention


def rounded(inputs):
    return [x.bfloat16() for x in inputs]


def test_which_states_are_taken_in_slices(operation):
    wide, narrow = torch.ones(1, 1, 1, 100).bfloat16(), torch.ones(1, 1, 1, 64).bfloat16()
    assert operation._slices(wide, wide, None) == 2 and operation._slices(wide, wide, None, 2) == 1
    for k, v, gv in ((wide, wide, wide), (wide, narrow, None), (narrow, wide, None), (wide, wide.float(), None)):
        assert operation._slices(k, v, gv) == 1


def test_every_part_of_a_tag_changes_with_every_passing():
    """So that the errors of all numbers cancel: see regla.ops.triton.passing."""
    from regla.ops.triton.passing import TAG_STEP

    tags = [count * TAG_STEP.value % 4096 for count in range(4096)]
    assert tags[0] == 0 and len(set(tags)) == 4096
    for before, after in itertools.pairwise(tags):
        assert all((before ^ after) >> 3 * part & 7 for part in range(4))


@pytest.mark.parametrize("scenario", ["plain", "extreme", "outliers"])
@pytest.mark.parametrize("shape", [(1, 1, 128, 128), (2, 2, 100, 72), (2, 1, 128, 128)])
def test_heads_and_groups(shape, scenario):
    assert_near_float32(regla(), rounded(make(70, shape, "key", scenario)))


@pytest.mark.parametrize(("most", "outlier"), [(4.5, None), (4.5, 100.0), (30.0, 25.0)])
def test_fast_gates(most, outlier):
    """Chunks that decay by up to 2^-144, whose tokens are near, and by up to 2^-960; no bit of the past changes."""
    q, k, v = (torch.randn(1, 70, 1, 128) for _ in range(3))
    if outlier is not None:
        k[:, 40, :, 5] = outlier
    gate, refine = fast_gates(70, 128, "key", most)
    gate[..., 0] = 9.0  # a channel that hardly forgets keeps the unit up
    inputs = rounded((q, k, v, gate, refine))
    assert_near_float32(regla(), inputs)
    before, _ = regla()(*inputs, backend="triton")
    for kind in ("outlier", "reset", "open"):
        after, _ = regla()(*change(inputs, 50, kind), backend="triton")
        assert torch.equal(after[:, :50], before[:, :50]), kind


def test_masks_and_an_initial_state():
    mask = torch.rand(2, 70) < 0.7
    mask[0, :20] = False
    state = some_state(2, 1, 128, 128)
    inputs = rounded(make(70, (1, 1, 128, 128), "key", "plain", B=2))
    assert_near_float32(regla(mask=mask, initial_state=state), inputs, mask)


def test_packed_sequences():
    boundaries = torch.tensor([0, 33, 34, 70])
    assert_near_float32(regla(cu_seqlens=boundaries), rounded(make(70, (1, 1, 128, 128), "key", "plain")))


def test_sequences_in_segments(operation, monkeypatch):
    monkeypatch.setattr(operation, "_segments", lambda heads, chunks, **_: (-(-chunks // 4), 4, 2))
    assert_near_float32(regla(), rounded(make(150, (1, 1, 128, 128), "key", "extreme")))


def test_normalised_queries_and_keys():
    q, k, v, gate, refine = make(70, (1, 1, 128, 128), "key", "plain")
    weights = [1 + 0.1 * torch.randn(128) for _ in range(2)]

    def attention(q, k, v, gk, refine_k, of_q, of_k, *, backend):
        norm = QKNorm(of_q, of_k, 1e-6)
        h, (S, _) = safe_exp_attention(
            q, k, v, gk, refine_k=refine_k, qk_norm=norm, output_final_state=True, backend=backend
        )
        return h, S

    assert_near_float32(attention, [*rounded((q, k, v, gate, refine)), *weights])


@pytest.mark.parametrize("decaying", [True, False])
def test_without_the_safe_exponential(decaying):
    q, k, v = (torch.randn(1, 70, 1, 128) for _ in range(3))
    log_decay = [torch.nn.functional.logsigmoid(torch.randn(1, 70, 1, 128))] if decaying else []

    def attention(q, k, v, gk=None, *, backend):
        return gated_linear_attention(q, k, v, gk, output_final_state=True, backend=backend)

    assert_near_float32(attention, rounded((q, k, v, *log_decay)))
