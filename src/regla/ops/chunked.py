"""Gated linear attention in blocks: plain PyTorch, any device, memory linear in T.

Shape legend: B batch, T time, H state heads, G queries per state head, K key channels, V value channels, C tokens per
chunk, N chunks, M = B*H*n blocks worked on at once.

The recurrence runs over chunks, from state to state; `regla.ops.tree` does the rest, a slab of chunks at a time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, library

from regla.ops.call import owners
from regla.ops.features import lowering
from regla.ops.tree import Slab, blocks, put
from regla.ops.units import NOTHING, no_unit_suits, top_exponents, unit_exponents

CHUNK = 64


class Segments(NamedTuple):
    """Where packed sequences lie, in chunks: every sequence starts on a chunk of its own."""

    first: Tensor  # [N] bool: chunk n opens its sequence
    sequence: Tensor  # [N] which sequence chunk n belongs to
    last_chunk: Tensor  # [sequences] the chunk that closes each sequence


def chunked_gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gk: Tensor | None,
    gv: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    lifted: bool = False,
) -> tuple[Tensor, Tensor]:
    """`gated_linear_attention` by chunks; see there for the equation, shapes and dtypes. Returns (o, final_state).

    lifted: k holds features 2^LIFT times as large, and o is lowered again (`regla.ops.features.lowering`).
    """
    B, T, H, K = k.shape
    V = v.shape[-1]
    acc = torch.promote_types(torch.float32, k.dtype)
    C = min(CHUNK, 1 << max(T - 1, 0).bit_length())
    tensors, segments, slot_of_token = in_chunks([q, k, v, gk, gv], C, cu_seqlens)
    if initial_state is None:
        sequences = B if cu_seqlens is None else cu_seqlens.numel() - 1
        initial_state = torch.zeros(sequences, H, K, V, dtype=acc, device=k.device)
    initial_state = initial_state.to(acc)
    inputs = [*tensors, initial_state]
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    o, state, *_ = _forward(*inputs, scale, C, *(segments or (None, None, None)), lifted, keep)
    return (o[:, :T] if slot_of_token is None else o[:, slot_of_token]), state


def in_chunks(
    tensors: list[Tensor | None], C: int, cu_seqlens: Tensor | None
) -> tuple[list[Tensor | None], Segments | None, Tensor | None]:
    """Tensors [B, T, heads, channels] laid out in whole chunks of C tokens, with zeros in what is added; for packed
    sequences where those lie and the slot of each token, else None and None."""
    T = next(x.shape[1] for x in tensors if x is not None)
    if cu_seqlens is None:
        if T % C:
            tensors = [x if x is None else torch.nn.functional.pad(x, (0, 0, 0, 0, 0, C - T % C)) for x in tensors]
        return tensors, None, None
    segments, token_of_slot, slot_of_token = _pack(cu_seqlens, T, C)
    filled = (token_of_slot >= 0)[:, None, None]
    token_of_slot = token_of_slot.clamp_min(0)
    tensors = [x if x is None else torch.where(filled, x[:, token_of_slot], 0.0) for x in tensors]
    return tensors, segments, slot_of_token


def _pack(cu_seqlens: Tensor, T: int, C: int) -> tuple[Segments, Tensor, Tensor]:
    """Slots of C-aligned sequences: (segments, token of each slot or -1, slot of each token). Never waits for a GPU."""
    device = cu_seqlens.device
    sequences = cu_seqlens.numel() - 1
    N = (T + sequences * (C - 1)) // C  # bound on the sum of ceil(length / C), known without reading the lengths
    lengths = cu_seqlens.diff()
    ends = ((lengths + C - 1) // C).cumsum(0)  # chunk after the last one of each sequence
    starts = torch.nn.functional.pad(ends, (1, 0))[:-1]
    chunk = torch.arange(N, device=device)
    sequence = torch.searchsorted(ends, chunk, right=True).clamp_max(sequences - 1)
    within = (chunk - starts[sequence])[:, None] * C + torch.arange(C, device=device)
    token_of_slot = torch.where(within < lengths[sequence][:, None], cu_seqlens[sequence][:, None] + within, -1)
    owner = owners(cu_seqlens, T)
    slot_of_token = starts[owner] * C + torch.arange(T, device=device) - cu_seqlens[owner]
    return Segments(chunk == starts[sequence], sequence, ends - 1), token_of_slot.reshape(-1), slot_of_token


# Opaque to torch.compile, which would trace every level of every chunk, for minutes: it sees one node, forward or
# backward, and compiles around it. Forward keeps the inputs and one state per chunk; backward recomputes the rest, a
# slab of chunks at a time.
_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? gk, Tensor? gv, Tensor {}, float scale, int C, "
_SEGMENTS = "Tensor? first, Tensor? sequence, Tensor? last_chunk"


@library.custom_op(
    "regla::chunked_forward",
    mutates_args=(),
    schema=f"({_INPUTS.format('initial_state')}{_SEGMENTS}, bool lifted, bool keep)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gk: Tensor | None,
    gv: Tensor | None,
    initial_state: Tensor,
    scale: float,
    C: int,
    first: Tensor | None,
    sequence: Tensor | None,
    last_chunk: Tensor | None,
    lifted: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(o, final state, and if `keep` the states [B, H, N, K, V] before each chunk and, if `lifted`, the factor
    [B, T, HQ, 1] that lowers each output; else none of them)."""
    B, T, H, K = k.shape
    V, N = v.shape[-1], T // C
    o = torch.empty(B, T, q.shape[2], V, dtype=v.dtype, device=v.device)
    states = initial_state.new_empty(B, H, N if keep else 0, K, V)
    state = initial_state if first is None else torch.zeros_like(initial_state[:1])
    factors = initial_state.new_empty(B, T if keep and lifted else 0, q.shape[2], 1)
    finals = initial_state.clone()  # a sequence without tokens has no chunk that would write its own
    with torch.autocast(v.device.type, enabled=False):
        for lo, hi in _slabs(B * H * C * max(K, V), N, v.device):
            x = Slab(q, k, v, gk, gv, C, lo, hi, initial_state.dtype)
            out = x.intra(x.scores())
            written = x.written()
            before = states[:, :, lo:hi] if keep else torch.empty_like(written)
            for n in range(lo, hi):
                if first is not None and sequence is not None:
                    state = torch.where(first[n], initial_state[sequence[n : n + 1]], state)
                before[:, :, n - lo] = state
                state = x.decay(state, n - lo) + written[:, :, n - lo]
                if last_chunk is not None and sequence is not None:
                    at = sequence[n : n + 1]  # an index of one: a number would make a GPU wait
                    finals[at] = torch.where(last_chunk[at] == n, state, finals[at])
            x.add_from_state(out, before)
            out.mul_(scale)
            if lifted:
                factor = lowering(out)
                out.mul_(factor)
                if keep:
                    put(factors, factor, lo, hi, C)
            put(o, out, lo, hi, C)
    return o, state if first is None else finals, states, factors


@_forward.register_fake
def _(q, k, v, gk, gv, initial_state, scale, C, first, sequence, last_chunk, lifted, keep):  # type: ignore[no-untyped-def]
    B, T, H, K = k.shape
    o = v.new_empty(B, T, q.shape[2], v.shape[-1])
    states = initial_state.new_empty(B, H, T // C if keep else 0, K, v.shape[-1])
    factors = initial_state.new_empty(B, T if keep and lifted else 0, q.shape[2], 1)
    return o, torch.empty_like(initial_state), states, factors


@library.custom_op(
    "regla::chunked_backward",
    mutates_args=(),
    schema=f"(Tensor? d_o, Tensor? d_final, {_INPUTS.format('states')}{_SEGMENTS}, Tensor? factors, int sequences)"
    " -> Tensor[]",
)
def _backward(
    d_o: Tensor | None,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gk: Tensor | None,
    gv: Tensor | None,
    states: Tensor,
    scale: float,
    C: int,
    first: Tensor | None,
    sequence: Tensor | None,
    last_chunk: Tensor | None,
    factors: Tensor | None,
    sequences: int,
) -> list[Tensor]:
    """Gradients of those of q, k, v, gk, gv that exist, and of the initial state."""
    segments = (
        None if first is None or sequence is None or last_chunk is None else Segments(first, sequence, last_chunk)
    )
    inputs = (q, k, v, gk, gv), states, factors, scale, C, segments
    of_outputs = None if d_o is None else _exponents_of_outputs(d_o, factors, k.shape[2], C, segments, sequences)
    of_state = None if d_final is None else top_exponents(d_final, (2, 3))
    if of_outputs is not None and of_state is not None and no_unit_suits(of_outputs, of_state):
        of_outputs_alone = _in_units(d_o, None, unit_exponents(of_outputs, None), *inputs)
        of_state_alone = _in_units(None, d_final, unit_exponents(None, of_state), *inputs)
        return [x + y for x, y in zip(of_outputs_alone, of_state_alone, strict=True)]
    return _in_units(d_o, d_final, unit_exponents(of_outputs, of_state), *inputs)


def _exponents_of_outputs(
    d_o: Tensor, factors: Tensor | None, H: int, C: int, segments: Segments | None, sequences: int
) -> Tensor:
    """`top_exponents` of d_o [B, T, H*G, V], lowered by `factors`, for each sequence and state head."""
    tops = d_o.abs().amax(-1, keepdim=True).double()
    tops = tops if factors is None else tops * factors
    if segments is None:
        return top_exponents(tops.unflatten(2, (H, -1)), (1, 3, 4))
    of_chunks = top_exponents(tops.view(-1, C, H, tops.shape[2] // H), (1, 3))
    nothing = torch.full_like(of_chunks[:1], NOTHING).expand(sequences, H)
    return nothing.scatter_reduce(0, segments.sequence[:, None].expand(-1, H), of_chunks, "amax")


def _in_units(
    d_o: Tensor | None,
    d_final: Tensor | None,
    exponents: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None],
    states: Tensor,
    factors: Tensor | None,
    scale: float,
    C: int,
    segments: Segments | None,
) -> list[Tensor]:
    """`_backward` in units 2^exponents [sequences, H]."""
    q, k, v, gk, gv = inputs
    B, T, H, K = k.shape
    V, N = v.shape[-1], T // C
    exponents_BHN = (
        exponents[..., None].expand(-1, -1, N) if segments is None else exponents[segments.sequence].mT[None]
    )
    unit = _power(exponents, states)[..., None, None]
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs if x is not None]
    d_o = v.new_zeros(1).expand(B, T, q.shape[2], V) if d_o is None else d_o
    d_final = torch.zeros_like(unit).expand(-1, -1, K, V) if d_final is None else d_final * unit
    if segments is None:
        d_initial, d_state = d_final, d_final
    else:
        is_empty = segments.last_chunk.diff(prepend=segments.last_chunk.new_full((1,), -1)) == 0
        d_initial = torch.where(is_empty[:, None, None, None], d_final, 0.0)
        d_state = torch.zeros_like(d_final[:1])
    with torch.autocast(v.device.type, enabled=False):
        for lo, hi in reversed(_slabs(B * H * C * max(K, V), N, v.device)):
            x = Slab(q, k, v, gk, gv, C, lo, hi, states.dtype)
            exponent_M = exponents_BHN[:, :, lo:hi].reshape(-1, 1, 1, 1)
            half_M = exponent_M // 2  # of a unit, which together with a factor may be beyond float32
            d_out = blocks(d_o, lo, hi, C, H, states.dtype) * (scale * _power(half_M, states))
            factor = 1.0 if factors is None else blocks(factors, lo, hi, C, H, states.dtype)
            d_out *= factor * _power(exponent_M - half_M, states)
            x.local_backward(d_out)
            d_read = x.read_backward(d_out)
            after = torch.empty_like(d_read)
            for n in reversed(range(lo, hi)):
                if segments is not None:
                    at = segments.sequence[n : n + 1]
                    d_state = torch.where(segments.last_chunk[at] == n, d_state + d_final[at], d_state)
                after[:, :, n - lo] = d_state
                d_state = x.decay(d_state, n - lo) + d_read[:, :, n - lo]
                if segments is not None:
                    d_initial[segments.sequence[n : n + 1]] += torch.where(segments.first[n], d_state, 0.0)
                    d_state = torch.where(segments.first[n], 0.0, d_state)
            values = x.state_backward(states[:, :, lo:hi], after)
            unit_M = _power(exponent_M, states)
            for grad, value in zip(grads, [y for y in values if y is not None], strict=True):
                put(grad, value / (unit_M if value.ndim == 4 else unit_M[..., 0]), lo, hi, C)
    return [*grads, (d_state if segments is None else d_initial) / unit]


def _power(exponent: Tensor, like: Tensor) -> Tensor:
    """2^exponent, exactly."""
    return torch.ldexp(torch.ones_like(exponent, dtype=like.dtype), exponent)


@_backward.register_fake
def _(d_o, d_final, q, k, v, gk, gv, states, scale, C, first, sequence, last_chunk, factors, sequences):  # type: ignore[no-untyped-def]
    like = [x.new_empty(x.shape) for x in (q, k, v, gk, gv) if x is not None]
    return [*like, states.new_empty(sequences, k.shape[2], k.shape[3], v.shape[3])]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, gk, gv, initial_state, *ctx.options, ctx.lifted, _ = inputs
    ctx.options, segments = ctx.options[:2], ctx.options[2:]
    ctx.sequences = initial_state.shape[0]
    ctx.save_for_backward(q, k, v, gk, gv, *output[2:], *segments)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, d_o: Tensor | None, d_final: Tensor | None, *_: Any) -> tuple[Any, ...]:
    q, k, v, gk, gv, states, factors, *segments = ctx.saved_tensors
    options = *ctx.options, *segments, factors if ctx.lifted else None, ctx.sequences
    found = iter(_backward(d_o, d_final, q, k, v, gk, gv, states, *options))
    grads = [None if x is None else next(found) for x in (q, k, v, gk, gv, states)]
    return *grads, *(None,) * 7


_forward.register_autograd(_gradients, setup_context=_save)


def _slabs(chunk_numel: int, N: int, device: torch.device) -> list[tuple[int, int]]:
    """Ranges of chunks to work on at once: what fits a CPU's cache; on other devices enough to fill them."""
    budget = 1 << (18 if device.type == "cpu" else 25)
    n = max(1, budget // chunk_numel)
    return [(lo, min(lo + n, N)) for lo in range(0, N, n)]
