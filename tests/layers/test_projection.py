"""Maps of one input as one product: the same numbers, and only where it pays and fits."""

import itertools

import pytest
import torch
from torch import nn

from regla.layers import ReGLAAttention, init_linear_attention
from regla.layers.defaults import ADDITIVE
from regla.layers.projection import project
from regla.ops.additive import attend
from regla.ops.call import Call, Gates, Packed
from regla.ops.dispatch import why_not_triton
from regla.ops.fused import in_buffers


def maps(*biases: bool) -> list[nn.Linear]:
    return [nn.Linear(6, 4 + i, bias=bias) for i, bias in enumerate(biases)]


def under_autocast():
    return torch.autocast(torch.get_default_device().type, torch.bfloat16)


@pytest.mark.parametrize("bias", [False, True])
def test_one_product_equals_several(bias):
    linears, x = maps(bias, bias, bias), torch.randn(2, 5, 6, requires_grad=True)
    with under_autocast():
        outputs, together = project(x, *linears)
        expected = torch.cat([linear(x) for linear in linears], -1)
    assert together is not None and torch.equal(torch.cat(outputs, -1), together)
    torch.testing.assert_close(together, expected)
    d = torch.randn_like(expected)
    weights = [parameter for linear in linears for parameter in linear.parameters()]
    together_grads, expected_grads = (torch.autograd.grad(y, [x, *weights], d) for y in (together, expected))
    for one, other in zip(together_grads, expected_grads, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)
    assert all(grad.untyped_storage().nbytes() == grad.nbytes for grad in together_grads[1:]), "gradients share memory"


class Adapted(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


class Quantised(torch.Tensor):
    """As quantised weights are: a tensor of its own kind."""


def test_maps_that_are_more_than_linear_run_by_themselves():
    x = torch.randn(2, 5, 6)
    plain, other, hooked, frozen, quantised = maps(*[False] * 5)
    adapted = Adapted(6, 3)
    seen = []
    hooked.register_forward_hook(lambda *_: seen.append(1))
    frozen.weight.requires_grad_(False)
    quantised.weight = nn.Parameter(quantised.weight.detach().as_subclass(Quantised))
    wrapped = nn.Linear(6, 2)
    wrapped.forward = lambda x: x[..., :2] * 3  # as accelerate does to move weights
    with under_autocast():
        for special in (adapted, hooked, wrapped, frozen, quantised):
            outputs, together = project(x, plain, special, other)
            assert together is None
            torch.testing.assert_close(outputs[1], special(x))
        assert seen
        assert project(x, plain, other)[1] is not None
        with nn.modules.module.register_module_forward_hook(lambda *_: None):
            assert project(x, plain, other)[1] is None
        with torch.no_grad():
            assert project(x, plain, other)[1] is None
    assert project(x, plain, other)[1] is None, "without autocast the weights would be copied for this"


def additive(hidden_size: int, heads: int, **options) -> ReGLAAttention:
    return ReGLAAttention(hidden_size, heads, **ADDITIVE.of_layer() | options)


OPTIONS = [{}, {"conv_size": 4}, {"gate_axis": "value"}, {"gate_axis": "both"}, {"qk_norm": True}, {"norm": "sum"}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("backend", ["auto", "chunked"])
def test_a_mixer_trains_the_same_in_one_product(options, backend, monkeypatch):
    layer = additive(24, 4, num_kv_heads=2, head_dim=6, value_head_dim=8, backend=backend, **options)
    init_linear_attention(layer, std=0.3)

    def gradients(x: torch.Tensor) -> list[torch.Tensor]:
        with under_autocast():
            y, _ = layer(x)
        return [y, *torch.autograd.grad(y.float().square().sum(), [x, *layer.parameters()], allow_unused=True)]

    for shape in ((2, 40, 24), (3, 1, 24)):  # of one token, strides say little
        x = torch.randn(shape, requires_grad=True)
        together = gradients(x)
        with monkeypatch.context() as context:
            context.setattr("regla.layers.projection._trains_alone", lambda _: False)
            apart = gradients(x)
        for one, other in zip(together, apart, strict=True):
            assert (one - other).norm() <= 2e-2 * other.norm() + 1e-3


@pytest.mark.parametrize(
    ("options", "given"),
    [
        ({}, (True, True)),
        ({"conv_size": 4}, (True, True)),
        ({"qk_norm": True}, (True, True)),
        ({"qk_norm": True, "qk_calibration": True}, (False, True)),
        ({"norm": "sum"}, (False, True)),
        ({"norm": "sum", "gate_axis": "both"}, (False, False)),
    ],
)
def test_what_a_mixer_hands_on_in_one_tensor(options, given, monkeypatch):
    """q, k and v unless something changed them in between, and the gates."""
    x = torch.randn(1, 2, 3, 16)
    if why_not_triton(x, x) is not None:
        pytest.skip(why_not_triton(x, x))
    layer = additive(24, 4, **{"qk_norm": False} | options, backend="triton")
    seen = []

    def attention(call, engine):
        buffers, _ = in_buffers(call)
        wholes = [
            packed is not None and any(x is packed.whole for x in buffers) for packed in (call.qkv, call.gates.packed)
        ]
        seen.append(tuple(wholes))
        raise InterruptedError

    monkeypatch.setattr("regla.ops.additive.fused_attention", attention)
    monkeypatch.setattr("regla.ops.dispatch._INTERPRETED", (torch.float32, torch.bfloat16))
    with under_autocast(), pytest.raises(InterruptedError):
        layer(torch.randn(2, 5, 24))
    assert seen == [given]


PARTS = [  # of one token, strides say little; the interpreter takes seconds
    pytest.param(
        *case,
        marks=pytest.mark.slow if case[0] == "triton" and case[1:] not in ((2, 40, "key"), (3, 1, "value")) else (),
    )
    for case in (
        *itertools.product(["auto", "chunked", "triton"], [2], [40], ["value", "key", "both"]),
        *itertools.product(["auto", "chunked", "triton"], [3], [1], ["value", "key"]),
    )
]


@pytest.mark.parametrize(("backend", "B", "T", "axis"), PARTS)
def test_parts_of_one_tensor(axis, B, T, backend):
    """Gradients of a tensor whose parts go in, and what comes out, are those of the parts by themselves."""
    sizes = [(4, 6), (2, 6), (2, 8)]  # heads and channels of q, k, v: two queries share a state
    names = {"value": ("gv", "rv"), "key": ("gk", "rk"), "both": ("gk", "gv", "rk", "rv")}[axis]
    gate_sizes = [(2, 8 if name.endswith("v") else 6) for name in names]
    wholes = [torch.randn(B, T, sum(h * d for h, d in x)) for x in (sizes, gate_sizes)]
    results = []
    for together in (True, False):
        leaves = [whole.clone().requires_grad_() for whole in wholes]
        qkv, packed = Packed(leaves[0], sizes), Packed(leaves[1], gate_sizes)
        if together:
            gates = Gates(**dict(zip(names, packed.parts, strict=True)), packed=packed)
            call = Call(*qkv.parts, gates, 1.0, "decay", qkv=qkv)
        else:
            gates = Gates(**{name: x.contiguous() for name, x in zip(names, packed.parts, strict=True)})
            call = Call(*(x.contiguous() for x in qkv.parts), gates, 1.0, "decay")
        h = attend(call, backend).h
        results.append([h, *torch.autograd.grad((h * torch.arange(8.0)).sum(), leaves)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * other.abs().max().item())


@pytest.mark.parametrize("backend", ["auto", "chunked", "triton"])
def test_what_is_no_part_is_computed_from(backend):
    """A packed tensor says where its parts lie, and nothing about tensors that are not among them."""
    x = torch.ones(1, 1, 1, 16)
    if backend == "triton" and why_not_triton(x, x) is not None:
        pytest.skip(why_not_triton(x, x))
    sizes = [(2, 6), (2, 6), (2, 8)]
    qkv, packed = Packed(torch.randn(2, 10, 40), sizes), Packed(torch.randn(2, 10, 24), [(2, 6), (2, 6)])
    q, k, v = qkv.parts
    gk, rk = packed.parts
    for changed in (Call(q, k + 1, v, Gates(gk, rk), 1.0, "decay"), Call(q, k, v, Gates(gk - 3, rk), 1.0, "decay")):
        gates = changed.gates._replace(packed=packed)
        with_packed = attend(changed._replace(qkv=qkv, gates=gates), backend).h
        torch.testing.assert_close(with_packed, attend(changed, backend).h, rtol=0, atol=0)


@pytest.mark.parametrize("train", [False, True])
def test_a_hook_on_the_gate_has_its_way(train):
    """What it returns decays the state, in training under autocast as in inference; gradient hooks are called, too."""
    layer = additive(24, 4)
    init_linear_attention(layer, std=0.3)
    x = torch.randn(2, 20, 24)

    def run():
        with under_autocast(), torch.set_grad_enabled(train):
            return layer(x)[0]

    before = run()
    with layer.gate.register_forward_hook(lambda module, args, gates: gates._replace(gk=gates.gk - 5)):
        hooked = run()
    bias = layer.gate.proj.bias
    with torch.no_grad():
        bias -= 5
    expected = run()
    assert (hooked - before).abs().max() > 0.05
    torch.testing.assert_close(hooked, expected, rtol=0.05, atol=0.02)
    if train:
        seen = []
        with layer.gate.register_forward_hook(lambda module, args, gates: gates.gk.register_hook(seen.append) and None):
            run().sum().backward()
        assert len(seen) == 1 and seen[0].shape == (2, 20, 4, 6)


DELTA = [{"update_rule": "delta", "feature_map": name} for name in ("unit_safe_exp", "unit_silu", "unit_identity")]
OPTIONS = [{}, {"conv_size": 4}, {"qk_calibration": True}, {"feature_map": "relu"}, *DELTA]


@pytest.mark.parametrize(
    ("backend", "options"),
    [
        *(("chunked", options) for options in OPTIONS),
        ("triton", OPTIONS[0]),
        ("triton", OPTIONS[2]),
        ("triton", DELTA[1]),
    ],
)
def test_a_norm_inside_of_the_operation_is_the_module(options, backend):
    """What follows a norm of q and k may take it along; a hook says that nothing may."""
    layer = additive(24, 4, num_kv_heads=2, qk_norm=True, backend=backend, **options)
    x = torch.randn(2, 37, 24)
    reason = why_not_triton(x[..., None], x[..., None]) if backend == "triton" else None
    if reason is not None:
        pytest.skip(reason)
    for norm in (layer.q_norm, layer.k_norm):
        torch.nn.init.normal_(norm.weight, 1.0, 0.3)
    results = []
    for hooked in (False, True):
        called = []
        hook = layer.q_norm.register_forward_hook(lambda *_, called=called: called.append(1)) if hooked else None
        y, _ = layer(x)
        results.append(
            (y.detach(), *torch.autograd.grad((y * torch.linspace(-1, 1, 24)).sum(), list(layer.parameters())))
        )
        assert bool(called) is hooked
        if hook is not None:
            hook.remove()
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() <= 2e-4 * b.abs().max()


def test_norms_of_different_eps_are_called():
    layer = additive(24, 4, qk_norm=True)
    layer.k_norm.eps = 0.1
    seen = []
    layer.rule.register_forward_pre_hook(lambda _, args: seen.append(args[1].qk_norm))
    layer(torch.randn(2, 5, 24))
    assert seen == [None]
