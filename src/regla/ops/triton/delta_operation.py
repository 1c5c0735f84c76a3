"""The gated delta rule on a GPU: launches of the kernels of `regla.ops.triton.delta`, forward and backward."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, library

from regla.ops.triton.delta import (
    gradient_kernel,
    output_kernel,
    prepare_kernel,
    state_gradient_kernel,
    state_kernel,
)

CHUNK = 32
_COLUMNS = 32  # of a state that a CTA of the kernels that walk a sequence keeps


def triton_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    gk: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`gated_delta_attention` by kernels; see there for the equation, shapes and dtypes. Returns (o, final_state).

    float32 or bfloat16 (all of q, k, v alike); products are of that dtype, accumulators, decays and states float32.
    """
    q, k = q.to(v.dtype), k.to(v.dtype)
    inputs = [x if x is None else x.contiguous() for x in (q, k, v, gk, beta)]
    state = None if initial_state is None else initial_state.float().contiguous()
    needed = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*inputs, state))
    o, final, *_ = _forward(*inputs, state, cu_seqlens, scale, needed)
    return o, final


class _Shape:
    """Sizes and the layout of chunks of a call."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, gk: Tensor | None, cu_seqlens: Tensor | None):
        self.B, self.T, self.H, self.K = k.shape
        self.V, self.G = v.shape[-1], q.shape[2] // k.shape[2]
        self.N = self.B if cu_seqlens is None else cu_seqlens.numel() - 1
        self.chunks = -(-self.T // CHUNK)
        self.slots = self.B * self.chunks
        self.starts = self.stops = self.firsts = None
        if cu_seqlens is not None:  # a bound on the sum of ceil(length / C), known without reading the lengths
            self.slots = (self.T + self.N * (CHUNK - 1)) // CHUNK
            ends = ((cu_seqlens.diff() + CHUNK - 1) // CHUNK).cumsum(0)
            slot = torch.arange(self.slots, device=k.device)
            sequence = torch.searchsorted(ends, slot, right=True).clamp_max(self.N - 1)
            firsts = torch.nn.functional.pad(ends, (1, 0))
            self.firsts = firsts.int()
            self.stops = cu_seqlens[sequence + 1].int()
            start = cu_seqlens[sequence] + (slot - firsts[sequence]) * CHUNK
            self.starts = torch.minimum(start, self.stops).int()  # slots behind the last chunk are empty
        self.gate = "none" if gk is None else "head" if gk.shape[-1] == 1 and self.K > 1 else "channel"
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        exact = "ieee" if interpreted else "tf32x3"
        low = v.dtype == torch.bfloat16
        self.common: dict[str, Any] = {
            "K": self.K,
            "V": self.V,
            "BK": max(16, _power_of_2(self.K)),
            "C": CHUNK,
            "VARLEN": cu_seqlens is not None,
            "PRECISION": "ieee" if low or interpreted else exact,
        }
        self.solve = {"SOLVE": "tf32" if low and not interpreted else exact}
        self.block_v = max(16, _power_of_2(self.V))
        self.columns = min(_COLUMNS, self.block_v)
        self.warps = 4 if max(self.K, self.V) <= 64 else 8
        self.lead = (self.slots, self.H)

    def walk(self) -> tuple[int, int]:
        return -(-self.V // self.columns), self.N * self.H


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _prepare(
    s: _Shape, q: Tensor, k: Tensor, v: Tensor, gk: Tensor | None, beta: Tensor, keep: bool
) -> dict[str, Tensor]:
    def new(*shape: int, dtype: torch.dtype = v.dtype) -> Tensor:
        return v.new_empty(*s.lead, *shape, dtype=dtype)

    x = {
        "W": new(CHUNK, s.K),
        "Y": new(CHUNK, s.V),
        "KF": new(CHUNK, s.K),
        "QE": new(s.G, CHUNK, s.K),
        "P": new(s.G, CHUNK, CHUNK),
        "total": new(s.common["BK"], dtype=torch.float32),
        "inverses": new(CHUNK, CHUNK, dtype=torch.float32),
    }
    prepare_kernel[(s.slots, s.H)](
        q, k, v, gk, beta, s.starts, s.stops, *x.values(), s.T, s.chunks, s.H,
        GATE=s.gate, G=s.G, BV=s.block_v, KEEP=keep, **s.common, **s.solve, num_warps=s.warps,
    )  # fmt: skip
    return x


@library.custom_op(
    "regla::triton_delta_forward",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? gk, Tensor beta, Tensor? initial_state, Tensor? cu_seqlens, "
    "float scale, bool keep) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gk: Tensor | None,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(o, final state, and if `keep` for the backward pass: U and the state before each chunk)."""
    s = _Shape(q, k, v, gk, cu_seqlens)
    x = _prepare(s, q, k, v, gk, beta, keep=False)
    o = v.new_empty(s.B, s.T, s.H * s.G, s.V)
    final = v.new_empty(s.N, s.H, s.K, s.V, dtype=torch.float32)
    states = v.new_empty(*s.lead, s.K, s.V)
    state_kernel[s.walk()](
        x["W"], x["Y"], x["KF"], x["total"], initial_state, states, final, s.firsts, s.chunks, s.H,
        GATE=s.gate, BV=s.columns, INITIAL=initial_state is not None, **s.common, num_warps=4,
    )  # fmt: skip
    output_kernel[(s.slots, s.H * s.G)](
        x["QE"], x["P"], x["Y"], states, s.starts, s.stops, o, scale, s.T, s.chunks, s.H,
        G=s.G, BV=s.block_v, **s.common, num_warps=s.warps,
    )  # fmt: skip
    empty = v.new_empty(0)
    return o, final, x["Y"] if keep else empty, states if keep else v.new_empty(0)


@_forward.register_fake
def _(q, k, v, gk, beta, initial_state, cu_seqlens, scale, keep):  # type: ignore[no-untyped-def]
    B, T, H, K = k.shape
    V, N = v.shape[-1], B if cu_seqlens is None else cu_seqlens.numel() - 1
    slots = B * -(-T // CHUNK) if cu_seqlens is None else (T + N * (CHUNK - 1)) // CHUNK
    return (
        v.new_empty(B, T, q.shape[2], V),
        v.new_empty(N, H, K, V, dtype=torch.float32),
        v.new_empty(*((slots, H, CHUNK, V) if keep else (0,))),
        v.new_empty(*((slots, H, K, V) if keep else (0,))),
    )


@library.custom_op(
    "regla::triton_delta_backward",
    mutates_args=(),
    schema="(Tensor d_o, Tensor? d_final, Tensor q, Tensor k, Tensor v, Tensor? gk, Tensor beta, Tensor? cu_seqlens, "
    "Tensor U, Tensor states, float scale) -> Tensor[]",
)
def _backward(
    d_o: Tensor,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gk: Tensor | None,
    beta: Tensor,
    cu_seqlens: Tensor | None,
    U: Tensor,
    states: Tensor,
    scale: float,
) -> list[Tensor]:
    """Gradients of q, k, v, beta, the initial state and, where there is one, gk."""
    s = _Shape(q, k, v, gk, cu_seqlens)
    x = _prepare(s, q, k, v, gk, beta, keep=True)
    d_o = d_o.contiguous()
    d_final = None if d_final is None else d_final.float().contiguous()
    d_U, d_states = torch.empty_like(U), torch.empty_like(states)
    d_initial = v.new_empty(s.N, s.H, s.K, s.V, dtype=torch.float32)
    state_gradient_kernel[s.walk()](
        x["W"], x["KF"], x["QE"], x["P"], x["total"], d_o, d_final, s.starts, s.stops, s.firsts,
        d_U, d_states, d_initial, scale, s.T, s.chunks, s.H,
        GATE=s.gate, G=s.G, BV=s.columns, FINAL=d_final is not None, **s.common, num_warps=4,
    )  # fmt: skip
    grads = [torch.empty_like(y) for y in (q, k, v, beta)]
    d_g = None if gk is None else torch.empty_like(gk)
    gradient_kernel[(s.slots, s.H)](
        q, k, v, gk, beta, s.starts, s.stops, x["inverses"], U, states, d_U, d_states, d_o,
        *grads[:3], d_g, grads[3], scale, s.T, s.chunks, s.H,
        GATE=s.gate, G=s.G, BV=s.block_v, **s.common, **s.solve, num_warps=s.warps,
    )  # fmt: skip
    return [*grads, d_initial] + ([] if d_g is None else [d_g])


@_backward.register_fake
def _(d_o, d_final, q, k, v, gk, beta, cu_seqlens, U, states, scale):  # type: ignore[no-untyped-def]
    N = k.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    grads = [torch.empty_like(x) for x in (q, k, v, beta)]
    grads.append(v.new_empty(N, *k.shape[2:], v.shape[-1], dtype=torch.float32))
    return grads + ([] if gk is None else [torch.empty_like(gk)])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, gk, beta, initial, cu_seqlens, ctx.scale, _ = inputs
    ctx.has_initial = initial is not None
    ctx.save_for_backward(q, k, v, gk, beta, cu_seqlens, *output[2:])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, d_o: Tensor | None, d_final: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    q, k, v, gk, beta, cu_seqlens, U, states = ctx.saved_tensors
    if d_o is None:
        d_o = v.new_zeros(*q.shape[:3], v.shape[-1])
    d_q, d_k, d_v, d_beta, d_initial, *rest = _backward(
        d_o, d_final, q, k, v, gk, beta, cu_seqlens, U, states, ctx.scale
    )
    return d_q, d_k, d_v, rest[0] if rest else None, d_beta, d_initial if ctx.has_initial else None, *(None,) * 3


_forward.register_autograd(_gradients, setup_context=_save)
