"""Gates that forget quickly, and what outliers leave behind them, in the fused kernels: on a GPU, or through Triton's
interpreter on a CPU."""

import pytest
import torch

from regla.ops import regla_attention

from . import definition
from .test_causality import change
from .test_forms import AXES, normalised
from .test_triton import fused

pytestmark = [
    # the interpreter's, where infinities are meant, and a loop's bound is a tensor
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.usefixtures("operation"),
]


def logits_of(bits):
    """Gate logits of channels that decay by so many bits a token, with refine logits of 0."""
    decay = torch.exp2(-bits.double())
    return torch.log(decay / (1 - decay)).float()


@pytest.mark.parametrize("outlier", [18.0, 25.0])
def test_no_bit_of_the_past_changes_behind_an_outlier(outlier):
    """Of both axes, where the unit's growth at the outlier brings the limit of the key axis as near as its decay."""
    q, k, v = (torch.randn(1, 64, 1, 32) for _ in range(3))
    k[:, 40, :, 31] = outlier
    bits = torch.full((64,), 0.05)
    bits[4:32] = 3.2
    gate = logits_of(bits).expand(1, 64, 1, 64)
    inputs = [x.bfloat16() for x in (q, k, v, gate, torch.zeros(1, 64, 1, 64))]
    before, _ = fused(*inputs, gate_axis="both")
    for at in (60, 61, 62, 63):
        after, _ = fused(*change(inputs, at, "reset"), gate_axis="both")
        assert torch.equal(after[:, :at], before[:, :at]), f"token {at}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_outlier_after_one_that_is_forgotten(dtype):
    """Each output within 1 % (1e-3 in float32) where the unit falls by as much as it grows later in the chunk."""
    q, k, v = (torch.randn(1, 64, 1, 32) for _ in range(3))
    k[:, 31, :, 7] = k[:, 46, :, 5] = 80.0
    bits_k, bits_v = torch.full((64, 32), 0.05), torch.full((64, 32), 0.05)
    bits_k[32:47, 5], bits_k[47:, 5], bits_v[32:46] = 3.9, 7.0, 8.0
    gate = logits_of(torch.cat([bits_k, bits_v], -1))[None, :, None]
    inputs = [x.bfloat16() for x in (q, k, v, gate, torch.zeros_like(gate))]
    expected, _ = regla_attention(*[x.double() for x in inputs], gate_axis="both", backend="chunked")
    h, _ = regla_attention(*[x.to(dtype) for x in inputs], gate_axis="both", backend="triton")
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-3
    assert definition.per_token(normalised(h)[:, 1:], normalised(expected)[:, 1:]) <= tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("axis", AXES)
def test_gradients_of_outputs_of_zero(axis, dtype):
    """Within 1 % (1e-3 in float32) where gates forget fast and the first values, and so outputs, are nothing."""
    q, k, v = (torch.randn(1, 64, 1, 32) for _ in range(3))
    v[:, :6] = 0
    gate = logits_of(torch.linspace(0.05, 13.5, 32)).repeat(1, 64, 1, 1 + (axis == "both"))
    inputs = [x.bfloat16() for x in (q, k, v, gate, torch.zeros_like(gate))]
    d_h, results = torch.randn(1, 64, 1, 32), []
    for backend, to in (("chunked", torch.float64), ("triton", dtype)):
        leaves = [x.to(to).requires_grad_() for x in inputs]
        h, _ = regla_attention(*leaves, gate_axis=axis, backend=backend)
        results.append(torch.autograd.grad(h, leaves, d_h.bfloat16().to(to)))
    for expected, value in zip(*results, strict=True):
        assert definition.overall(value, expected) <= (1e-2 if dtype == torch.bfloat16 else 1e-3)


@pytest.mark.parametrize(
    ("dtype", "outlier", "at", "heads"),
    [
        (torch.float32, 80.0, 39, 1),
        (torch.float32, 86.0, 39, 2),
        (torch.bfloat16, 80.0, 63, 2),
        (torch.bfloat16, 80.0, 63, 1),
        (torch.bfloat16, 86.0, 39, 1),
    ],
)
@pytest.mark.parametrize("axis", AXES)
def test_large_gradients_of_what_is_forgotten(axis, dtype, outlier, at, heads):
    """Outputs and gradients within 1 % (1e-3 in float32) where gates forget an outlier of e^80 or e^86. Outputs behind
    it are tiny and their gradients large: times the state before it these are infinite, and times what it keeps of that
    nothing. And what is left of the outlier is for long more than all that follows."""
    device = torch.get_default_device()
    D = 128 if axis == "both" else 64
    with torch.device("cpu"):  # the same numbers everywhere
        q, k, v = torch.randn(2, 96, heads, 64), torch.randn(2, 96, 1, 64), torch.randn(2, 96, 1, 64)
        k[:, at, :, 5] = outlier
        gate, refine = torch.randn(2, 96, 1, D) + 2 * torch.randn(2, 1, 1, D) - 2, torch.randn(2, 96, 1, D)
        gate[..., 5], refine[..., 5] = -4.85, 0.0  # 7 bits a token, 56 from a chunk's start to an outlier at 39
        weights = torch.randn(2, 96, heads, 64).to(device)
    inputs = [x.bfloat16().to(device) for x in (q, k, v, gate, refine)]
    d_h, results = None, []
    for backend, to in (("chunked", torch.float64), ("triton", dtype)):
        leaves = [x.to(to).requires_grad_() for x in inputs]
        h, (S, _) = regla_attention(*leaves, gate_axis=axis, output_final_state=True, backend=backend)
        d_h = (weights / h.detach().abs().amax(-1, keepdim=True)).bfloat16() if d_h is None else d_h
        gradients = torch.autograd.grad([h, S], leaves, [d_h.to(to), torch.full_like(S, 2.0**-48)])
        results.append([normalised(h), *gradients])
    for expected, value in zip(*results, strict=True):
        assert definition.overall(value, expected.double()) <= (1e-2 if dtype == torch.bfloat16 else 1e-3)
