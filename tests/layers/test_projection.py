"""Maps of one input as one product: the same numbers, and only where it pays and fits."""

import pytest
import torch
from torch import nn

from regla.layers import ReGLAAttention, init_linear_attention
from regla.layers.projection import project
from regla.ops import safe_exp_attention
from regla.ops.backends import why_not_triton


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


class Packed(torch.Tensor):
    """As quantised weights are: a tensor of its own kind."""


def test_maps_that_are_more_than_linear_run_by_themselves():
    x = torch.randn(2, 5, 6)
    plain, other, hooked, frozen, quantised = maps(*[False] * 5)
    adapted = Adapted(6, 3)
    seen = []
    hooked.register_forward_hook(lambda *_: seen.append(1))
    frozen.weight.requires_grad_(False)
    quantised.weight = nn.Parameter(quantised.weight.detach().as_subclass(Packed))
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


OPTIONS = [{}, {"conv_size": 4}, {"gate_axis": "value"}, {"gate_axis": "both"}, {"qk_norm": True}, {"norm": "sum"}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("backend", ["auto", "chunked"])
def test_a_mixer_trains_the_same_in_one_product(options, backend, monkeypatch):
    layer = ReGLAAttention(24, 4, num_kv_heads=2, head_dim=6, value_head_dim=8, backend=backend, **options)
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
        ({"qk_norm": True, "qk_temperature": True}, (False, True)),
        ({"norm": "sum"}, (False, True)),
        ({"norm": "sum", "gate_axis": "both"}, (False, False)),
    ],
)
def test_what_a_mixer_hands_on_in_one_tensor(options, given, monkeypatch):
    """q, k and v unless something changed them in between, and the gates."""
    layer = ReGLAAttention(24, 4, **options)
    seen = []

    def attention(*args, qkv, gates, **kwargs):
        seen.append((qkv is not None, gates is not None))
        return safe_exp_attention(*args, qkv=qkv, gates=gates, **kwargs)

    monkeypatch.setattr("regla.layers.feature_maps.safe_exp_attention", attention)
    with under_autocast():
        layer(torch.randn(2, 5, 24))
    assert seen == [given]


@pytest.mark.parametrize("axis", ["value", "key", "both"])
@pytest.mark.parametrize(("B", "T"), [(2, 40), (3, 1)])  # of one token, strides say little
@pytest.mark.parametrize("backend", ["auto", "chunked", "triton"])
def test_parts_of_one_tensor(axis, B, T, backend):
    """Gradients of a tensor whose parts go in, and what comes out, are those of the parts by themselves."""
    sizes = [(4, 6), (2, 6), (2, 8)]  # heads and channels of q, k, v: two queries share a state
    gates = {"value": {"gv": 8}, "key": {"gk": 6}, "both": {"gk": 6, "gv": 8}}[axis]
    gates |= {name.replace("g", "refine_"): width for name, width in gates.items()}
    wholes = [torch.randn(B, T, sum(h * d for h, d in sizes)), torch.randn(B, T, 2 * sum(gates.values()))]
    results = []
    for together in (True, False):
        qkv, gate = (whole.clone().requires_grad_() for whole in wholes)
        q, k, v = (x.unflatten(-1, s) for x, s in zip(qkv.split([h * d for h, d in sizes], -1), sizes, strict=True))
        parts = gate.split([2 * width for width in gates.values()], -1)
        named = {name: x.unflatten(-1, (2, -1)) for name, x in zip(gates, parts, strict=True)}
        whole = {"qkv": qkv, "gates": gate} if together else {}
        if not together:
            q, k, v, *others = (x.contiguous() for x in (q, k, v, *named.values()))
            named = dict(zip(named, others, strict=True))
        h, _ = safe_exp_attention(q, k, v, **named, **whole, backend=backend)
        results.append([h, *torch.autograd.grad((h * torch.arange(8.0)).sum(), [qkv, gate])])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * other.abs().max().item())


def test_a_tensor_of_which_they_are_no_part_is_refused():
    q, k, v, gate, refine = torch.randn(5, 2, 10, 2, 4).unbind(0)
    whole = torch.cat([q, k, v], 2).flatten(2)
    shaped = "qkv has shape .*; expected a contiguous .*the channels of q, k, v side by side"
    for wrong, sentence in (
        (whole[..., 1:], shaped),
        (torch.cat([whole, whole], -1), shaped),
        (torch.cat([whole, whole], 1), shaped),
        (whole.view(1, 20, 24), shaped),
        (whole.mT.contiguous().mT, shaped),
        (whole.double(), "qkv is torch.float64 on .*, but q is torch.float32"),
        (whole.clone().requires_grad_(), "requires_grad True.*, but q is .*requires_grad False"),
    ):
        for backend in ("auto", "chunked"):
            with pytest.raises(ValueError, match=sentence):
                safe_exp_attention(q, k, v, gate, None, refine_k=refine, qkv=wrong, backend=backend)
    with pytest.raises(ValueError, match="gates has shape"):
        safe_exp_attention(q, k, v, gate, None, refine_k=refine, gates=torch.cat([gate, refine], -1).flatten(2)[:1])


@pytest.mark.parametrize("options", [{}, {"conv_size": 4}, {"qk_temperature": True}, {"feature_map": "relu"}])
@pytest.mark.parametrize("backend", ["chunked", "triton"])
def test_a_norm_inside_of_the_operation_is_the_module(options, backend):
    """What follows a norm of q and k may take it along; a hook says that nothing may."""
    layer = ReGLAAttention(24, 4, num_kv_heads=2, qk_norm=True, backend=backend, **options)
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
    layer = ReGLAAttention(24, 4, qk_norm=True)
    layer.k_norm.eps = 0.1
    seen = []
    layer.feature_map.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["qk_norm"]), with_kwargs=True
    )
    layer(torch.randn(2, 5, 24))
    assert seen == [None]
