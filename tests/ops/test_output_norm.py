"""The norm over a head's output and the gate on it: the kernel equals the formula, in float64."""

import pytest
import torch

from regla.layers import ReGLAAttention
from regla.layers.defaults import ADDITIVE
from regla.ops.dispatch import output_norm_kernel_runs
from regla.ops.output_norm import output_norm

EPS = 1e-3
ACTIVATIONS = [None, "silu", "sigmoid"]


@pytest.fixture(autouse=True)
def _kernels_run():
    if not output_norm_kernel_runs("triton", torch.ones(1, 1, 1, 1), torch.ones(1, 1), None, None):
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
        kinds = [inputs[part].dtype for part in ("h", "gate") if part in inputs]
        assert x.dtype == (torch.promote_types(kinds[0], kinds[-1]) if name == "o" else inputs[name].dtype), name
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


@pytest.mark.parametrize("what", ["h", "weight", "bias", "gate", "gate's last tokens"])
def test_any_strides(what):
    inputs = make(B=3, T=3, H=4, V=4, layer=True)
    if what == "gate's last tokens":
        inputs["gate"] = torch.randn(3, 5, 16)[:, 2:].requires_grad_()
    else:
        axes = (0, 1) if what == "gate" else (-1, -2)  # of one size
        inputs[what] = inputs[what].detach().transpose(*axes).requires_grad_()
        assert not inputs[what].is_contiguous()
    assert_right(inputs, "silu", 1e-6)


def test_gradients_of_a_sum():
    inputs = make()
    o = output_norm(**inputs, activation="silu", eps=EPS, backend="triton")
    found = torch.autograd.grad(o.sum(), [*inputs.values()])  # one number, expanded
    expected = results(inputs, torch.ones(inputs["h"].shape), activation="silu", eps=EPS, backend="triton")
    assert all(torch.equal(x, expected[name]) for name, x in zip(inputs, found, strict=True))


@pytest.mark.parametrize("layer", [False, True], ids=["rms", "layer"])
def test_without_eps(layer):
    inputs = make(B=1, T=5, H=2, V=16, layer=layer)
    d = torch.randn(inputs["h"].shape)
    found = results(inputs, d, activation="silu", eps=0.0, backend="triton")
    expected = results(inputs, d, activation="silu", eps=0.0, backend="chunked")
    assert all((x - expected[name]).norm() <= 1e-5 * expected[name].norm() for name, x in found.items())


def test_what_is_below_the_least_normal_number_is_nothing():
    inputs = make(T=2)
    with torch.no_grad():
        inputs["h"].fill_(1e-39)
        o, expected = (output_norm(**inputs, activation="silu", eps=EPS, backend=x) for x in ("triton", "chunked"))
    assert o.abs().max() < 1e-35 and expected.abs().max() < 1e-35


@pytest.mark.parametrize(
    ("name", "shape"), [("weight", (16,)), ("weight", (1, 16)), ("gate", (1, 5, 32)), ("h", (5, 2, 16))]
)
def test_what_the_kernel_does_not_take_the_formula_does(name, shape):
    inputs = make(B=2, T=5, H=2, V=16, activation=None if name == "h" else "silu")
    inputs[name] = torch.randn(shape)
    o, expected = (output_norm(**inputs, activation="silu", eps=EPS, backend=x) for x in ("triton", "chunked"))
    assert torch.equal(o, expected)


@pytest.mark.parametrize(("dtype", "gate_dtype"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_dtypes_may_differ(dtype, gate_dtype):
    inputs = make(dtype=dtype, gate_dtype=gate_dtype)
    assert_right(inputs, "silu", 4e-3)
    with torch.no_grad():
        found, expected = (output_norm(**inputs, activation="silu", eps=EPS, backend=x) for x in ("triton", "chunked"))
    assert found.dtype == expected.dtype == torch.float32 and (found - expected).norm() <= 1e-6 * expected.norm()


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

    chip = kernels.chip_of(torch.device("cpu"))._replace(
        output_norm_ctas={"layer": 7}, multiprocessors=1
    )  # of three heads
    monkeypatch.setattr(kernels, "chip_of", lambda device: chip)
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


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("norm", "gate"), [("rmsnorm", "silu"), ("layernorm", "sigmoid"), ("rmsnorm", None)])
def test_in_a_mixer(norm, gate, monkeypatch):
    from regla.ops.triton import output_norm as kernels

    calls = []
    for name in ("forward", "backward"):
        run = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *x, run=run, name=name: (calls.append(name), run(*x)))
    layer, x = (
        ReGLAAttention(32, 2, **ADDITIVE.of_layer() | {"norm": norm, "output_gate": gate}),
        torch.randn(1, 40, 32),
    )
    with torch.no_grad():
        layer.norm.weight.normal_()
    found = []
    for backend in ("chunked", "triton"):
        layer.rule.backend = backend
        y, _ = layer(x)
        torch.manual_seed(1)
        found.append([y, *torch.autograd.grad((y * torch.randn_like(y)).sum(), [*layer.parameters()])])
    assert calls == ["forward", "backward"]
    for expected, value in zip(*found, strict=True):
        assert (value - expected).norm() <= 1e-4 * expected.norm()
