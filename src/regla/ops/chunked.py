"""Gated linear attention in blocks: plain PyTorch, any device, memory linear in T.

Shape legend: B batch, T time, H state heads, G queries per state head, K key channels, V value channels, C tokens per
chunk, N chunks, M = B*H*n blocks worked on at once.

The recurrence runs over chunks, from state to state; `regla.ops.tree` does the rest, a slab of chunks at a time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, library

from regla.ops.tree import Slab, blocks, put

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
) -> tuple[Tensor, Tensor]:
    """`gated_linear_attention` by chunks; see there for the equation, shapes and dtypes. Returns (o, final_state)."""
    B, T, H, K = k.shape
    V = v.shape[-1]
    acc = torch.promote_types(torch.float32, k.dtype)
    C = min(CHUNK, 1 << max(T - 1, 0).bit_length())
    segments, slot_of_token = None, None
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
    return (o[:, :T] if slot_of_token is None else o[:, slot_of_token]), state


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
    """(o, final state, the states [B, H, N, K, V] before each chunk, or none of them unless `keep`)."""
    B, T, H, K = k.shape
    V, N = v.shape[-1], T // C
    o = torch.empty(B, T, q.shape[2], V, dtype=v.dtype, device=v.device)
    states = initial_state.new_empty(B, H, N if keep else 0, K, V)
    state = initial_state if first is None else torch.zeros_like(initial_state[:1])
    finals = torch.empty_like(initial_state)
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
            put(o, out.mul_(scale), lo, hi, C)
    return o, state if first is None else finals, states


@_forward.register_fake
def _(q, k, v, gk, gv, initial_state, scale, C, first, sequence, last_chunk, keep):  # type: ignore[no-untyped-def]
    B, T, H, K = k.shape
    o = v.new_empty(B, T, q.shape[2], v.shape[-1])
    states = initial_state.new_empty(B, H, T // C if keep else 0, K, v.shape[-1])
    return o, torch.empty_like(initial_state), states


@library.custom_op(
    "regla::chunked_backward",
    mutates_args=(),
    schema=f"(Tensor d_o, Tensor d_final, {_INPUTS.format('states')}{_SEGMENTS}) -> Tensor[]",
)
def _backward(
    d_o: Tensor,
    d_final: Tensor,
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
) -> list[Tensor]:
    """Gradients of those of q, k, v, gk, gv that exist, and of the initial state."""
    B, T, H, K = k.shape
    V, N = v.shape[-1], T // C
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, gk, gv) if x is not None]
    # In units in which d_o is about 1: small gradients, decayed, would become denormal numbers, which are slow.
    unit = torch.ldexp(torch.ones_like(d_final[0, 0, 0, 0]), -torch.frexp(d_o.abs().amax()).exponent.clamp(-90, 90))
    d_final = d_final * unit
    d_initial = torch.zeros_like(d_final)
    d_state = d_final if first is None else torch.zeros_like(d_final[:1])
    with torch.autocast(v.device.type, enabled=False):
        for lo, hi in reversed(_slabs(B * H * C * max(K, V), N, v.device)):
            x = Slab(q, k, v, gk, gv, C, lo, hi, states.dtype)
            d_out = blocks(d_o, lo, hi, C, H, states.dtype) * (scale * unit)
            x.local_backward(d_out)
            d_read = x.read_backward(d_out)
            after = torch.empty_like(d_read)
            for n in reversed(range(lo, hi)):
                if last_chunk is not None and sequence is not None:
                    at = sequence[n : n + 1]
                    d_state = torch.where(last_chunk[at] == n, d_state + d_final[at], d_state)
                after[:, :, n - lo] = d_state
                d_state = x.decay(d_state, n - lo) + d_read[:, :, n - lo]
                if first is not None and sequence is not None:
                    d_initial[sequence[n : n + 1]] += torch.where(first[n], d_state, 0.0)
                    d_state = torch.where(first[n], 0.0, d_state)
            values = x.state_backward(states[:, :, lo:hi], after)
            for grad, value in zip(grads, [y for y in values if y is not None], strict=True):
                put(grad, value / unit, lo, hi, C)
    return [*grads, (d_state if first is None else d_initial) / unit]


@_backward.register_fake
def _(d_o, d_final, q, k, v, gk, gv, states, *options):  # type: ignore[no-untyped-def]
    inputs = [x for x in (q, k, v, gk, gv) if x is not None]
    return [x.new_empty(x.shape) for x in inputs] + [torch.empty_like(d_final)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, gk, gv, _, *ctx.options, _ = inputs
    ctx.options, segments = ctx.options[:2], ctx.options[2:]
    ctx.save_for_backward(q, k, v, gk, gv, output[2], *segments)


def _gradients(ctx: Any, d_o: Tensor, d_final: Tensor, d_states: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, gk, gv, states, *segments = ctx.saved_tensors
    found = iter(_backward(d_o, d_final, q, k, v, gk, gv, states, *ctx.options, *segments))
    grads = [None if x is None else next(found) for x in (q, k, v, gk, gv, states)]
    return *grads, *(None,) * 6


_forward.register_autograd(_gradients, setup_context=_save)


def _slabs(chunk_numel: int, N: int, device: torch.device) -> list[tuple[int, int]]:
    """Ranges of chunks to work on at once: what fits a CPU's cache; on other devices enough to fill them."""
    budget = 1 << (18 if device.type == "cpu" else 25)
    n = max(1, budget // chunk_numel)
    return [(lo, min(lo + n, N)) for lo in range(0, N, n)]
