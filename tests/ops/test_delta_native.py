"""The gated delta rule by the C kernels: what a test of every form does not show."""

import shutil

import pytest
import torch
from torch import library
from torch.autograd import forward_ad
from torch.func import jvp

from regla.ops import gated_delta_attention
from regla.ops.dispatch import why_not_native
from regla.ops.native import build
from regla.ops.native.delta import _backward, _operation

from .definition import overall
from .test_delta import FORWARD, GRADIENT, assert_equal_to_definition, definition, make, run

SHAPE = (6, 3, 33, 17)  # HQ, H, K, V


@pytest.fixture(autouse=True)
def _on_the_cpu():
    with torch.device("cpu"):
        reason = why_not_native(torch.ones(1), torch.ones(1))
        if reason is not None:
            pytest.skip(reason)
        yield


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 1, 130, 70), (1, 1, 64, 128), (2, 2, 7, 200)])
def test_any_width_of_a_head(shape):
    assert_equal_to_definition(make(70, shape, "channel"), only=["native"])
    assert_equal_to_definition(make(3, shape, "head"), only=["native"])


def test_auto_is_native_on_a_cpu():
    for T in (1, 5):
        q, k, v, beta, gk, S = make(T, SHAPE, "extreme")
        o, final, grads = run((q, k, v, beta, gk, S), "native")
        chosen = run((q, k, v, beta, gk, S), "auto")
        assert torch.equal(chosen[0], o) and torch.equal(chosen[1], final)
        assert all(torch.equal(a, b) for a, b in zip(chosen[2], grads, strict=True))


def test_float64_is_refused():
    q, k, v, beta, gk, _ = make(5, SHAPE, "channel")
    message = "backend='native' cannot run: a tensor is float64, and the C kernels compute in float32; use 'auto' or"
    with pytest.raises(ValueError, match=message):
        gated_delta_attention(q, k, v.double(), beta, gk, backend="native")
    assert gated_delta_attention(q, k, v.double(), beta, gk)[0].dtype == torch.float64


def test_auto_without_a_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    build.load.cache_clear()
    try:
        for T, form in ((1, "recurrent"), (5, "chunked")):
            inputs = make(T, SHAPE, "channel")[:5]
            with pytest.raises(ValueError, match=r"backend='native' cannot run: there is no C compiler .*'chunked'"):
                gated_delta_attention(*inputs, backend="native")
            found = gated_delta_attention(*inputs)[0]
            assert torch.equal(found, gated_delta_attention(*inputs, backend=form)[0])
    finally:
        build.load.cache_clear()


def test_any_split_into_calls_gives_the_same_bits():
    """With and without gradients: a single token without takes a path of its own."""
    q, k, v, beta, gk, S = make(140, SHAPE, "extreme", B=2)
    options = {"output_final_state": True, "backend": "native"}
    whole, final, _ = run((q, k, v, beta, gk, S), "native")
    parts = []
    for lo, hi in ((0, 1), (1, 64), (64, 65), (65, 140)):
        o, S = gated_delta_attention(*(x[:, lo:hi] for x in (q, k, v, beta, gk)), initial_state=S, **options)
        parts.append(o)
    assert torch.equal(torch.cat(parts, 1), whole) and torch.equal(S, final)


@pytest.mark.parametrize("threads", [2, 5])
def test_any_number_of_threads_gives_the_same_bits(threads):
    before, inputs, results = torch.get_num_threads(), make(200, (8, 4, 33, 65), "extreme", B=3), []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            o, S, grads = run(inputs, "native")
            results.append([o, S, *grads])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("of", ["outputs", "state"])
def test_gradients_of_the_outputs_or_of_the_final_state_alone(of):
    q, k, v, beta, _, _ = make(70, SHAPE, "none")
    results = []
    for dtype in (torch.float32, torch.float64):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v, beta)]
        if dtype == torch.float32:
            o, S = gated_delta_attention(*leaves, output_final_state=True, backend="native")
        else:
            o, S = definition(*leaves, None, torch.zeros(1, 3, 33, 17).double())
        of_one = o if of == "outputs" else S
        results.append(torch.autograd.grad(of_one.sin().sum(), leaves, allow_unused=True, materialize_grads=True))
    for found, right in zip(*results, strict=True):
        assert overall(found, right) <= GRADIENT if right.norm() > 0 else (found == 0).all()


def test_strided_inputs_and_small_dtypes():
    """Heads as views of one projection, in bfloat16, and one beta and decay for all tokens: gradients have the dtype of
    what they are of."""
    qkv = torch.randn(2, 70, 2 * 16 + 2 * 16 + 2 * 24).bfloat16().requires_grad_()
    beta, gk = torch.rand(2).requires_grad_(), (-torch.rand(2, 1)).bfloat16().requires_grad_()
    S = torch.randn(2, 2, 16, 24).bfloat16().requires_grad_()
    leaves, results = (qkv, beta, gk, S), []
    for backend in ("native", "recurrent"):
        q, k, v = (x.unflatten(-1, (2, -1)) for x in qkv.split([32, 32, 48], -1))
        q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
        options = {"initial_state": S, "output_final_state": True, "backend": backend}
        o, final = gated_delta_attention(q, k, v, beta.expand(2, 70, 2), gk.expand(2, 70, 2, 1), **options)
        assert o.dtype == torch.bfloat16 and final.dtype == torch.float32
        results.append([o, final, *torch.autograd.grad(o.float().sin().sum() + final.sin().sum(), leaves)])
    for i, (found, right) in enumerate(zip(*results, strict=True)):
        assert found.dtype == right.dtype and overall(found, right.double()) <= 1e-2, i
    assert overall(results[0][1], results[1][1].double()) <= FORWARD


@pytest.mark.parametrize("where", ["q", "k", "v", "beta", "gk"])
def test_a_nan_stays_one(where):
    inputs = dict(zip(("q", "k", "v", "beta", "gk"), make(70, SHAPE, "channel"), strict=False))
    inputs[where] = inputs[where].clone()
    inputs[where][0, 30, 1] = torch.nan
    o, _ = gated_delta_attention(**inputs, validate=False, backend="native")
    assert o[0, :30].isfinite().all()
    behind = o[0, 30:] if where != "q" else o[0, 30:31, 1]
    assert behind.isnan().any(-1).any(-1).all()


@pytest.mark.parametrize("T", [1, 5])
def test_a_batch_of_none(T):
    leaves = [x.requires_grad_() for x in make(T, SHAPE, "channel", B=0)[:5]]
    o, S = gated_delta_attention(*leaves, output_final_state=True, backend="native")
    assert o.shape == (0, T, 6, 17) and S.shape == (0, 3, 33, 17)
    assert [x.shape for x in torch.autograd.grad(o.sum() + S.sum(), leaves)] == [x.shape for x in leaves]
    with torch.no_grad():
        assert gated_delta_attention(*leaves, backend="native")[0].shape == o.shape


@pytest.mark.parametrize("bounds", [[0, 9], [-3, 5], [0, 4, 3, 5]])
def test_boundaries_are_always_checked(bounds):
    """Also where numbers are not: the kernels would write beyond the tensors."""
    inputs = make(5, SHAPE, "channel")[:5]
    with pytest.raises(ValueError, match="expected boundaries that start at 0, ascend, and end at T = 5"):
        gated_delta_attention(*inputs, cu_seqlens=torch.tensor(bounds), validate=False, backend="native")


@pytest.mark.parametrize("bounds", [None, [0, 1, 65, 65, 70]])
@pytest.mark.parametrize("decay", ["none", "head", "channel"])
def test_the_operations_tell_the_compiler_what_they_do(decay, bounds):
    """Their fake forms have the shapes of the real ones, and gradients are registered as PyTorch expects."""
    torch.use_deterministic_algorithms(False)  # one state more than there are chunks stays unwritten
    q, k, v, beta, gk, _ = make(70, SHAPE, decay)
    cu_seqlens = None if bounds is None else torch.tensor(bounds)
    S = torch.randn(1 if bounds is None else 4, 3, 33, 17)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    for keep in (False, True):
        library.opcheck(_operation, (q, k, v, beta, gk, S, cu_seqlens, 0.5, keep), test_utils=tests[:2])
    o, final, w, states = _operation(q, k, v, beta, gk, S, cu_seqlens, 0.5, True)
    leaves = tuple(x if x is None else x.requires_grad_() for x in (q, k, v, beta, gk, S))
    library.opcheck(_operation, (*leaves, cu_seqlens, 0.5, True), test_utils=tests[2:])
    arguments = o, final, q.detach(), k.detach(), v.detach(), beta.detach(), gk if gk is None else gk.detach()
    library.opcheck(_backward, (*arguments, cu_seqlens, w, states, 0.5), test_utils=tests[:2])


@pytest.mark.slow
@pytest.mark.parametrize("decay", ["none", "extreme"])
def test_compiled(decay):
    torch.use_deterministic_algorithms(False)

    def attention(q, k, v, beta, gk, S):
        return gated_delta_attention(q, k, v, beta, gk, initial_state=S, output_final_state=True, backend="native")

    compiled = torch.compile(attention, fullgraph=True, dynamic=True)
    for T in (1, 130, 70):
        inputs = make(T, SHAPE, decay, B=2)
        results = []
        for function in (attention, compiled):
            leaves = [x if x is None else x.clone().requires_grad_() for x in inputs]
            o, S = function(*leaves)
            grads = torch.autograd.grad(o.sin().sum() + S.sin().sum(), [x for x in leaves if x is not None])
            results.append([o, S, *grads])
            with torch.no_grad():
                assert torch.equal(function(*inputs)[0], o)
        for found, right in zip(*results, strict=True):
            assert overall(found, right.double()) <= FORWARD


@pytest.mark.parametrize("T", [1, 9])
def test_forward_mode(T):
    """By the recurrence, or an error; never silently zero."""
    q, k, v, beta, gk, _ = make(T, (2, 2, 8, 8), "channel")
    tangent = torch.randn_like(v)

    def attention(v, backend="auto"):
        return gated_delta_attention(q, k, v, beta, gk, backend=backend)[0]

    expected = attention(tangent)  # linear in v
    torch.testing.assert_close(jvp(attention, (v,), (tangent,))[1], expected)
    for backend in ("native", "chunked"):
        with pytest.raises(ValueError, match=f"backend='{backend}' has no forward-mode derivative"):
            jvp(lambda x, b=backend: attention(x, b), (v,), (tangent,))
        with forward_ad.dual_level():
            assert torch.equal(attention(v, backend), gated_delta_attention(q, k, v, beta, gk, backend=backend)[0])
