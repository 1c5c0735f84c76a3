"""The engine that runs on a CPU: calls of the C kernels. See `regla.ops.fused` for the tensors."""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from regla.ops.checks import check_bounds
from regla.ops.fused import Inputs, gate_kind, rows
from regla.ops.native.build import load

#: Tokens from one state that is kept for the backward pass to the next.
CHUNK = 64

_KINDS = {"none": 0, "log": 1, "refined": 2}
_INT, _FLOAT, _POINTER = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


class _Rows(ctypes.Structure):
    """token.h: Rows."""

    _fields_ = (("at", _POINTER), ("step", _INT))


class _Problem(ctypes.Structure):
    """token.h: Problem, field by field."""

    _fields_ = (
        *((name, _INT) for name in ("sequences", "heads", "queries", "K", "V", "chunk", "threads")),
        *((name, _INT) for name in ("safe_exp", "decaying", "key_gate", "value_gate")),
        ("scale", _FLOAT),
        *((name, _POINTER) for name in ("bounds", "first_chunk", "mask")),
        *((name, _Rows) for name in ("q", "k", "v", "gk", "rk", "gv", "rv")),
        *((name, _POINTER) for name in ("initial_state", "before")),
        ("o", _Rows),
        *((name, _POINTER) for name in ("final_state", "last", "states", "chunk_m", "factor", "weight", "bias")),
        ("eps", _FLOAT),
        ("d_o", _Rows),
        ("d_final", _POINTER),
        *((name, _Rows) for name in ("d_q", "d_k", "d_v", "d_gk", "d_rk", "d_gv", "d_rv")),
        ("d_initial", _POINTER),
    )


_NAMES = ("q", "k", "v", "gk", "rk", "gv", "rv")


class _Call:
    """A problem, and the tensors that it points to."""

    def __init__(self, inputs: Inputs):
        q, k, v, gk, rk, gv, rv, mask, cu_seqlens, *_ = inputs
        B, T, H, K = k.shape
        self.held: list[Any] = []
        self.problem = _Problem(heads=H, queries=q.shape[2] // H, K=K, V=v.shape[-1], chunk=CHUNK)
        self.problem.threads = torch.get_num_threads()
        self.problem.key_gate, self.problem.value_gate = _KINDS[gate_kind(gk, rk)], _KINDS[gate_kind(gv, rv)]
        bounds = [n * T for n in range(B + 1)] if cu_seqlens is None else cu_seqlens.tolist()
        if cu_seqlens is not None:
            check_bounds(bounds, T)  # even unasked: the kernels would write anywhere
        chunks = [-((begin - end) // CHUNK) for begin, end in itertools.pairwise(bounds)]
        self.problem.sequences = len(chunks)
        for name, numbers in (("bounds", bounds), ("first_chunk", [0, *itertools.accumulate(chunks)])):
            array = (_INT * len(numbers))(*numbers)
            self.held.append(array)
            setattr(self.problem, name, ctypes.addressof(array))
        self.points(mask=mask)
        for name, x in zip(_NAMES, inputs[:7], strict=True):
            self.rows(name, None if x is None else rows(x.detach().float()))

    def points(self, **tensors: Tensor | None) -> None:
        """Fields that are the address of a tensor's first number."""
        for name, x in tensors.items():
            if x is not None:
                x = x.contiguous()
                self.held.append(x)
                setattr(self.problem, name, x.data_ptr())

    def rows(self, name: str, x: Tensor | None) -> None:
        """A field that is a tensor [B, T, heads, channels] as `regla.ops.fused.rows` leaves it."""
        if x is not None:
            self.held.append(x)
            setattr(self.problem, name, _Rows(x.data_ptr(), x.stride(1 if x.shape[1] > 1 else 0)))

    def run(self, function: str) -> None:
        library = load()
        assert isinstance(library, ctypes.CDLL), library
        if library[function](ctypes.byref(self.problem)):
            raise MemoryError("no memory for the buffers of the C kernels: close other programs, or use fewer threads")


def forward(
    inputs: Inputs,
    scale: float,
    safe_exp: bool,
    decaying: bool,
    keep: bool,
) -> tuple[Tensor, ...]:
    """(o, final state, last m, m before each chunk, the factor of every output, the state before each chunk)."""
    q, k, v, *_ = inputs
    filled = outputs(q, k, v, inputs.cu_seqlens, safe_exp, keep)
    o, final, last, m, factors, states = filled
    call = _Call(inputs)
    call.problem.scale, call.problem.safe_exp, call.problem.decaying = scale, safe_exp, decaying
    o_32 = o if o.dtype == torch.float32 else torch.empty_like(o, dtype=torch.float32)
    call.rows("o", o_32)
    call.points(initial_state=_float(inputs.initial_state), before=_float(inputs.before), final_state=final, last=last)
    if keep:
        call.points(states=states, chunk_m=m, factor=factors)
    call.run("regla_forward")
    if o_32 is not o:
        o.copy_(o_32)
    return filled


def outputs(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, safe_exp: bool, keep: bool
) -> tuple[Tensor, ...]:
    """The tensors that `forward` fills."""
    B, T, H, K = k.shape
    V, HQ = v.shape[-1], q.shape[2]
    N = B if cu_seqlens is None else cu_seqlens.numel() - 1
    chunks = B * ((T + CHUNK - 1) // CHUNK) if cu_seqlens is None else T // CHUNK + N  # with packing a bound
    widest = 16  # vectors of the kernels have at most that many numbers, and rows are padded to whole ones
    new = functools.partial(k.new_empty, dtype=torch.float32)
    return (
        v.new_empty(B, T, HQ, V),
        new(N, H, K, V),
        new(N, H),
        new(chunks if keep else 0, H),
        new(B, T if keep else 0, HQ),
        new(chunks if keep else 0, H, K, (V + widest - 1) // widest * widest),
    )


def backward(
    d_o: Tensor,
    d_final: Tensor | None,
    inputs: Inputs,
    m: Tensor,
    factors: Tensor,
    states: Tensor,
    scale: float,
    safe_exp: bool,
    decaying: bool,
    grads: Sequence[Tensor | None],
    d_initial: Tensor,
) -> None:
    """Fill the gradients of q, k, v, gk, rk, gv, rv and of the initial state."""
    call = _Call(inputs)
    call.problem.scale, call.problem.safe_exp, call.problem.decaying = scale, safe_exp, decaying
    call.rows("d_o", rows(d_o.float()))
    call.points(d_final=_float(d_final), states=states, chunk_m=m, factor=factors, d_initial=d_initial)
    written = [x if x is None or x.dtype == torch.float32 else x.new_empty(x.shape, dtype=torch.float32) for x in grads]
    for name, grad in zip(_NAMES, written, strict=True):
        call.rows(f"d_{name}", grad)
    call.run("regla_backward")
    for grad, value in zip(grads, written, strict=True):
        if grad is not None and value is not None and value is not grad:
            grad.copy_(value)


def step(
    inputs: Inputs,
    S: Tensor,
    m: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: float,
    decaying: bool,
    eps: float,
    o: Tensor,
) -> Tensor:
    """o, filled: one token of every sequence, S and m overwritten."""
    call = _Call(inputs)
    call.problem.scale, call.problem.safe_exp, call.problem.decaying = scale, True, decaying
    call.problem.eps = eps
    o_32 = o if o.dtype == torch.float32 else torch.empty_like(o, dtype=torch.float32)
    call.rows("o", o_32)
    call.points(initial_state=S, before=m, final_state=S, last=m, weight=_float(weight), bias=_float(bias))
    call.run("regla_forward")
    return o if o_32 is o else o.copy_(o_32)


def _float(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().float()
