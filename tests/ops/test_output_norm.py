"""The norm over a head's output and the gate on it: the kernel equals the formula, in float64."""

import pytest
import torch

from regla.ops.backends import output_norm_kernel_runs
from regla.ops.output_norm import output_norm

EPS = 1e-3
ACTIVATIONS = [None, "silu", "sigmoid"]


@pytest.fixture(autouse=True)
def _kernels_run():
    if not output_norm_kernel_runs("triton", torch.ones(1), None):
        pytest.skip("the kernels need a CUDA GPU or Triton's interpreter")


def make(B=2, T=37, H=3, V=64, *, layer=False, activation="silu", dtype=torch.float32, gate_dtype=None, step=0):
    """h, weight, bias and gate: `step` more channels than it has lie between the logits of two tokens."""
    inputs = {"h": torch.randn(B, T, H, V).to(dtype), "weight": torch.randn(H, V)}
    if layer:
        inputs["bias"] = torch.randn(H, V)
    if activation is not None:
        gate = 2 * torch.randn(B, T, H * V + step)
        inputs["gate"] = gate.to(gate_dtype or dtype)[..., : H * V]
    return {name: x.requires_grad_() for name, x in inputs.items()}


def results(inputs, d, **options):
    o = output_norm(**inputs, **options)
    return {"o": o, **dict(zip(inputs, torch.autograd.grad(o, [*inputs.values()], d.to(o.dtype)), strict=True))}


def assert_right(inputs, activation, tolerance):
    d = torch.randn(inputs["h"].shape).bfloat16()
    found = results(inputs, d, activation=activation, eps=EPS, backend="triton")
    exact = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    expected = results(exact, d, activation=activation, eps=EPS, backend="chunked")
    for name, x in found.items():
        assert x.dtype == (inputs[name].dtype if name != "o" else inputs["h"].dtype), name
        assert (x - expected[name]).norm() <= tolerance * expected[name].norm(), name


@pytest.mark.parametrize("layer", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_the_kernel_is_the_formula(activation, layer, dtype, tolerance):
    assert_right(make(layer=layer, activation=activation, dtype=dtype), activation, tolerance)


@pytest.mark.parametrize("V", [1, 16, 20, 33, 128, 256])
def test_of_any_width(V):
    assert_right(make(T=19, V=V, layer=True), "silu", 1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (1, 1000)])
def test_of_any_length(shape):
    """One token; and blocks of tokens of which a program has several, the last one not full."""
    assert_right(make(*shape, H=2, V=16), "sigmoid", 1e-6)


@pytest.mark.parametrize("shape", [(2, 37), (5, 1)])
def test_logits_need_not_lie_side_by_side(shape):
    assert_right(make(*shape, step=24), "silu", 1e-6)


def test_dtypes_may_differ():
    inputs = make(dtype=torch.bfloat16, gate_dtype=torch.float32)
    with torch.no_grad():
        assert output_norm(**inputs, activation="silu", eps=EPS, backend="triton").dtype == torch.float32


@pytest.mark.parametrize("layer", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("size", [1e-37, 1e-12, 1e36])
def test_a_factor_is_forgotten(size, layer):
    inputs = make(layer=layer)
    inputs["h"] = (inputs["h"].detach() * size).requires_grad_()
    exact = {name: x.detach().double() for name, x in inputs.items()}
    o = output_norm(**inputs, activation="silu", eps=EPS, backend="triton")
    expected = output_norm(**exact, activation="silu", eps=EPS, backend="chunked")
    assert (o - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("layer", [False, True], ids=["rms", "layer"])
def test_of_nothing_all_is_finite(layer):
    inputs = make(T=4, layer=layer)
    with torch.no_grad():
        inputs["h"][:, 1] = 0
        inputs["h"][:, 2] *= 1e-37
    d = torch.randn_like(inputs["h"])
    d[:, 2] = 0  # times what is close to infinity
    found = results(inputs, d, activation="silu", eps=EPS, backend="triton")
    assert all(x.isfinite().all() for x in found.values())
    assert (found["o"][:, 1] == 0).all() or layer


def test_logits_may_be_large():
    inputs = make(V=16)
    with torch.no_grad():
        inputs["gate"][0, 0] = torch.linspace(-1e4, 1e4, 48)
    assert_right(inputs, "silu", 1e-6)
    assert_right(inputs, "sigmoid", 1e-6)


def test_the_same_again():
    inputs = make(T=300, layer=True)
    d = torch.randn(inputs["h"].shape)
    first, second = (results(inputs, d, activation="silu", eps=EPS, backend="triton") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_programs_take_many_blocks(monkeypatch):
    from regla.ops.triton import output_norm as kernels

    monkeypatch.setitem(kernels._PROGRAMS, "layer", 7)  # of three heads
    assert_right(make(T=500, layer=True), "silu", 1e-6)


def test_compiled():
    inputs = make()
    compiled = torch.compile(lambda **x: output_norm(**x, activation="silu", eps=EPS, backend="triton"), fullgraph=True)
    d = torch.randn(inputs["h"].shape)
    expected = results(inputs, d, activation="silu", eps=EPS, backend="triton")
    o = compiled(**inputs)
    found = {"o": o, **dict(zip(inputs, torch.autograd.grad(o, [*inputs.values()], d), strict=True))}
    assert all(torch.allclose(found[name], expected[name], rtol=1e-6, atol=1e-6) for name in found)


def test_an_unknown_activation_is_an_error():
    inputs = make()
    with pytest.raises(ValueError, match="activation is 'tanh'; expected one of 'silu', 'sigmoid'"):
        output_norm(**inputs, activation="tanh", eps=EPS)
