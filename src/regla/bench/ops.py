"""Time and memory of the operations against their peers, and against what no version can go below.

The floor is the time in which the memory, at the rate of a plain copy measured in the same run, moves

    forward             every input read once, the output written once
    forward+backward    that, and every input and the output's gradient read once more, every input's gradient written

    step                every input and the state read once, the output and the state written once

so at B8 T2048 H12 K=V=64 in bfloat16, from raw logits (q, k, v, gate, refine), 6 and 17 tensors of 25 MB.

Everything is computed from the same standard normal tensors: `regla_attention` from raw logits; gated_linear_attention
and fla's `chunk_gla` from features and log-decays made of them beforehand; softmax attention from q, k and v.
`regla_step` is one token behind a state: with the kernel in place, with the recurrence to a new state;
`regla_delta_step` is that of the delta rule.
`output_norm` is the RMS norm over a head's output with a SiLU gate on it: the formula, that compiled, and its kernel.
`short_convolution` is that of 4 taps over the channels of q, k and v together with a SiLU behind it: likewise.
`regla_attention_fast_gates` is `regla_attention` with gate logits of mean -2 that differ by 2 from channel to channel
and by 1 from token to token: some channels keep for tens of tokens, most hardly for one.
`gated_delta_attention` and fla's `chunk_kda` are the delta rule from features of unit length and log-decays made
beforehand, `regla_delta_attention` from raw logits, with gates as a model starts with: the half-lives of a head's
channels are log-spaced from 1 to 256 tokens.

Shape legend: B batch, T tokens, H heads, K and V channels of keys and values.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from regla.bench.measure import (
    Case,
    Row,
    copy_rate,
    dtype_name,
    floor_columns,
    normal,
    peak_extra_bytes,
    seconds_of,
    time_call,
)
from regla.layers.gates import half_life_logit
from regla.ops import (
    gated_delta_attention,
    gated_linear_attention,
    regla_delta_attention,
    safe_exp_attention,
)
from regla.ops.attention import safe_exp_step_
from regla.ops.call import Call, Forms, Gates
from regla.ops.delta import attend_delta
from regla.ops.dispatch import why_not_native, why_not_triton
from regla.ops.features import safe_exp_query, unit_safe_exp
from regla.ops.gates import log_refined_gate
from regla.ops.output_norm import output_norm
from regla.ops.short_convolution import short_convolution

BENCHMARK = "bench ops"
DIRECTIONS = ("forward", "forward+backward")
STEP = "step"
NORM = "output_norm"
CONVOLUTION = "short_convolution"
PARTS = (NORM, CONVOLUTION)
FAST_GATES = "regla_attention_fast_gates"
DELTAS = ("regla_delta_attention", "gated_delta_attention")
DELTA_PEER = "chunk_kda"
DELTA_STEP = "regla_delta_step"
_GATES = {  # of an axis: arguments of safe_exp_attention
    "both": ("gk", "gv", "refine_k", "refine_v"),
    "value": ("gv", "refine_v"),
    "key": ("gk", "refine_k"),
}
AXES = tuple(_GATES)
_BACKENDS = ("triton", "native", "chunked")
_PART_BACKENDS = ("eager", "compiled", "triton")
_STEP_BACKENDS = ("recurrent", "native", "triton")
_TAPS = 4
_TOO_LONG = 2.0  # seconds of one call, above which a backend gets no row

Operation = Callable[..., Tensor]


class Shape(NamedTuple):
    B: int
    T: int
    H: int
    K: int
    V: int

    def __str__(self) -> str:
        return f"B{self.B}-T{self.T}-H{self.H}-{self.K}x{self.V}"


SHAPES = (Shape(8, 2048, 12, 64, 64), Shape(4, 4096, 16, 128, 128), Shape(1, 32768, 16, 128, 128))
LENGTHS = tuple(Shape(32768 // T, T, 12, 64, 64) for T in (512, 1024, 2048, 4096, 8192, 16384, 32768))
STEPS = (Shape(64, 1, 12, 64, 64), Shape(512, 1, 12, 64, 64), Shape(64, 1, 16, 128, 128))
_QUICK = (Shape(2, 64, 2, 16, 16), Shape(1, 128, 2, 16, 16))
_QUICK_STEPS = (Shape(2, 1, 2, 16, 16),)


def cases(device: torch.device, dtype: torch.dtype, *, quick: bool = False) -> list[Case]:
    """Every shape with every operation, axis, backend and direction; what is compared with comes first."""
    many, one, few = (_QUICK, _QUICK_STEPS, _QUICK[:1]) if quick else (SHAPES + LENGTHS, STEPS, SHAPES)
    seconds = 0.02 if quick else 0.2  # to spend on each case
    rate = _Rate(device, quick)
    every = [(shape, direction, *subject) for shape in many for direction in DIRECTIONS for subject in _subjects()]
    every += [
        (shape, STEP, "regla_step", axis, backend) for shape in one for axis in AXES for backend in _STEP_BACKENDS
    ]
    every += [(shape, STEP, DELTA_STEP, "key", backend) for shape in one for backend in _STEP_BACKENDS]
    every += [(shape, STEP, CONVOLUTION, "none", backend) for shape in one for backend in _PART_BACKENDS]
    every += [
        (shape, direction, part, "none", backend)
        for part in PARTS
        for shape in few
        for direction in DIRECTIONS
        for backend in _PART_BACKENDS
    ]
    found = []
    for shape, direction, operation, axis, backend in every:
        name = f"{operation}/{axis}/{backend}/{shape}/{direction}"
        measure = partial(_measure, operation, axis, backend, shape, direction, device, dtype, rate, seconds)
        found.append(Case(name, measure))
    return found


def _subjects() -> Iterator[tuple[str, str, str]]:
    """(operation, axis, backend) of many tokens at once."""
    yield "softmax_attention", "none", "sdpa"
    yield "chunk_gla", "key", "fla"
    for operation in ("regla_attention", "gated_linear_attention"):
        for axis in AXES:
            for backend in _BACKENDS:
                yield operation, axis, backend
    for axis in AXES:
        yield FAST_GATES, axis, "triton"
    yield DELTA_PEER, "key", "fla"
    for operation in DELTAS:
        for backend in _BACKENDS:
            yield operation, "key", backend


class _Rate:
    """Bytes per second of a copy, measured when first asked for."""

    def __init__(self, device: torch.device, quick: bool) -> None:
        self._device, self._quick = device, quick
        self._rate: float | None = None

    def __call__(self) -> float:
        if self._rate is None:
            self._rate = copy_rate(self._device, quick=self._quick)
        return self._rate


def _measure(
    operation: str,
    axis: str,
    backend: str,
    shape: Shape,
    direction: str,
    device: torch.device,
    dtype: torch.dtype,
    rate: _Rate,
    seconds: float,
) -> Iterator[Row | str]:
    name = f"{operation}/{axis}/{backend}/{shape}/{direction}"
    row: Row = {
        "benchmark": BENCHMARK,
        "subject": "/".join((operation, axis, backend)),
        # A part is compared with itself alone.
        "setting": {
            **shape._asdict(),
            "direction": direction,
            "dtype": dtype_name(dtype),
            **({"part": operation} if operation in PARTS else {}),
        },
        "operation": operation,
        "axis": axis,
        "backend": backend,
    }
    try:
        copied = rate()
        logits = _logits(shape, axis, device, dtype)
        reason = _why_not(backend, logits["k"], logits["v"])
        if reason is not None:
            yield f"{operation}/{axis}/{backend}: no rows, {reason}"
            return
        function, inputs = _operation(operation, axis, backend, logits)
        del logits
        call = _call(function, inputs, direction)
        call()  # compiles
        taken = seconds_of(call, device)
        if taken > _TOO_LONG:
            yield f"{name}: no row, one call takes {taken:.1f} s"
            return
        extra = peak_extra_bytes(call, device)
        timing = time_call(call, device, seconds=seconds)
        moved = _floor_bytes(inputs, call()[0], direction, states=1 if operation in (DELTA_STEP, CONVOLUTION) else 2)
    except torch.OutOfMemoryError:
        yield row | {"out_of_memory": True}
        return
    except Exception as error:
        if backend != "fla":  # a peer that fails must not cost the other rows
            raise
        yield f"{name}: no row, {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        return
    yield row | timing.as_row() | floor_columns(moved, copied, timing.p50_us) | {"peak_extra_bytes": extra}


def _logits(shape: Shape, axis: str, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Standard normal q, k, v and the logits of the gates, [B, T, H, K or V]."""
    B, T, H, K, V = shape
    widths = {"q": K, "k": K, "v": V} | {name: K if name.endswith("k") else V for name in _GATES.get(axis, ())}
    return {
        name: normal(B, T, H, D, seed=seed, device=device, dtype=dtype) for seed, (name, D) in enumerate(widths.items())
    }


def _why_not(backend: str, k: Tensor, v: Tensor) -> str | None:
    """Why `backend` cannot run on these tensors; None if it can."""
    if backend == "triton":
        return why_not_triton(k, v)
    if backend == "native":
        return why_not_native(k, v)
    if backend == "compiled" and not k.is_cuda:
        return "its compilation takes longer than everything else on a CPU"
    if backend == "fla":
        if importlib.util.find_spec("fla") is None:
            return "the package fla is not installed"
        if not k.is_cuda:
            return "fla needs a GPU"
    return None


def _operation(
    operation: str, axis: str, backend: str, logits: dict[str, Tensor]
) -> tuple[Operation, Sequence[Tensor]]:
    """(function of the inputs, the inputs)."""
    q, k, v, *gates = logits.values()
    half = len(gates) // 2
    if operation == FAST_GATES:
        gates[:half] = [
            gate + 2 * normal(*gate.shape[2:], seed=8, device=gate.device, dtype=gate.dtype) - 2
            for gate in gates[:half]
        ]
        operation = "regla_attention"
    if operation == "softmax_attention":
        return _softmax_attention, [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    if operation in PARTS:
        function, inputs = _part(operation, backend, q, v)
        if backend == "compiled":
            torch.compiler.reset()  # else a second shape makes the compiler give up fixed shapes, and a ninth all
        return torch.compile(function) if backend == "compiled" else function, inputs
    if operation == "regla_attention":
        return partial(_regla, axis=axis, backend=backend), [q, k, v, *gates]
    if operation == "regla_step":
        (B, _, H, K), V = k.shape, v.shape[-1]
        state = normal(B, H, K, V, seed=9, device=v.device), torch.zeros(B, H, device=v.device)
        step = _step if backend == "recurrent" else _step_in_place
        return partial(step, axis=axis, backend=backend), [q, k, v, *gates, *state]
    if operation in (*DELTAS, DELTA_PEER, DELTA_STEP):
        return _delta(operation, backend, logits)
    features = safe_exp_query(q).to(v.dtype), safe_exp_query(k).to(v.dtype)
    decays = [log_refined_gate(g, r).to(v.dtype) for g, r in zip(gates[:half], gates[half:], strict=True)]
    if operation == "chunk_gla":
        chunk_gla = importlib.import_module("fla.ops.gla").chunk_gla
        return lambda *inputs: chunk_gla(*inputs)[0], [*features, v, *decays]
    return partial(_gated, axis=axis, backend=backend), [*features, v, *decays]


def _part(operation: str, backend: str, q: Tensor, v: Tensor) -> tuple[Operation, Sequence[Tensor]]:
    """What comes around a recurrence with such queries and values."""
    (B, T, H, V), K, kernel = v.shape, q.shape[-1], "triton" if backend == "triton" else "chunked"
    like: dict[str, Any] = {"device": v.device, "dtype": v.dtype}
    if operation == NORM:
        gate = normal(B, T, H * V, seed=7, **like)
        return partial(_output_norm, backend=kernel), [v, gate, torch.ones(H, V, device=v.device)]
    C = H * (2 * K + V)
    inputs = [normal(B, T, C, seed=7, **like), normal(_TAPS, C, seed=8, device=v.device)]
    if T == 1:
        inputs.append(normal(B, _TAPS - 1, C, seed=9, **like))
    return partial(_short_convolution, backend=kernel), inputs


def _delta(operation: str, backend: str, logits: dict[str, Tensor]) -> tuple[Operation, Sequence[Tensor]]:
    q, k, v, gate, refine = logits.values()
    start = half_life_logit(torch.logspace(0, 8, k.shape[-1], base=2.0, device=k.device))
    gate, refine = (start + gate / 4).to(v.dtype), refine / 4  # gates differ a little from token to token
    beta = normal(*k.shape[:3], seed=5, device=k.device, dtype=v.dtype)
    if operation == "regla_delta_attention":
        return partial(_delta_attention, regla_delta_attention, backend=backend), [q, k, v, beta, gate, refine]
    if operation == DELTA_STEP:
        B, _, H, K = k.shape
        state = normal(B, H, K, v.shape[-1], seed=9, device=v.device)
        return partial(_delta_step, backend=backend), [q, k, v, beta, gate, refine, state]
    inputs = [unit_safe_exp(q), unit_safe_exp(k), v, torch.sigmoid(beta), log_refined_gate(gate, refine).to(v.dtype)]
    if operation == "gated_delta_attention":
        return partial(_delta_attention, gated_delta_attention, backend=backend), inputs
    chunk_kda = importlib.import_module("fla.ops.kda").chunk_kda
    return lambda q, k, v, beta, gk: chunk_kda(q, k, v, gk, beta)[0], inputs


def _delta_attention(function: Callable[..., tuple[Tensor, Tensor | None]], *inputs: Tensor, backend: str) -> Tensor:
    return function(*inputs, backend=backend)[0]


def _delta_step(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, gate: Tensor, refine: Tensor, S: Tensor, backend: str
) -> Tensor:
    call = Call(q, k, v, Gates(gate, refine, write=beta), k.shape[-1] ** -0.5, S=S)
    return attend_delta(call, Forms("unit_safe_exp", 1.0), backend, validate=False, overwrite=True)[0]


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """With the kernel that PyTorch chooses; on an H100 that is cuDNN's, which is faster than its flash attention."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _named(axis: str, gates: Sequence[Tensor]) -> dict[str, Any]:
    """Arguments of safe_exp_attention; of log-decays alone, without refine logits."""
    return dict(zip(_GATES[axis], gates, strict=False))


def _regla(q: Tensor, k: Tensor, v: Tensor, *gates: Tensor, axis: str, backend: str) -> Tensor:
    """`regla_attention`, its gates as a mixer has them: those of each axis by themselves."""
    return safe_exp_attention(q, k, v, **_named(axis, gates), backend=backend)[0]


def _step(q: Tensor, k: Tensor, v: Tensor, *gates_and_state: Tensor, axis: str, backend: str) -> Tensor:
    *gates, S, m = gates_and_state
    options: dict[str, Any] = {"initial_state": (S, m), "output_final_state": True, "backend": backend}
    return safe_exp_attention(q, k, v, **_named(axis, gates), **options)[0]


def _step_in_place(q: Tensor, k: Tensor, v: Tensor, *gates_and_state: Tensor, axis: str, backend: str) -> Tensor:
    *gates, S, m = gates_and_state
    return safe_exp_step_(q, k, v, S, m, **_named(axis, gates), engine=backend)


def _output_norm(h: Tensor, gate: Tensor, weight: Tensor, backend: str) -> Tensor:
    return output_norm(h, weight, gate=gate, activation="silu", eps=1e-6, backend=backend)


def _short_convolution(x: Tensor, weight: Tensor, state: Tensor | None = None, *, backend: str) -> Tensor:
    options: dict[str, Any] = {"state": state, "overwrite_state": True, "backend": backend}
    return short_convolution(x, weight, activation="silu", **options)[0]


def _gated(q: Tensor, k: Tensor, v: Tensor, *decays: Tensor, axis: str, backend: str) -> Tensor:
    return gated_linear_attention(q, k, v, **_named(axis, decays), backend=backend)[0]


def _call(function: Operation, inputs: Sequence[Tensor], direction: str) -> Callable[[], Sequence[Tensor]]:
    """A call that returns the output, and behind it the gradients of the inputs where they are asked for."""
    if direction in ("forward", STEP):

        @torch.no_grad()
        def forward() -> Sequence[Tensor]:
            return (function(*inputs),)

        return forward
    for x in inputs:
        x.requires_grad_()
    with torch.no_grad():
        like = function(*inputs)
    d_o = normal(*like.shape, seed=6, device=like.device, dtype=like.dtype)
    del like

    def both() -> Sequence[Tensor]:
        o = function(*inputs)
        return (o.detach(), *torch.autograd.grad(o, inputs, d_o))

    return both


def _floor_bytes(inputs: Sequence[Tensor], o: Tensor, direction: str, states: int = 2) -> int:
    """Bytes that no version avoids: see the head of this module."""
    of_inputs = sum(x.numel() * x.element_size() for x in inputs)
    of_output = o.numel() * o.element_size()
    if direction == "forward":
        return of_inputs + of_output
    if direction == STEP:
        return of_inputs + of_output + sum(x.numel() * x.element_size() for x in inputs[-states:])
    return 3 * of_inputs + 2 * of_output
