"""A NaN that an input has is one in all that the definition computes from it: no maximum and no minimum hides it.

Where Triton's interpreter runs the kernels, its maxima drop NaN as a GPU's do (`conftest.py`).
"""

import itertools

import pytest
import torch

from regla.layers.norms import HeadRMSNorm
from regla.ops import gate_decays, gated_linear_attention, regla_attention
from regla.ops.attention import safe_exp_step_

from .test_decode import logits
from .test_forms import AXES, make

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter's
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.usefixtures("operation"),
]

INPUTS = ("q", "k", "v", "gate", "refine")
T, AT = 40, 3  # 40: more than a chunk


def with_nan(inputs, name, token=AT):
    """One number of one token."""
    inputs = [x.clone() for x in inputs]
    inputs[INPUTS.index(name)][:, token, 0, 1] = torch.nan
    return inputs


def assert_covers(found, expected, what):
    """NaN wherever the definition has it. More may be: a product with a NaN spreads it over a chunk."""
    missed = expected.isnan() & ~found.isnan()
    assert not missed.any(), f"{what}: {int(missed.sum())} of {int(expected.isnan().sum())} are numbers"


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("axis", AXES)
def test_a_token_at_a_time(axis, name):
    """Output, state and m of the decode kernel, and with the norm the whole output."""
    inputs = with_nan(make(AT + 2, (2, 1, 16, 24), axis, "plain"), name)
    expected, (S_ref, m_ref) = regla_attention(*inputs, gate_axis=axis, output_final_state=True, backend="recurrent")
    if name == "v":  # the definition has it in every channel, through a factor of the whole head
        expected[..., [c for c in range(24) if c != 1]] = 0
    norm = HeadRMSNorm(2, 24, eps=1e-6)
    for weight in (None, norm.weight.detach()):
        S, m = torch.zeros(1, 1, 16, 24), torch.zeros(1, 1)
        steps = [
            safe_exp_step_(
                *(x[:, t : t + 1] for x in inputs[:3]), S, m,
                **{key: None if x is None else x[:, t : t + 1] for key, x in logits(*inputs[3:], axis, 16, 24).items()},
                engine="triton", weight=weight, eps=1e-6,
            )
            for t in range(AT + 2)
        ]  # fmt: skip
        h = torch.cat(steps, 1)
        assert not h[:, :AT].isnan().any()
        assert_covers(h, expected if weight is None else norm(expected), "h")
        assert_covers(S, S_ref, "S")
        assert_covers(m, m_ref, "m")
    assert expected[:, AT].isnan().any()


# By default every input on the key axis, over both paths, and of the other axes what decays: they share the rest.
CASES = [
    pytest.param(*case, marks=() if case[0] == "key" or case[1:] == ("gate", "fast") else pytest.mark.slow)
    for case in itertools.product(AXES, [*INPUTS, "d_h"], ["slow", "fast"])
]


@pytest.mark.parametrize(("axis", "name", "gates"), CASES)
def test_a_sequence_and_its_gradients(axis, name, gates):
    """Gates that leave 2^-10 of a state in a token take the path over the tree."""
    inputs = [x.bfloat16() for x in make(T, (1, 1, 16, 16), axis, "plain")]
    if gates == "fast":
        inputs[3] = inputs[3].abs() * -2 - 4
    d_h = torch.randn(1, T, 1, 16)
    if name == "d_h":
        d_h[:, AT, 0, 1] = torch.nan
    else:
        inputs = with_nan(inputs, name)
    results = {}
    for backend, dtype in (("recurrent", torch.float64), ("triton", torch.bfloat16)):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        h, (S, m) = regla_attention(*leaves, gate_axis=axis, output_final_state=True, backend=backend)
        h.backward(d_h.to(dtype))
        results[backend] = h.detach(), S.detach(), m, *(x.grad for x in leaves)
    h_ref = results["recurrent"][0]
    if name == "v":
        h_ref[..., [c for c in range(16) if c != 1]] = 0
    for what, found, expected in zip(
        ("h", "S", "m", *(f"d_{name}" for name in INPUTS)), results["triton"], results["recurrent"], strict=True
    ):
        assert_covers(found, expected, what)
    assert any(x.isnan().any() for x in results["recurrent"])


@pytest.mark.parametrize("name", ["q", "k", "v", "gate"])
@pytest.mark.parametrize("axis", ["key", "value"])
def test_features_and_decays(axis, name):
    """The operation that takes features and log-decays, over the tree."""
    q, k, v, gate, _ = (x.bfloat16() for x in make(T, (1, 1, 16, 16), axis, "plain"))
    inputs = with_nan([q, k, v, gate.abs() * -4, gate], name)[:4]
    results = []
    for backend, dtype in (("recurrent", torch.float64), ("triton", torch.bfloat16)):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        gk, gv = gate_decays(leaves[3], axis, 16, 16)
        h, S = gated_linear_attention(*leaves[:3], gk, gv, output_final_state=True, backend=backend, validate=False)
        h.sum().backward()
        results.append((h.detach(), S.detach(), *(x.grad for x in leaves)))
    for what, expected, found in zip(("h", "S", "d_q", "d_k", "d_v", "d_g"), *results, strict=True):
        assert_covers(found, expected, what)


@pytest.mark.parametrize("name", ["k", "gate"])
def test_a_segment(name, operation, monkeypatch):
    """The state that the first segment of a sequence leaves to the next."""
    cut = []
    monkeypatch.setattr(
        operation, "_segments", lambda heads, chunks, **_: cut.append(chunks) or (-(-chunks // 2), 2, 1)
    )
    q, k, v, gate, refine = with_nan(make(130, (1, 1, 16, 16), "value", "plain"), name)
    h, (S, m) = regla_attention(q, k, v, gate, refine, output_final_state=True, backend="triton", validate=False)
    assert max(cut) > 1
    assert h[:, AT:].isnan().all() and S.isnan().all() and m.isnan().all()
