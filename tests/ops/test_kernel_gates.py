"""The refined gate as the kernels compute it from bfloat16 logits."""

import pytest
import torch

from regla.ops import log_refined_gate

triton = pytest.importorskip("triton", reason="the package triton is not installed")
import triton.language as tl  # noqa: E402

from regla.ops.triton.tiles import (  # noqa: E402
    LN2,
    log2_refined_to_21_bits,
    refined_gradient_to_21_bits,
)


@triton.jit
def gate_kernel(a_ptr, c_ptr, f_ptr, da_ptr, dc_ptr, size, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a, c = tl.load(a_ptr + i, mask=i < size), tl.load(c_ptr + i, mask=i < size)
    da, dc = refined_gradient_to_21_bits(a, c, tl.full([BLOCK], 1.0, tl.float32))
    tl.store(f_ptr + i, log2_refined_to_21_bits(a, c), mask=i < size)
    tl.store(da_ptr + i, da, mask=i < size)
    tl.store(dc_ptr + i, dc, mask=i < size)


def in_kernel(a, c):
    """log2 F and the gradients of log F for a and c, in float64."""
    out = [torch.empty_like(a) for _ in range(3)]
    gate_kernel[(triton.cdiv(a.numel(), 128),)](a, c, *out, a.numel(), BLOCK=128)
    return [x.double() for x in out]


def exact(a, c):
    a, c = a.double().requires_grad_(), c.double().requires_grad_()
    log_f = log_refined_gate(a, c)
    return log_f.detach() / LN2.value, *torch.autograd.grad(log_f.sum(), (a, c))


def grid(lowest):
    """Pairs of logits that bfloat16 has."""
    steps = torch.cat([torch.linspace(lowest, 30, 173), torch.linspace(-3, 3, 97), torch.tensor([0.0, 88.0, 1e30])])
    a, c = torch.cartesian_prod(steps, steps).bfloat16().float().unbind(-1)
    return a.contiguous(), c.contiguous()


def test_decays_and_gradients():
    a, c = grid(-28.0)
    (f, da, dc), (f2, da2, dc2) = in_kernel(a, c), exact(a, c)
    assert ((f - f2).abs() <= 2.0**-21 + 2.0**-20 * f2.abs()).all()
    for d, d2 in ((da, da2), (dc, dc2)):
        assert ((d - d2).abs() <= 1e-5 * d2 + 1e-12).all()


def test_closed_gates():
    a, c = grid(-1000.0)
    (f, da, dc), (f2, da2, dc2) = in_kernel(a, c), exact(a, c.clamp_min(-41 * LN2.value))
    alone = c > -12  # else both are closed, and how far below nothing F is does not matter
    assert ((f - f2).abs() <= 2.0**-21 + 2.0**-20 * f2.abs())[alone | (a > -12)].all()
    assert (f < 0.7 * f2 + 2)[~alone].all()
    for d, d2 in ((da, da2), (dc, dc2)):
        assert ((d - d2).abs() <= 1e-5 * d2 + 1e-12)[alone | (a > -12)].all()
        assert ((d >= 0) & (d <= 2)).all()


def test_an_open_gate_is_exactly_open():
    a, c = (torch.full([8], x) for x in (1e30, 0.0))
    f, da, dc = in_kernel(a, c)
    assert (f == 0).all() and (da == 0).all() and (dc == 0).all()
    assert (in_kernel(a * 1e30, c)[0] == 0).all()


def test_what_is_none_stays_none():
    nan, zero = (torch.full([8], x) for x in (float("nan"), 0.0))
    for a, c in ((nan, zero), (zero, nan)):
        assert all(x.isnan().all() for x in in_kernel(a, c)[:2])
    assert (in_kernel(-zero - float("inf"), zero)[0] == -float("inf")).all()
