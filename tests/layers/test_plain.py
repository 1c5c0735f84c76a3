"""A module that is more than its weights is called, in the whole pass and in cached steps alike."""

import pytest
import torch
from torch import nn

from regla.layers import ReGLAAttention, init_linear_attention
from regla.layers.defaults import ADDITIVE
from regla.layers.norms import HeadLayerNorm, HeadRMSNorm
from regla.layers.plain import is_plain
from regla.ops.dispatch import why_not_native

HIDDEN = 48
PARTS = ["norm", "q_norm", "k_norm", "gate", "q_proj", "k_proj", "v_proj", "o_proj", "output_gate", "conv"]


def mixer(**options):
    layer = ReGLAAttention(HIDDEN, 4, **ADDITIVE.of_layer() | {"conv_size": 3} | options)
    init_linear_attention(layer, std=0.4)
    with torch.no_grad():
        for norm in (layer.norm, layer.q_norm, layer.k_norm):
            norm.weight.normal_(1.0, 0.3)
    return layer


@torch.no_grad()
def whole_and_steps(layer, T=7):
    """The outputs of the last tokens in one pass, and from a state that is overwritten token by token."""
    x = torch.randn(2, T, HIDDEN)
    whole, _ = layer(x)
    _, state = layer(x[:, :3], return_state=True)
    steps = []
    for t in range(3, T):
        y, state = layer(x[:, t : t + 1], state=state, return_state=True, overwrite_state=True)
        steps.append(y)
    return whole[:, 3:], torch.cat(steps, 1)


def doubled(module, args, output):
    if torch.is_tensor(output):
        return 2 * output + 0.1
    if hasattr(output, "gk"):
        return output._replace(gk=output.gk - 1)
    return 2 * output[0], *output[1:]


class Doubled(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return doubled(self, args, self.inner(*args, **kwargs))


class OwnRMSNorm(HeadRMSNorm):
    def forward(self, *args, **kwargs):
        return 2 * super().forward(*args, **kwargs)


class OwnQKNorm(nn.RMSNorm):
    def forward(self, x):
        return 2 * super().forward(x)


class Half(nn.Module):
    def forward(self, weight):
        return weight / 2


@pytest.mark.parametrize("way", ["hook", "pre-hook", "global hook", "own forward"])
@pytest.mark.parametrize("part", PARTS)
def test_hooks_act_in_whole_passes_and_in_steps(part, way):
    layer = mixer()
    module, plain = getattr(layer, part), whole_and_steps(layer)[0]
    handles = []
    if way == "hook":
        handles.append(module.register_forward_hook(doubled))
    elif way == "pre-hook":
        handles.append(module.register_forward_pre_hook(lambda _, args: (args[0] + 0.5, *args[1:])))
    elif way == "global hook":
        only = lambda m, args, output: doubled(m, args, output) if m is module else None  # noqa: E731
        handles.append(nn.modules.module.register_module_forward_hook(only))
    else:
        inner = module.forward
        module.forward = lambda *args, **kwargs: doubled(module, args, inner(*args, **kwargs))
    torch.manual_seed(0)
    whole, steps = whole_and_steps(layer)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(steps, whole, rtol=1e-4, atol=1e-4)
    if part not in ("q_norm", "k_norm") or way != "hook":
        assert (whole - plain).abs().max() > 1e-3


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
@pytest.mark.parametrize("part", ["norm", "q_norm"])
def test_other_modules_act_in_whole_passes_and_in_steps(part, norm):
    """A subclass, a parametrised one, a wrapper, one without weights, another class."""
    for kind in ("subclass", "parametrised", "wrapper", "identity"):
        layer = mixer(norm=norm)
        module = getattr(layer, part)
        if kind == "subclass":
            module.__class__ = OwnQKNorm if part == "q_norm" else OwnRMSNorm
        elif kind == "parametrised":
            nn.utils.parametrize.register_parametrization(module, "weight", Half())
        elif kind == "wrapper":
            setattr(layer, part, Doubled(module))
        else:
            setattr(layer, part, nn.Identity())
        whole, steps = whole_and_steps(layer)
        torch.testing.assert_close(steps, whole, rtol=1e-4, atol=1e-4)


def test_a_hook_that_returns_zeros_is_seen_by_steps():
    layer = mixer()
    layer.norm.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    whole, steps = whole_and_steps(layer)
    assert (whole == 0).all() and (steps == 0).all()


def test_who_is_plain():
    norm = HeadRMSNorm(2, 8, 1e-6)
    assert is_plain(norm, HeadRMSNorm, HeadLayerNorm) and not is_plain(norm, HeadLayerNorm)
    assert is_plain(nn.Linear(2, 2, bias=False), nn.Linear)
    assert not is_plain(OwnRMSNorm(2, 8, 1e-6), HeadRMSNorm)
    sharded = HeadRMSNorm(2, 8, 1e-6)
    sharded.weight = nn.Parameter(norm.weight.detach().as_subclass(Sharded))
    assert not is_plain(sharded, HeadRMSNorm)
    with norm.register_full_backward_hook(lambda *_: None):
        assert not is_plain(norm, HeadRMSNorm)


class Sharded(torch.Tensor):
    """As FSDP2's parameters are: a tensor of its own kind."""


@pytest.mark.skipif(why_not_native(torch.ones(1), torch.ones(1)) is not None, reason="needs the C kernels")
def test_a_plain_norm_is_taken_along(monkeypatch):
    """What is plain costs no call of its own in a step."""
    layer, called = mixer(), []
    monkeypatch.setattr(HeadRMSNorm, "forward", lambda self, h, *rest: called.append(1) or h)
    x = torch.randn(1, 1, HIDDEN)
    with torch.no_grad():
        _, state = layer(x, return_state=True)
        called.clear()
        layer(x, state=state, return_state=True, overwrite_state=True)
        assert called == []
        layer.norm.register_forward_hook(lambda *_: None)
        layer(x, state=state, return_state=True, overwrite_state=True)
        assert called == [1]
