"""The gated delta rule on a GPU: launches of the kernels of `regla.ops.triton.delta`, as differentiable operations.

Inputs come in buffers, and gradients leave in buffers like them, as in `regla.ops.fused`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, library

from regla.ops.call import Call, Forms, HeadNorm, QKNorm
from regla.ops.fused import gate_kind, in_buffers, unpack, with_dense_channels
from regla.ops.triton.decode import num_warps
from regla.ops.triton.delta import (
    delta_gradient_kernel,
    delta_output_kernel,
    delta_prepare_kernel,
    delta_state_gradient_kernel,
    delta_state_kernel,
)
from regla.ops.triton.delta_decode import delta_decode_kernel
from regla.ops.triton.launch import cdiv, launch, power_of_2, token_step
from regla.ops.triton.operation import norm_gradient

_COLUMNS = 32  # of a state that a CTA of the kernels that walk a sequence keeps
#: Channels of keys that a CTA of the kernel of gradients takes, and of values that it sums over at once.
_SLICE, _VALUES = 64, 64

_INPUTS = (
    "Tensor[] buffers, SymInt[] layout, Tensor beta, Tensor? head_decay, Tensor? mask, Tensor? cu_seqlens, "
    "Tensor? initial_state, Tensor[]? weights, "
)
_OPTIONS = "float eps, float scale, float limit, str features"


def triton_gated_delta_rule(call: Call, forms: Forms) -> tuple[Tensor, Tensor]:
    """`regla.ops.delta.attend_delta` by kernels.

    float32 or bfloat16 (all of q, k, v alike); products are of that dtype, accumulators, decays and states float32.
    """
    gk, rk, _, _, beta, _ = call.gates
    assert beta is not None
    head_decay = None
    if gk is not None and gk.shape[-1] == 1 and call.k.shape[-1] > 1:  # one number a head is not spread over channels
        head_decay = call.gates.logarithms()[0].squeeze(-1).contiguous()  # type: ignore[union-attr]
        gk = rk = None
    dtype = call.v.dtype
    call = call._replace(q=call.q.to(dtype), k=call.k.to(dtype), gates=call.gates._replace(gk=gk, rk=rk, write=None))
    buffers, layout = in_buffers(call)
    norm = call.qk_norm
    weights = None if norm is None else [norm.q.contiguous(), norm.k.contiguous()]
    state = None if call.S is None else call.S.float().contiguous()
    tensors = [*buffers, beta, *(weights or ()), *(x for x in (head_decay, state) if x is not None)]
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    mask, cu_seqlens = (None if x is None else x.contiguous() for x in (call.mask, call.cu_seqlens))
    o, final, *_ = _forward(
        buffers, layout, beta.contiguous(), head_decay, mask, cu_seqlens, state, weights,
        0.0 if norm is None else norm.eps, call.scale, forms.beta_max, forms.features, keep,
    )  # fmt: skip
    return o, final


class _Inputs(NamedTuple):
    """What the operations get, in the order of their arguments."""

    q: Tensor
    k: Tensor
    v: Tensor
    gk: Tensor | None
    rk: Tensor | None
    beta: Tensor
    head_decay: Tensor | None
    mask: Tensor | None
    cu_seqlens: Tensor | None
    initial_state: Tensor | None
    norm: QKNorm | None
    scale: float
    limit: float
    features: str


def _inputs(buffers: Sequence[Tensor], layout: Sequence[int], *others: Any) -> _Inputs:
    *tensors, weights, eps, scale, limit, features = others
    norm = QKNorm(weights[0], weights[1], eps) if weights else None
    q, k, v, gk, rk, _, _ = unpack(buffers, layout)
    return _Inputs(q, k, v, gk, rk, *tensors, norm, scale, limit, features)  # type: ignore[arg-type,call-arg]


class _Plan:
    """Sizes, the layout of chunks and the constants of the kernels of a call."""

    def __init__(self, x: _Inputs):
        (self.B, self.T, self.H, self.K), self.V, self.G = x.k.shape, x.v.shape[-1], x.q.shape[2] // x.k.shape[2]
        self.N = self.B if x.cu_seqlens is None else x.cu_seqlens.numel() - 1
        self.C = C = _chunk(x.v.dtype, self.K, self.V)
        self.chunks = cdiv(self.T, C)
        self.slots = _slots(self.B, self.T, C, None if x.cu_seqlens is None else self.N)
        self.starts = self.stops = self.firsts = None
        if x.cu_seqlens is not None:
            ends = ((x.cu_seqlens.diff() + C - 1) // C).cumsum(0)
            slot = torch.arange(self.slots, device=x.k.device)
            sequence = torch.searchsorted(ends, slot, right=True).clamp_max(self.N - 1)
            firsts = torch.nn.functional.pad(ends, (1, 0))
            self.firsts = firsts.int()
            self.stops = x.cu_seqlens[sequence + 1].int()
            start = x.cu_seqlens[sequence] + (slot - firsts[sequence]) * C
            self.starts = torch.minimum(start, self.stops).int()  # slots behind the last chunk are empty
        exact = x.v.dtype == torch.float32
        self.BK, self.BV = max(16, power_of_2(self.K)), max(16, power_of_2(self.V))
        self.columns = min(_COLUMNS, self.BV)
        gate = "log" if x.head_decay is not None else gate_kind(x.gk, x.rk)
        self.every: dict[str, Any] = {
            "K": self.K,
            "V": self.V,
            "BK": self.BK,
            "C": C,
            "VARLEN": x.cu_seqlens is not None,
            "PRECISION": "tf32x3" if exact else "tf32",
        }
        self.walking = self.every | {"GATE": gate, "BV": self.columns}
        self.chunked = self.every | {
            "GATE": gate,
            "PER_HEAD": x.head_decay is not None,
            "FEATURES": x.features,
            "NORM": x.norm is not None,
            "LOGITS": x.limit != 0,
            "MASKED": x.mask is not None,
            "G": self.G,
            "BV": self.BV,
            "EXACT": exact,
        }
        #: The values of DEEP with which kernels that meet decays are launched, one after the other.
        self.passes = (False,) if gate == "none" else (False, True)
        self.warps = 8 if exact and max(self.K, self.V) > 64 else 4

    def walk(self) -> tuple[int, int, int]:
        return cdiv(self.V, self.columns), self.N * self.H, 1


def _chunk(dtype: torch.dtype, K: int, V: int) -> int:
    """Tokens of a chunk: fewer where wide float32 tiles would not fit in registers."""
    return 16 if dtype == torch.float32 and max(K, V) > 64 else 32


def _slots(B: int, T: int, C: int, sequences: int | None) -> int:
    """Places for chunks; of packed sequences a bound on the sum of ceil(length / C), known without the lengths."""
    return B * cdiv(T, C) if sequences is None else (T + sequences * (C - 1)) // C


def _prepare(x: _Inputs, s: _Plan, keep: bool) -> dict[str, Tensor]:
    def new(*shape: int, dtype: torch.dtype = x.v.dtype) -> Tensor:
        return x.v.new_empty(s.slots, s.H, *shape, dtype=dtype)

    made = {
        "KE_solved": new(s.C, s.K),
        "U": new(s.C, s.V),
        "WF": new(s.C, s.K),
        "QE": new(s.G, s.C, s.K),
        "P": new(s.G, s.C, s.C),
        "total": new(s.BK, dtype=torch.float32),
        "is_deep": new(dtype=torch.int32),
        "inverses": new(*((s.C, s.C) if keep else (0,))),
    }
    gate, steps = _gate(x)
    for deep in s.passes:
        launch(
            delta_prepare_kernel, (s.slots, s.H, 1),
            (x.q, x.k, x.v, *gate, x.beta, x.mask, *_weights(x.norm), s.starts, s.stops, *made.values()),
            (x.scale, _eps(x.norm), x.limit, s.T, s.chunks, s.H, *map(token_step, (x.q, x.k, x.v)), *steps),
            **s.chunked, KEEP=keep, DEEP=deep, num_warps=s.warps,
        )  # fmt: skip
    return made


def _gate(x: _Inputs) -> tuple[tuple[Tensor | None, Tensor | None], tuple[int, int]]:
    """(gate, refine) and the steps from token to token."""
    if x.head_decay is not None:
        return (x.head_decay, None), (x.head_decay.shape[2], 0)
    return (x.gk, x.rk), (token_step(x.gk), token_step(x.rk))


def _weights(norm: QKNorm | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if norm is None else (norm.q, norm.k)


def _eps(norm: QKNorm | None) -> float:
    return 0.0 if norm is None else norm.eps


@library.custom_op(
    "regla::delta_forward",
    mutates_args=(),
    schema=f"({_INPUTS}{_OPTIONS}, bool keep) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(o, final state, and if `keep` for the backward pass: U and the state before each chunk)."""
    *inputs, keep = arguments
    x = _inputs(*inputs)
    s = _Plan(x)
    made = _prepare(x, s, keep=False)
    U, v = made["U"], x.v
    o = v.new_empty(s.B, s.T, s.H * s.G, s.V)
    final = v.new_empty(s.N, s.H, s.K, s.V, dtype=torch.float32)
    states = v.new_empty(s.slots, s.H, s.K, s.V)
    launch(
        delta_state_kernel, s.walk(),
        (made["KE_solved"], U, made["WF"], made["total"], x.initial_state, states, final, s.firsts), (s.chunks, s.H),
        **s.walking, INITIAL=x.initial_state is not None, num_warps=4,
    )  # fmt: skip
    launch(
        delta_output_kernel, (s.slots, s.H * s.G, 1),
        (made["QE"], made["P"], U, states, s.starts, s.stops, o), (s.T, s.chunks, s.H),
        **s.every, G=s.G, BV=s.BV, num_warps=s.warps,
    )  # fmt: skip
    return o, final, U if keep else v.new_empty(0), states if keep else v.new_empty(0)


@_forward.register_fake
def _(buffers, layout, beta, head_decay, mask, cu_seqlens, S, weights, eps, scale, limit, features, keep):  # type: ignore[no-untyped-def]
    HQ, H, K, V, *_ = layout
    v, (B, T) = buffers[0], beta.shape[:2]
    N = None if cu_seqlens is None else cu_seqlens.numel() - 1
    C = _chunk(v.dtype, K, V)
    slots = _slots(B, T, C, N)
    return (
        v.new_empty(B, T, HQ, V),
        v.new_empty(B if N is None else N, H, K, V, dtype=torch.float32),
        v.new_empty(*((slots, H, C, V) if keep else (0,))),
        v.new_empty(*((slots, H, K, V) if keep else (0,))),
    )


@library.custom_op(
    "regla::delta_backward",
    mutates_args=(),
    schema=f"(Tensor d_o, Tensor? d_final, Tensor o, Tensor U, Tensor states, {_INPUTS}{_OPTIONS}) -> Tensor[]",
)
def _backward(*arguments: Any) -> list[Tensor]:
    """Gradients of the buffers, of beta, and, in float32, of the initial state; then, where there are such, in float32
    of the norm's weights [2, K], and of the decays a head."""
    d_o, d_final, o, U, states, *inputs = arguments
    x = _inputs(*inputs)
    s = _Plan(x)
    buffers, layout = inputs[:2]
    grads = _gradients_like(*inputs[:9])
    d_beta, d_initial, *rest = grads[len(buffers) :]
    d_q, d_k, d_v, *d_gates = unpack(grads, layout)
    assert d_q is not None and d_k is not None
    d_weights = rest.pop(0) if x.norm is not None else None
    d_head = rest[0] if x.head_decay is not None else None
    d_o = d_o.contiguous()
    d_final = None if d_final is None else d_final.float().contiguous()
    made = _prepare(x, s, keep=True)
    d_U, d_states = torch.empty_like(U), torch.empty_like(states)
    launch(
        delta_state_gradient_kernel, s.walk(),
        (made["KE_solved"], made["WF"], made["QE"], made["P"], made["total"], d_o, d_final, s.starts, s.stops, s.firsts,
         d_U, d_states, d_initial), (s.T, s.chunks, s.H),
        **s.walking, G=s.G, FINAL=d_final is not None, num_warps=4,
    )  # fmt: skip
    gate, steps = _gate(x)
    BS = min(_SLICE, s.BK)
    slices = s.BK // BS
    # What every slice has a part of.
    d_beta_parts = d_beta.new_empty(slices, *d_beta.shape, dtype=torch.float32)
    d_head_parts = torch.empty_like(d_beta_parts) if d_head is not None else None
    for deep in s.passes:
        launch(
            delta_gradient_kernel, (s.slots, s.H, slices),
            (x.q, x.k, x.v, *gate, x.beta, x.mask, *_weights(x.norm), s.starts, s.stops,
             made["is_deep"], made["inverses"], U, states, d_U, d_states, o, d_o,
             d_q, d_k, d_v, *(d_gates[:2] if d_head_parts is None else (d_head_parts, None)), d_beta_parts),
            (x.scale, _eps(x.norm), x.limit, s.T, s.chunks, s.H, d_beta.numel(), *map(token_step, (x.q, x.k, x.v)),
             *steps, *map(token_step, (d_q, d_k, d_v, *d_gates[:2]))),
            **s.chunked, BS=BS, BW=min(_VALUES, s.BV), DEEP=deep, num_warps=s.warps,
        )  # fmt: skip
    d_beta.copy_(d_beta_parts.sum(0))
    if d_head_parts is not None and d_head is not None:
        d_head.copy_(d_head_parts.sum(0))
    if x.norm is not None:
        assert d_weights is not None
        norm_gradient(x.q, x.k, x.norm, x.mask, d_q, d_k, d_weights)
    return grads


@_backward.register_fake
def _(d_o, d_final, o, U, states, *inputs):  # type: ignore[no-untyped-def]
    return _gradients_like(*inputs[:9])


def _gradients_like(
    buffers: Sequence[Tensor],
    layout: Sequence[int],
    beta: Tensor,
    head_decay: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    weights: Sequence[Tensor] | None,
    eps: float,
) -> list[Tensor]:
    _HQ, H, K, V, *_ = layout
    N = beta.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    shapes = [(N, H, K, V), (2, K)][: 2 if weights else 1]
    like = [*buffers, beta]
    grads = [x.new_empty(x.shape) for x in like] + [beta.new_empty(shape, dtype=torch.float32) for shape in shapes]
    return grads if head_decay is None else [*grads, torch.empty_like(head_decay)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    buffers, layout, *tensors, weights, eps, scale, limit, features, _ = inputs
    ctx.layout, ctx.buffers, ctx.options = layout, len(buffers), (eps, scale, limit, features)
    ctx.save_for_backward(*buffers, *(weights or ()), *tensors, output[0], *output[2:])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, d_o: Tensor | None, d_final: Tensor | None, *_: Any) -> tuple[Any, ...]:
    *of_lists, beta, head_decay, mask, cu_seqlens, initial_state, o, U, states = ctx.saved_tensors
    buffers, weights = of_lists[: ctx.buffers], of_lists[ctx.buffers :] or None
    if d_o is None:
        HQ, _H, _K, V, *_ = ctx.layout
        d_o = U.new_zeros(*beta.shape[:2], HQ, V)
    inputs = buffers, ctx.layout, beta, head_decay, mask, cu_seqlens, initial_state, weights
    grads = _backward(d_o, d_final, o, U, states, *inputs, *ctx.options)
    d_buffers, (d_beta, d_initial, *rest) = grads[: ctx.buffers], grads[ctx.buffers :]
    d_weights = None
    if weights is not None:
        d_weights = [d.to(w.dtype) for d, w in zip(rest.pop(0), weights, strict=True)]
    d_head = None if head_decay is None else rest[0]
    d_initial = None if initial_state is None else d_initial
    return d_buffers, None, d_beta, d_head, None, None, d_initial, d_weights, *(None,) * 5


_forward.register_autograd(_gradients, setup_context=_save)


def triton_delta_step_(call: Call, forms: Forms, S: Tensor, norm: HeadNorm | None) -> Tensor:
    """A call of one token that needs no gradient: o [N, 1, HQ, V], with `norm` the normalised outputs. S [N, H, K, V],
    float32 and contiguous, is overwritten."""
    # A custom operation's own work would take longer than the kernel's.
    step = _step_operation if torch.compiler.is_compiling() else _step
    gk, rk, _, _, beta, _ = call.gates
    assert beta is not None
    q_weight, k_weight, qk_eps = (None, None, 0.0) if call.qk_norm is None else call.qk_norm
    weight, bias, eps = (None, None, 0.0) if norm is None else norm
    return step(
        call.q, call.k, call.v, gk, rk, beta, call.mask, S, q_weight, k_weight, weight, bias, qk_eps, eps, call.scale,
        forms.beta_max, forms.features,
    )  # fmt: skip


def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gk: Tensor | None,
    rk: Tensor | None,
    beta: Tensor,
    mask: Tensor | None,
    S: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    qk_eps: float,
    eps: float,
    scale: float,
    limit: float,
    features: str,
) -> Tensor:
    (N, _, H, K), V, HQ = k.shape, v.shape[-1], q.shape[2]
    o = v.new_empty(N, 1, HQ, V)
    tensors = [None if x is None else with_dense_channels(x) for x in (q, k, v, gk, rk)]
    weights = [None if x is None else x.contiguous() for x in (q_weight, k_weight, weight, bias)]
    given = [*tensors, beta]
    rows, heads = ([0 if x is None else x.stride(axis) for x in given] for axis in (0, 2))
    BK, BV = max(16, power_of_2(K)), max(16, power_of_2(V))
    launch(
        delta_decode_kernel, (N * H, 1, 1), (*given, mask, *weights[:2], S, *weights[2:], o),
        (scale, qk_eps, limit, eps, H, *rows, 0 if mask is None else mask.stride(0), *heads),
        G=HQ // H, K=K, V=V, BK=BK, BV=BV, GATE=gate_kind(gk, rk), STEP=int(gk is not None and gk.shape[-1] > 1),
        FEATURES=features, QK_NORM=q_weight is not None, LOGITS=limit != 0, MASKED=mask is not None,
        NORM="none" if weight is None else "rmsnorm" if bias is None else "layernorm", num_warps=num_warps(BK, BV),
    )  # fmt: skip
    return o


_step_operation = library.custom_op("regla::delta_step", _step, mutates_args=("S",))


@_step_operation.register_fake
def _(q, k, v, gk, rk, beta, mask, S, *_):  # type: ignore[no-untyped-def]
    return v.new_empty(v.shape[0], 1, q.shape[2], v.shape[-1])
