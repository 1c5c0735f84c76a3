"""Long sequences of few heads, which the fused kernels take in segments side by side: on a GPU, or through Triton's
interpreter on a CPU."""

import numpy as np
import pytest
import torch

from regla.ops.call import Call, Gates
from regla.ops.fused import fused_attention
from regla.ops.triton.chip import HOPPER

from . import definition
from .test_forms import (
    AXES,
    DECAYS,
    assert_equal_to_definition,
    assert_gated_linear_attention_is_the_definition,
    make,
    normalised,
    some_state,
)
from .test_triton import (
    FORMS,
    SMALL,
    assert_no_bit_of_the_past_changes,
    assert_no_gate_is_the_recurrence,
    fused,
    slowly_forgotten_outlier,
)

pytestmark = [
    # the interpreter's, where infinities are meant, and a loop's bound is a tensor
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.usefixtures("operation"),
]


@pytest.fixture
def cut(monkeypatch, operation):
    """Makes segments of so many chunks and pieces, whatever the length; returns how often one was cut."""

    def into(part, pieces=1):
        calls = []

        def segments(heads, chunks, *, packed, **_):
            assert not packed
            calls.append(-(-chunks // part) > 1)
            return -(-chunks // part), part, pieces

        monkeypatch.setattr(operation, "_segments", segments)
        return calls

    return into


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("scenario", ["plain", "extreme", "outliers"])
@pytest.mark.parametrize(("T", "part", "pieces"), [(70, 1, 1), pytest.param(257, 6, 3, marks=pytest.mark.slow)])
def test_equal_to_the_definition(cut, T, part, pieces, scenario, axis):
    calls = cut(part, pieces)
    _, H, K, V = SMALL
    state = (None, None) if scenario == "extreme" else some_state(1, H, K, V)
    assert_equal_to_definition(make(T, SMALL, axis, scenario), axis, *state, forms=FORMS)
    assert calls == [True, True]  # forward and backward


@pytest.mark.parametrize("axis", AXES)
def test_masks_anywhere(cut, axis):
    """Segments of which nothing is real, too: the first of one sequence, the last of the other."""
    cut(2, pieces=2)
    mask = torch.rand(2, 150) < 0.7
    mask[0, :70], mask[1, 110:] = False, False
    _, H, K, V = SMALL
    inputs = make(150, SMALL, axis, "outliers", B=2)
    assert_equal_to_definition(inputs, axis, *some_state(2, H, K, V), mask, forms=FORMS)
    h, (_S, m) = fused(*inputs, gate_axis=axis, mask=torch.zeros_like(mask))
    assert (h == 0).all() and (m == 0).all()


@pytest.mark.parametrize("kind", ["noise", "open", "outlier", "reset"])
@pytest.mark.parametrize("axis", AXES)
def test_no_bit_of_the_past_changes(cut, axis, kind):
    cut(1)
    assert_no_bit_of_the_past_changes(axis, kind)


@pytest.mark.parametrize("decays", DECAYS[:4])
def test_gated_linear_attention(cut, decays):
    cut(1)
    assert_gated_linear_attention_is_the_definition(70, SMALL, decays, "triton", closed=-torch.inf)


def test_no_gate_and_the_running_maximum(cut):
    cut(1)
    assert_no_gate_is_the_recurrence(70)


@pytest.mark.parametrize("axis", AXES)
def test_bfloat16(cut, axis):
    """The same to rounding, cut or whole; the same bits every time."""
    inputs = [x.bfloat16() for x in make(70, (2, 1, 64, 64), axis, "extreme")]
    weights = torch.randn(1, 70, 2, 64)
    results = []
    for part in (3, 1, 1):
        cut(part)
        leaves = [x.clone().requires_grad_() for x in inputs]
        h, (S, _) = fused(*leaves, gate_axis=axis)
        unit = h.detach().float().abs().amax(-1, keepdim=True)
        grads = torch.autograd.grad((h.float() / unit * weights).sum() + (S * 2.0**-48).sum(), leaves)
        results.append([normalised(h), S, *grads])
    for whole, value, again in zip(*results, strict=True):
        assert torch.equal(value, again)
        assert definition.overall(value, whole.double()) <= 1e-2


@pytest.mark.parametrize("at", [20, 125])
@pytest.mark.parametrize("axis", AXES)
def test_what_is_left_behind_an_outlier(cut, monkeypatch, axis, at):
    """A state that decays by more than 2^-126 in a segment still outweighs the keys behind an outlier of e^100.

    A GPU's exponential has no result below 2^-126, the interpreter's has.
    """
    if not torch.cuda.is_available():
        interpreter = pytest.importorskip("triton.runtime.interpreter")
        exp2 = interpreter.InterpreterBuilder.create_exp2

        def flushed(self, x):
            result = exp2(self, x)
            result.data = np.where(np.abs(result.data) < 2.0**-126, 0.0, result.data).astype(result.data.dtype)
            return result

        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_exp2", flushed)
    cut(4)
    assert_equal_to_definition(slowly_forgotten_outlier(160 if at == 20 else 256, 16, axis, at), axis, forms=FORMS)


@pytest.mark.parametrize("wide", [False, True])
def test_what_is_cut(operation, wide):
    for heads, chunks in ((1, 1), (1, 127), (33, 10_000), (96, 64)):
        assert operation._segments(heads, chunks, chip=HOPPER, wide=wide, packed=False) == (1, chunks, 1)
    assert operation._segments(1, 10_000, chip=HOPPER, wide=wide, packed=True) == (1, 10_000, 1)
    narrow = [operation._segments(heads, 512, chip=HOPPER, wide=wide, packed=False)[0] for heads in (16, 24)]
    assert wide or narrow == [6, 3]
    assert (operation._segments(28, 1024, chip=HOPPER, wide=wide, packed=False)[0] == 1) is wide
    for heads, chunks in ((1, 128), (12, 1024), (24, 1023), (7, 3333), (1, 10**7), (96, 10**6)):
        parts, part, pieces = operation._segments(heads, chunks, chip=HOPPER, wide=wide, packed=False)
        assert parts > 1 and (parts - 1) * part < chunks <= parts * part and part <= 65_535 and part % pieces == 0
        if part < 60_000:  # the last segment lacks no more than rounding each to whole pieces makes it
            assert parts * part - chunks < parts * part // pieces


@pytest.mark.parametrize("wide", [False, True])
def test_groups_hold_all_sequences(operation, wide):
    for segments, H in (
        (0, 2),
        (1, 1),
        (8, 12),
        (64, 12),
        (65, 12),
        (27, 14),
        (3, 100),
        (5, 500),
        (10**6, 1),
        (70_000, 300),
    ):
        heads, chunks, groups = operation._grid(H, segments, 7, None, chip=HOPPER, wide=wide)
        size = heads // H
        assert heads == size * H and chunks == 7 and groups <= 65_535
        assert size * (groups - 1) < segments <= size * groups or segments == groups == 0
        assert heads <= HOPPER.chains[wide] or size == 1 or segments > 65_535


@pytest.mark.parametrize("axis", AXES)
def test_in_groups(axis, operation, monkeypatch):
    """The same bits whatever the order of the sequences' chunks; the last group is smaller."""
    leaves = [x.requires_grad_() for x in make(40, SMALL, axis, "noise", B=5)]
    results = []
    for most in (1000, 4):
        chip = HOPPER._replace(chains=(most, most))
        monkeypatch.setattr(operation, "chip_of", lambda device, chip=chip: chip)
        grid = operation._grid(2, 5, 2, None, chip=chip, wide=False)
        assert grid == ((10, 2, 1) if most == 1000 else (4, 2, 3))
        h, (S, m) = fused(*leaves, gate_axis=axis)
        torch.manual_seed(1)
        loss = (h * torch.randn_like(h)).sum() + (S * torch.randn_like(S)).sum()
        results.append([h, S, m, *torch.autograd.grad(loss, leaves)])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_no_stabiliser_without_the_safe_exponential(cut):
    cut(1)
    x = torch.randn(1, 70, 1, 16)
    _o, _S, m = fused_attention(Call(x, x, x, Gates(), 1.0), "triton")
    assert (m == 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("axis", AXES)
def test_a_long_sequence(axis, operation, monkeypatch, request):
    """Cut as by default, and whole."""
    if request.config.getoption("--device") != "cuda":
        pytest.skip("run with --device cuda")
    assert operation._segments(2, 256, chip=HOPPER, wide=False, packed=False)[0] > 1
    inputs = [x.bfloat16() for x in make(8192, (2, 2, 64, 64), axis, "extreme")]
    results = []
    for _ in range(2):
        leaves = [x.clone().requires_grad_() for x in inputs]
        h, (S, _) = fused(*leaves, gate_axis=axis)
        unit = h.detach().float().abs().amax(-1, keepdim=True)
        grads = torch.autograd.grad((h.float() / unit).sum() + (S * 2.0**-48).sum(), leaves)
        results.append([normalised(h), S, *grads])
        monkeypatch.setattr(operation, "_segments", lambda heads, chunks, **_: (1, chunks, 1))
    for value, whole in zip(*results, strict=True):
        assert definition.overall(value, whole.double()) <= 1e-2
