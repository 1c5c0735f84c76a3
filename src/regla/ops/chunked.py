"""Gated linear attention in blocks: plain PyTorch, any device, memory linear in T.

Shape legend: B batch, T time, H state heads, G queries per state head, K key channels, V value channels, C tokens per
chunk, N chunks, M = B*H*n blocks worked on at once.

The recurrence runs over chunks, from state to state; `regla.ops.tree` does the rest, a slab of chunks at a time.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, library

from regla.ops.slab import UNIT, Scratch, Slab

CHUNK = 32
#: The backward pass scales gradients to at most 2^36: small ones, decayed, would become denormal numbers, which are
#: slow and hold few digits. More would overflow in products with keys that exp(-b) made large (`regla.ops.slab`).
_TOP = 36


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
) -> tuple[Tensor, Tensor]:
    """`gated_linear_attention` by chunks; see there for the equation, shapes and dtypes. Returns (o, final_state)."""
    B, T, H, K = k.shape
    V = v.shape[-1]
    acc = torch.promote_types(torch.float32, k.dtype)
    C = min(CHUNK, 1 << max(T - 1, 0).bit_length())
    segments, slot_of_token = None, None
    # A decay that all channels share is that of each: its gradient is then the sum of theirs.
    gk, gv = (g if g is None else g.expand(*g.shape[:3], D) for g, D in ((gk, K), (gv, V)))
    tensors = [q, k, v, gk, gv]
    if cu_seqlens is None:
        sequences = B
        if T % C:
            tensors = [x if x is None else torch.nn.functional.pad(x, (0, 0, 0, 0, 0, C - T % C)) for x in tensors]
    else:
        sequences = cu_seqlens.numel() - 1
        segments, token_of_slot, slot_of_token = _pack(cu_seqlens, T, C)
        filled = (token_of_slot >= 0)[:, None, None]
        token_of_slot = token_of_slot.clamp_min(0)
        tensors = [x if x is None else torch.where(filled, x[:, token_of_slot], 0.0) for x in tensors]
    if initial_state is None:
        initial_state = torch.zeros(sequences, H, K, V, dtype=acc, device=k.device)
    initial_state = initial_state.to(acc)
    inputs = [*tensors, initial_state]
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    o, state, _ = _forward(*inputs, scale, C, *(segments or (None, None, None)), keep)
    return (o[:, :T] if slot_of_token is None else o[:, slot_of_token]).to(v.dtype), state


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
    token = torch.arange(T, device=device)
    owner = torch.searchsorted(cu_seqlens[1:].contiguous(), token, right=True)
    slot_of_token = starts[owner] * C + token - cu_seqlens[owner]
    return Segments(chunk == starts[sequence], sequence, ends - 1), token_of_slot.reshape(-1), slot_of_token


# Opaque to torch.compile, which would trace every level of every chunk, for minutes: it sees one node, forward or
# backward, and compiles around it. Forward keeps the inputs and one state per chunk; backward recomputes the rest, a
# slab of chunks at a time.
_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? gk, Tensor? gv, Tensor {}, float scale, int C, "
_SEGMENTS = "Tensor? first, Tensor? sequence, Tensor? last_chunk"


@library.custom_op(
    "regla::chunked_forward",
    mutates_args=(),
    schema=f"({_INPUTS.format('initial_state')}{_SEGMENTS}, bool keep) -> (Tensor, Tensor, Tensor)",
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
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(o, final state, and if `keep` the states [slabs, B, H, K, V] before each slab)."""
    B, T, H, K = k.shape
    V, acc = v.shape[-1], initial_state.dtype
    o = torch.empty(B, T, q.shape[2], V, dtype=acc, device=v.device)
    slabs = _slabs(B * H * C * max(K, V), T // C, v.device)
    states = initial_state.new_empty(len(slabs) if keep else 0, B, H, K, V)
    initial_state = initial_state / _unit(gk, gv)
    finals = torch.empty_like(initial_state)
    state = initial_state if first is None else torch.zeros_like(initial_state[:1])
    scratch = Scratch(initial_state)
    with torch.autocast(v.device.type, enabled=False):
        for i, (lo, hi) in enumerate(slabs):
            if keep:
                states[i] = state
            x = Slab(q, k, v, gk, gv, C, lo, hi, scratch)
            before, after = _scan(x, state, initial_state, first, sequence)
            state = after[-1]
            if last_chunk is not None and sequence is not None:
                for n in range(lo, hi):
                    at = sequence[n : n + 1]  # an index of one: a number would make a GPU wait
                    finals[at] = torch.where(last_chunk[at] == n, after[n - lo], finals[at])
            x.output(before, scale, o)
    return o, (state if first is None else finals) * _unit(gk, gv), states


@_forward.register_fake
def _(q, k, v, gk, gv, initial_state, scale, C, first, sequence, last_chunk, keep):  # type: ignore[no-untyped-def]
    B, T, H, K = k.shape
    o = initial_state.new_empty(B, T, q.shape[2], v.shape[-1])
    slabs = len(_slabs(B * H * C * max(K, v.shape[-1]), T // C, v.device)) if keep else 0
    states = initial_state.new_empty(slabs, B, H, K, v.shape[-1])
    return o, torch.empty_like(initial_state), states


@library.custom_op(
    "regla::chunked_backward",
    mutates_args=(),
    schema="(Tensor d_o, Tensor d_final, Tensor o, Tensor states, "
    f"{_INPUTS.format('initial_state')}{_SEGMENTS}) -> Tensor[]",
)
def _backward(
    d_o: Tensor,
    d_final: Tensor,
    o: Tensor,
    states: Tensor,
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
) -> list[Tensor]:
    """Gradients of those of q, k, v, gk, gv that exist, and of the initial state."""
    B, T, H, K = k.shape
    V = v.shape[-1]
    grads = [None if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v, gk, gv)]
    largest = max(max(-lo.item(), hi.item()) for lo, hi in (torch.aminmax(d_o), torch.aminmax(d_final)))
    unit = 2.0 ** min(max(_TOP - math.frexp(largest)[1], -100), 100)
    d_final, initial_state = d_final * _unit(gk, gv) * unit, initial_state / _unit(gk, gv)
    d_initial = torch.zeros_like(d_final)
    d_state = d_final if first is None else torch.zeros_like(d_final[:1])
    slabs = _slabs(B * H * C * max(K, V), T // C, v.device)
    scratch = Scratch(states)
    with torch.autocast(v.device.type, enabled=False):
        D = scratch("D", slabs[0][1] + 1, *d_state.shape)
        D[0] = d_state
        for (lo, hi), state in zip(reversed(slabs), reversed(states.unbind(0)), strict=True):
            x = Slab(q, k, v, gk, gv, C, lo, hi, scratch)
            before, after = _scan(x, state, initial_state, first, sequence)
            d_read = x.read_backward(d_o, scale * unit)
            D[hi - lo] = D[0]
            for n in reversed(range(lo, hi)):
                d_before, d_after = D[n - lo], D[n - lo + 1]
                if last_chunk is not None and sequence is not None:
                    at = sequence[n : n + 1]
                    d_after += torch.where(last_chunk[at] == n, d_final[at], 0.0)
                torch.addcmul(d_read[n - lo], d_after, x.total[n - lo], out=d_before)
                if first is not None and sequence is not None:
                    d_initial[sequence[n : n + 1]] += torch.where(first[n], d_before, 0.0)
                    d_before.masked_fill_(first[n], 0.0)
            x.backward(before, after, D[1 : hi - lo + 1], o, unit, grads)
    d_initial = D[0] if first is None else d_initial
    return [*(x for x in grads if x is not None), d_initial / unit / _unit(gk, gv)]


@_backward.register_fake
def _(d_o, d_final, o, states, q, k, v, gk, gv, initial_state, *options):  # type: ignore[no-untyped-def]
    inputs = [x for x in (q, k, v, gk, gv) if x is not None]
    return [x.new_empty(x.shape) for x in inputs] + [torch.empty_like(d_final)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)  # that of the states would be zeros, larger than any input
    *tensors, scale, C, first, sequence, last_chunk, _ = inputs
    ctx.options = scale, C
    ctx.save_for_backward(output[0], output[2], *tensors, first, sequence, last_chunk)


def _gradients(ctx: Any, d_o: Tensor | None, d_final: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    o, states, *inputs, first, sequence, last_chunk = ctx.saved_tensors
    d_o = torch.zeros_like(o) if d_o is None else d_o
    d_final = torch.zeros_like(inputs[-1]) if d_final is None else d_final
    found = iter(_backward(d_o, d_final, o, states, *inputs, *ctx.options, first, sequence, last_chunk))
    return *(None if x is None else next(found) for x in inputs), *(None,) * 6


_forward.register_autograd(_gradients, setup_context=_save)


def _scan(
    x: Slab, state: Tensor, initial_state: Tensor, first: Tensor | None, sequence: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The states [n, B, H, K, V] before and after each chunk of a slab, from the one before the first of them."""
    written = x.written()
    n = len(written)
    states = x.scratch("states", n + 1, *state.shape)
    states[0] = state
    before, after = states[:-1], states[1:]
    if first is not None and sequence is not None:  # where a sequence opens, what is before isn't what was after
        before = x.scratch("before", *before.shape)
    for i in range(n):
        if first is not None and sequence is not None:
            at = x.place[0] + i
            before[i] = torch.where(first[at], initial_state[sequence[at : at + 1]], states[i])
        torch.addcmul(written[i], before[i], x.total[i], out=after[i])
    return before, after


def _unit(gk: Tensor | None, gv: Tensor | None) -> float:
    """States are held this much below their values."""
    return UNIT ** sum(g is not None for g in (gk, gv))


def _slabs(chunk_numel: int, N: int, device: torch.device) -> list[tuple[int, int]]:
    """Ranges of chunks to work on at once: what fits a CPU's cache; on other devices enough to fill them."""
    budget = 1 << (19 if device.type == "cpu" else 25)
    n = max(1, budget // chunk_numel)
    return [(lo, min(lo + n, N)) for lo in range(0, N, n)]
