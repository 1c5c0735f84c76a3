"""Changing any future token changes no past output by a single bit, whatever the gates and the keys do."""

import pytest
import torch

from regla.ops import regla_attention

from .test_forms import AXES, SHAPES, make, skip_without

T = 150


def change(inputs, at: int, kind: str):
    """The same tokens before `at`; from there on others, with an outlier key, a hard reset or an open gate."""
    changed = [x.clone() for x in inputs]
    for x in changed:
        x[:, at:] += torch.randn_like(x[:, at:])
    if kind == "outlier":
        changed[1][:, at, :, 0] = 100.0
    if kind == "reset":
        changed[3][:, at:] = -1000.0
    if kind == "open":
        changed[3][:, at:] = 16.0
    return changed


@pytest.mark.parametrize("kind", ["noise", "outlier", "reset", "open"])
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("key_max", ["decay", "running"])
@pytest.mark.parametrize("backend", ["chunked", "native"])
def test_no_bit_of_the_past_changes(backend, key_max, axis, kind):
    skip_without(backend)
    options = {"gate_axis": axis, "key_max": key_max, "backend": backend}
    inputs = make(T, SHAPES[4], axis, "outliers")
    before, _ = regla_attention(*inputs, **options)
    for at in (1, 2, 31, 32, 63, 64, 65, 100, 127, 149):
        after, _ = regla_attention(*change(inputs, at, kind), **options)
        assert torch.equal(after[:, :at], before[:, :at]), f"token {at}"
        assert not torch.equal(after[:, at:], before[:, at:])


@pytest.mark.parametrize("axis", AXES)
def test_the_papers_sequence_maximum_leaks_the_future(axis):
    """The same test convicts the literal form, so it can fail."""
    inputs = make(T, SHAPES[4], axis, "plain")
    before, _ = regla_attention(*inputs, gate_axis=axis, key_max="sequence")
    after, _ = regla_attention(*change(inputs, 100, "outlier"), gate_axis=axis, key_max="sequence")
    assert not torch.equal(after[:, :100], before[:, :100])


@pytest.mark.parametrize("backend", ["chunked", "native"])
def test_gradients_are_causal(backend):
    """An output's gradient reaches no later token."""
    skip_without(backend)
    leaves = [x.requires_grad_() for x in make(T, SHAPES[4], "both", "plain")]
    h, _ = regla_attention(*leaves, gate_axis="both", backend=backend)
    for grad in torch.autograd.grad(h[:, :70].square().sum(), leaves):
        assert (grad[:, 70:] == 0).all() and not (grad[:, :70] == 0).all()
