"""The short convolution and its activation: the kernels equal the formula, in float64."""

from itertools import pairwise

import pytest
import torch
from torch.autograd import forward_ad

from regla.layers import ReGLAAttention
from regla.layers.defaults import DEFAULTS
from regla.ops.dispatch import MOST_TAPS, short_convolution_kernel_runs
from regla.ops.short_convolution import short_convolution

ACTIVATIONS = [None, "silu", "sigmoid"]
KERNELS = {"backend": "triton"}
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 4e-3}


@pytest.fixture
def kernels():
    if not short_convolution_kernel_runs("triton", torch.ones(1, 1, 1), torch.ones(2, 1), None):
        pytest.skip("the kernels need a CUDA GPU or Triton's interpreter")
    from regla.ops.triton import short_convolution as module

    return module


def make(B=2, T=21, C=5, taps=4, *, state=True, dtype=torch.float32):
    inputs = {"x": torch.randn(B, T, C).to(dtype), "weight": torch.randn(taps, C)}
    if state:
        inputs["state"] = torch.randn(B, taps - 1, C).to(dtype)
    return {name: x.requires_grad_() for name, x in inputs.items()}


def results(inputs, d, **options):
    """y, the state after x, and the gradients of the inputs."""
    outputs = short_convolution(**inputs, **options)
    d = [x.to(outputs[0].dtype) for x in d]
    found = {"y": outputs[0], "after": outputs[1]}
    return found | dict(zip(inputs, torch.autograd.grad(outputs, [*inputs.values()], d), strict=True))


def random_gradients(inputs):
    (B, _, C), taps = inputs["x"].shape, inputs["weight"].shape[0]
    return torch.randn(inputs["x"].shape).bfloat16(), torch.randn(B, taps - 1, C).bfloat16()


def literal(x, weight, activation, state=None, cu_seqlens=None):
    """The formula, token by token."""
    (B, T, C), rows = x.shape, []
    state = x.new_zeros(B, weight.shape[0] - 1, C) if state is None else state
    history = torch.cat([state, x], 1)
    starts = set() if cu_seqlens is None else set(cu_seqlens.tolist())
    for t in range(T):
        y, open_ = x[:, t], True
        for j in range(weight.shape[0]):
            y = y + weight[j] * history[:, t + len(state[0]) - j] if open_ else y
            open_ = open_ and t - j not in starts
        rows.append(y)
    y = torch.stack(rows, 1) if rows else x
    y = y if activation is None else {"silu": lambda y: y * torch.sigmoid(y), "sigmoid": torch.sigmoid}[activation](y)
    return y, history[:, T:]


def assert_right(inputs, activation, backend="triton", cu_seqlens=None):
    d = random_gradients(inputs)
    found = results(inputs, d, activation=activation, backend=backend, cu_seqlens=cu_seqlens)
    exact = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    outputs = literal(**exact, activation=activation, cu_seqlens=cu_seqlens)
    grads = torch.autograd.grad(outputs, [*exact.values()], [x.double() for x in d], allow_unused=True)
    expected = dict(zip(("y", "after", *exact), (*outputs, *grads), strict=True))
    dtype = inputs["x"].dtype
    for name, x in found.items():
        assert x.dtype == (torch.float32 if name == "weight" else dtype), name
        assert (x - expected[name]).norm() <= TOLERANCES[dtype] * expected[name].norm(), name


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("state", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_kernels_are_the_formula(kernels, activation, state, dtype):
    assert_right(make(state=state, dtype=dtype), activation)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_definition_is_the_formula(activation, dtype):
    """In between it is float32: bfloat16 is rounded once."""
    assert_right(make(dtype=dtype), activation, "chunked")
    assert_right(make(B=1, dtype=dtype, state=False), activation, "chunked", torch.tensor([0, 2, 2, 3, 21]))


@pytest.mark.parametrize("T", [1, 3, 16, 37])
@pytest.mark.parametrize("taps", [2, 4, MOST_TAPS])
def test_of_any_length(kernels, taps, T):
    """Shorter than the filter; and of several programs, the last one not full."""
    assert_right(make(B=1, T=T, C=3, taps=taps), "silu")


@pytest.mark.parametrize("C", [1, 33, 130, 256])
def test_of_any_width(kernels, C):
    assert_right(make(B=1, T=5, C=C, taps=3), "silu")


@pytest.mark.parametrize("ends", [[0, 35], [0, 1, 2, 3, 35], [0, 0, 5, 5, 5, 16, 19, 33, 35, 35]])
def test_packed_sequences(kernels, ends):
    assert_right(make(B=1, T=35, taps=4, state=False), "silu", cu_seqlens=torch.tensor(ends, dtype=torch.int32))


def test_programs_of_any_length(kernels, monkeypatch):
    monkeypatch.setattr(kernels, "_CTAS", 0)
    monkeypatch.setattr(kernels, "_LONGEST", 32)
    assert_right(make(B=1, T=40, C=2), "silu")
    assert_right(make(B=1, T=40, C=2, state=False), "silu", cu_seqlens=torch.tensor([0, 31, 32, 34, 40]))


@pytest.mark.parametrize("backend", ["chunked", "triton"])
@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (2, 5, 0)])
def test_of_nothing(shape, backend):
    B, T, C = shape
    inputs = make(*shape)
    found = results(inputs, random_gradients(inputs), activation="silu", backend=backend)
    assert found["y"].shape == (B, T, C) and found["after"].shape == (B, 3, C)
    assert T or torch.equal(found["after"], inputs["state"])


@pytest.mark.parametrize("what", ["a slice", "channels apart", "state", "weight"])
@pytest.mark.parametrize("T", [1, 6])
def test_any_strides(kernels, T, what):
    inputs = make(B=2, T=T, C=6, taps=4)
    if what == "a slice":  # of a product that gave other things, too
        inputs["x"] = torch.randn(2, T, 16)[..., 3:9].requires_grad_()
    elif what == "channels apart":
        inputs["x"] = torch.randn(2, 6, T).transpose(1, 2).requires_grad_()
    else:
        inputs[what] = inputs[what].detach().mT.contiguous().mT.requires_grad_()
        assert not inputs[what].is_contiguous()
    assert_right(inputs, "silu")
    with torch.no_grad():
        found, expected = (short_convolution(**inputs, backend=x) for x in ("triton", "chunked"))
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y)


def test_gradients_of_one_output_alone(kernels):
    """And of a sum, whose gradient is one number, expanded."""
    for output in (0, 1):
        inputs, found = make(), []
        for backend in ("triton", "chunked"):
            y = short_convolution(**inputs, activation="silu", backend=backend)[output]
            found.append(torch.autograd.grad(y.sum(), [*inputs.values()], materialize_grads=True, allow_unused=True))
        for x, expected in zip(*found, strict=True):
            torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", TOLERANCES)
@torch.no_grad()
def test_in_pieces_and_token_by_token(kernels, dtype):
    """To the last bit, so no later token alters an earlier output."""
    inputs = make(T=13, dtype=dtype)
    x, weight, state = inputs.values()
    y, after = short_convolution(x, weight, activation="silu", state=state, **KERNELS)
    for cuts in ([0, 2, 13], range(14)):
        now, parts = state.clone(), []
        for lo, hi in pairwise(cuts):
            part, now = short_convolution(x[:, lo:hi], weight, activation="silu", state=now, **KERNELS)
            parts.append(part)
        assert torch.equal(torch.cat(parts, 1), y) and torch.equal(now, after)


@torch.no_grad()
def test_the_state_of_one_token_is_overwritten_or_kept(kernels, monkeypatch):
    steps, run = [], kernels.step
    monkeypatch.setattr(kernels, "step", lambda *x: (steps.append(0), run(*x)))
    inputs = make(T=1)
    x, weight, state = inputs.values()
    expected = short_convolution(x, weight, state=state, backend="chunked")
    for overwrite in (False, True):
        given = state.clone()
        y, after = short_convolution(x, weight, state=given, overwrite_state=overwrite, **KERNELS)
        torch.testing.assert_close(y, expected[0])
        assert torch.equal(after, expected[1])
        assert (after is given) == overwrite and (overwrite or torch.equal(given, state))
    assert len(steps) == 2
    with torch.enable_grad():  # the state takes part in a gradient
        _, after = short_convolution(x, weight, state=state, overwrite_state=True, **KERNELS)
    assert after is not state and after.requires_grad and len(steps) == 2


@torch.no_grad()
@pytest.mark.parametrize("overwrite", [False, True])
def test_padding_in_decoding(kernels, overwrite):
    x, weight, state = make(B=3, T=1).values()
    mask = torch.tensor([[True], [False], [True]])
    x = torch.where(mask[..., None], x, torch.nan)
    expected = short_convolution(x, weight, state=state, mask=mask, backend="chunked")
    y, after = short_convolution(x, weight, state=state.clone(), mask=mask, overwrite_state=overwrite, **KERNELS)
    torch.testing.assert_close(y[mask], expected[0][mask])
    assert torch.equal(after, expected[1]) and torch.equal(after[1], state[1]) and y.isfinite().all()


@pytest.mark.parametrize("state", [True, False])
@pytest.mark.parametrize("pattern", ["0001111", "1101011", "1100000", "0000000"])
def test_padding(kernels, pattern, state):
    inputs = make(B=2, T=7, state=state)
    mask = torch.tensor([[x == "1" for x in pattern], [True] * 7])
    with torch.no_grad():
        inputs["x"][~mask] = torch.nan
    d = [x.float() for x in random_gradients(inputs)]
    d[0][~mask] = 0
    found = results(inputs, d, activation="silu", mask=mask, backend="triton")
    expected = results(inputs, d, activation="silu", mask=mask, backend="chunked")
    for name, x in found.items():
        torch.testing.assert_close(x, expected[name], rtol=1e-5, atol=1e-5)
    assert all(x.isfinite().all() for x in found.values())


def test_what_is_no_number_stays_where_it_counts(kernels):
    """In a token: in the outputs that see it, in the gradients of tokens that these see, in no other sequence."""
    x, weight, _ = make(B=2, T=32, C=3).values()
    with torch.no_grad():
        x[0, 20, 1] = torch.nan
    y, _ = short_convolution(x, weight, activation="silu", **KERNELS)
    (d_x,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y.isnan().nonzero(), torch.tensor([[0, t, 1] for t in range(20, 24)]))
    assert torch.equal(d_x.isnan().nonzero(), torch.tensor([[0, t, 1] for t in range(17, 24)]))
    packed, ends = x.detach()[:1].requires_grad_(), torch.tensor([0, 18, 21, 32])
    y, _ = short_convolution(packed, weight, activation="silu", cu_seqlens=ends, **KERNELS)
    (d_x,) = torch.autograd.grad(y.sum(), packed)
    assert torch.equal(y.isnan().nonzero(), torch.tensor([[0, 20, 1]]))
    assert torch.equal(d_x.isnan().nonzero(), torch.tensor([[0, t, 1] for t in (18, 19, 20)]))


def test_the_same_again(kernels):
    inputs = make(T=33)
    d = random_gradients(inputs)
    first, second = (results(inputs, d, activation="silu", backend="triton") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_gradients_of_gradients(kernels):
    inputs = make(B=1, T=6, C=2)
    weights = [torch.randn(x.shape) for x in inputs.values()]
    found = []
    for backend in ("triton", "chunked"):
        y, after = short_convolution(**inputs, activation="silu", backend=backend)
        grads = torch.autograd.grad(y.square().sum() + after.sum(), [*inputs.values()], create_graph=True)
        loss = sum((x * w).sum() for x, w in zip(grads, weights, strict=True))
        found.append([*grads, *torch.autograd.grad(loss, [*inputs.values()])])
    for x, expected in zip(*found, strict=True):
        torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("T", [1, 6])
def test_forward_mode(kernels, T):
    inputs = {name: x.detach() for name, x in make(T=T).items()}
    tangent = torch.randn_like(inputs["x"])
    with forward_ad.dual_level():
        dual = inputs | {"x": forward_ad.make_dual(inputs["x"], tangent)}
        found = forward_ad.unpack_dual(short_convolution(**dual, activation="silu", **KERNELS)[0]).tangent
    _, expected = torch.func.jvp(
        lambda x: short_convolution(**inputs | {"x": x}, activation="silu", backend="chunked")[0],
        (inputs["x"],),
        (tangent,),
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("what", ["more taps", "float64", "another dtype of the state"])
def test_what_the_kernels_do_not_take_the_formula_does(kernels, what):
    inputs = make(T=5, taps=MOST_TAPS + 1 if what == "more taps" else 4)
    if what == "float64":
        inputs = {name: x.detach().double() for name, x in inputs.items()}
    if what == "another dtype of the state":
        inputs["state"] = inputs["state"].detach().double()
    found, expected = (short_convolution(**inputs, activation="silu", backend=x) for x in ("triton", "chunked"))
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("T", [1, 20])
def test_compiled(kernels, T):
    """In one graph; of one token with the state overwritten."""
    inputs = make(T=T)
    compiled = torch.compile(
        lambda **x: short_convolution(**x, activation="silu", overwrite_state=True, **KERNELS), fullgraph=True
    )
    if T == 1:
        x, weight, state = (x.detach() for x in inputs.values())
        given = state.clone()
        y, _ = compiled(x=x, weight=weight, state=given)
        expected = short_convolution(x, weight, activation="silu", state=state, backend="chunked")
        torch.testing.assert_close(y, expected[0])
        assert torch.equal(given, expected[1])
        return
    d = [x.float() for x in random_gradients(inputs)]
    outputs = compiled(**inputs)
    found = [*outputs, *torch.autograd.grad(outputs, [*inputs.values()], d)]
    expected = results(inputs, d, activation="silu", backend="triton")
    for x, y in zip(found, expected.values(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_exported(kernels):
    class Convolution(torch.nn.Module):
        def forward(self, x, weight, state):
            return short_convolution(x, weight, activation="silu", state=state, **KERNELS)

    inputs = [x.detach() for x in make(T=9).values()]
    length = {1: torch.export.Dim("T", min=2)}
    program = torch.export.export(Convolution(), tuple(inputs), dynamic_shapes=(length, None, None))
    for T in (2, 9, 30):
        inputs[0] = torch.randn(2, T, 5)
        found = program.module()(*inputs)
        assert all(torch.equal(x, y) for x, y in zip(found, Convolution()(*inputs), strict=True))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"activation": "tanh"}, "activation is 'tanh'; expected one of None, 'silu', 'sigmoid'"),
        ({"weight": torch.ones(1, 5)}, r"weight has shape \[1, 5\]; expected \[taps, C\] with taps >= 2 and C = 5"),
        ({"weight": torch.ones(4, 6)}, r"weight has shape \[4, 6\]; expected .* C = 5"),
        ({"state": torch.ones(2, 4, 5)}, r"state has shape \[2, 4, 5\]; expected \[B, taps - 1, C\] = \[2, 3, 5\]"),
    ],
)
def test_errors(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        short_convolution(**make() | change)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_in_a_mixer(kernels, monkeypatch):
    """Training and decoding go through the kernels, and give what the formula gives."""
    calls = []
    for name in ("forward", "backward", "step"):
        run = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *x, run=run, name=name: (calls.append(name), run(*x)))
    layer = ReGLAAttention(32, 2, **DEFAULTS.of_layer() | {"conv_size": 4, "conv_activation": "silu"})
    torch.nn.init.normal_(layer.conv.weight)
    x, found = torch.randn(1, 20, 32), []
    for backend in ("chunked", "triton"):
        layer.rule.backend = backend
        y, state = layer(x, return_state=True)
        torch.manual_seed(1)
        grads = torch.autograd.grad((y * torch.randn_like(y)).sum(), [*layer.parameters()])
        with torch.no_grad():
            before = state._replace(conv=state.conv.clone())
            y_next, after = layer(x[:, :1], state=before, return_state=True, overwrite_state=True)
        assert (after.conv is before.conv) == (backend == "triton")
        found.append([y, *grads, y_next, after.conv])
    assert calls == ["forward", "backward", "step"]
    for expected, value in zip(*found, strict=True):
        assert (value - expected).norm() <= 1e-4 * expected.norm()
