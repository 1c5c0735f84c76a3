"""Gated linear attention in blocks: plain PyTorch, any device, memory linear in T.

Shape legend: B batch, T time, H state heads, G queries per state head, K key channels, V value channels, C tokens per
chunk, N chunks per sequence, M chunks worked on at once.

The recurrence runs over chunks, from state to state; `regla.ops.slab` does the rest. Both work on a slab at a time:
some heads, or one head of some sequences.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, library

from regla.ops.slab import Part, Slab

CHUNK = 32
#: The backward pass scales gradients to at most 2^28: small ones, decayed, would become denormal numbers, which are
#: slow and hold few digits. More would overflow in products with keys that exp(-B_s) made large (`regla.ops.pieces`).
_TOP = 28


class Segments(NamedTuple):
    """Where packed sequences lie, in chunks: every sequence starts on a chunk of its own."""

    first: Tensor  # [N] bool: chunk n opens its sequence
    sequence: Tensor  # [N] which sequence chunk n belongs to
    first_chunk: Tensor  # [sequences] the chunk that opens each sequence
    last_chunk: Tensor  # [sequences] the chunk that closes it


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
    o, state, _ = _forward(*inputs, scale, C, *(segments or (None,) * 4), keep)
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
    segments = Segments(chunk == starts[sequence], sequence, starts, ends - 1)
    return segments, token_of_slot.reshape(-1), slot_of_token


# Opaque to torch.compile: which pieces a chunk needs depends on its gates. It sees one node, forward or backward, and
# compiles around it. Forward keeps the inputs and one state per chunk; backward recomputes the rest, a slab at a time.
_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? gk, Tensor? gv, Tensor {}, float scale, int C, "
_SEGMENTS = "Tensor? first, Tensor? sequence, Tensor? first_chunk, Tensor? last_chunk"


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
    first_chunk: Tensor | None,
    last_chunk: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(o, final state, the states [H, B, N, K, V] before each chunk, or none of them unless `keep`)."""
    B, T, H, K = k.shape
    V, N = v.shape[-1], T // C
    o = torch.empty(B, T, q.shape[2], V, dtype=v.dtype, device=v.device)
    states = initial_state.new_empty(H if keep else 0, B, N, K, V)
    finals = torch.empty_like(initial_state)
    with torch.autocast(v.device.type, enabled=False):
        for part in _slabs(B, H, T * max(K, V), v.device):
            x = Slab(q, k, v, gk, gv, part, C, initial_state.dtype)
            written, total = (y.unflatten(0, (-1, len(range(B)[part.batch]), N)) for y in (x.written(), x.total()))
            before = states[part.heads, part.batch] if keep else torch.empty_like(written)
            initial = initial_state[part.batch, part.heads].transpose(0, 1) / x.unit
            if first is None or sequence is None or last_chunk is None:
                final = _scan(before, written, total, initial, range(N))
            else:
                # Where a sequence opens, what comes from the chunk before is its initial state instead.
                opens = first.roll(-1)[:, None, None]
                given = initial[:, sequence.roll(-1)][:, None]
                added, kept = torch.where(opens, given, written), torch.where(opens, 0.0, total)
                _scan(before, added, kept, initial[:, :1], range(N))
                at = (slice(None), 0, last_chunk)
                final = written[at] + total[at] * before[at]
            finals[part.batch, part.heads] = final.transpose(0, 1) * x.unit
            out = part.of(o, H, C)
            out.copy_(x.output(before.view(-1, K, V), scale).view(out.shape))
    return o, finals, states


@_forward.register_fake
def _(q, k, v, gk, gv, initial_state, scale, C, first, sequence, first_chunk, last_chunk, keep):  # type: ignore[no-untyped-def]
    B, T, H, K = k.shape
    o = v.new_empty(B, T, q.shape[2], v.shape[-1])
    states = initial_state.new_empty(H if keep else 0, B, T // C, K, v.shape[-1])
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
    first_chunk: Tensor | None,
    last_chunk: Tensor | None,
) -> list[Tensor]:
    """Gradients of those of q, k, v, gk, gv that exist, and of the initial state."""
    B, T, H, K = k.shape
    V, N = v.shape[-1], T // C
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, gk, gv) if x is not None]
    largest = max(max(-lo.item(), hi.item()) for lo, hi in (torch.aminmax(d_o), torch.aminmax(d_final)))
    unit = 2.0 ** min(max(_TOP - math.frexp(largest)[1], -100), 100)
    d_final = d_final * unit
    d_initial = torch.empty_like(d_final)
    with torch.autocast(v.device.type, enabled=False):
        for part in _slabs(B, H, T * max(K, V), v.device):
            x = Slab(q, k, v, gk, gv, part, C, states.dtype)
            d_read = x.read_backward(part.chunks(d_o, H, C, states.dtype), scale * unit)
            d_read, total = (y.unflatten(0, (-1, len(range(B)[part.batch]), N)) for y in (d_read, x.total()))
            after = torch.empty_like(d_read)
            last = d_final[part.batch, part.heads].transpose(0, 1) * x.unit
            order = range(N)[::-1]
            if first is None or first_chunk is None or last_chunk is None:
                d_start = _scan(after, d_read, total, last, order)
            else:
                # Where a sequence opens, what goes to the chunk before is the gradient of that one's final state.
                closing = torch.zeros_like(d_read)
                closing[:, 0, last_chunk] = last
                opens = first[:, None, None]
                added, kept = torch.where(opens, 0.0, d_read) + closing.roll(1, 2), torch.where(opens, 0.0, total)
                _scan(after, added, kept, closing[:, :, -1], order)
                at = (slice(None), 0, first_chunk)
                d_start = d_read[at] + total[at] * after[at]
            d_initial[part.batch, part.heads] = d_start.transpose(0, 1) / (x.unit * unit)
            values = x.backward(states[part.heads, part.batch].view(-1, K, V), after.view(-1, K, V))
            for grad, value in zip(grads, [y for y in values if y is not None], strict=True):
                out = part.of(grad, H, C)
                torch.mul(value.view(out.shape), 1 / unit, out=out)
    return [*grads, d_initial]


@_backward.register_fake
def _(d_o, d_final, q, k, v, gk, gv, states, *options):  # type: ignore[no-untyped-def]
    inputs = [x for x in (q, k, v, gk, gv) if x is not None]
    return [x.new_empty(x.shape) for x in inputs] + [torch.empty_like(d_final)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)  # that of the states would be zeros, larger than any input
    q, k, v, gk, gv, _, *ctx.options, _ = inputs
    ctx.options, segments = ctx.options[:2], ctx.options[2:]
    ctx.sequences = len(output[1])
    ctx.save_for_backward(q, k, v, gk, gv, output[2], *segments)


def _gradients(ctx: Any, d_o: Tensor | None, d_final: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    q, k, v, gk, gv, states, *segments = ctx.saved_tensors
    if d_o is None:
        d_o = v.new_zeros(*q.shape[:-1], v.shape[-1])
    if d_final is None:
        d_final = states.new_zeros(ctx.sequences, states.shape[0], *states.shape[3:])
    found = iter(_backward(d_o, d_final, q, k, v, gk, gv, states, *ctx.options, *segments))
    grads = [None if x is None else next(found) for x in (q, k, v, gk, gv, states)]
    return *grads, *(None,) * 7


_forward.register_autograd(_gradients, setup_context=_save)


def _scan(states: Tensor, added: Tensor, total: Tensor, state: Tensor, order: Sequence[int]) -> Tensor:
    """states[n] = state; state = total[n] * state + added[n], for the chunks n of [h, B, N, K, V] in their order."""
    states_N, added_N, total_N = (x.view(-1, *x.shape[2:]).unbind(1) for x in (states, added, total))
    final = state.new_empty(added_N[0].shape)
    states_N[order[0]].copy_(state.flatten(0, 1))
    for n, into in zip(order, [*(states_N[n] for n in order[1:]), final], strict=True):
        torch.addcmul(added_N[n], total_N[n], states_N[n], out=into)
    return final.view(added.shape[0], -1, *final.shape[1:])


def _slabs(B: int, H: int, numel: int, device: torch.device) -> Iterator[Part]:
    """What to work on at once, `numel` numbers per sequence and head: what a CPU's cache nearly holds; on other devices
    enough to fill them."""
    budget = 1 << (19 if device.type == "cpu" else 25)
    n = max(1, budget // numel)
    if n >= B:
        yield from (Part(slice(None), slice(h, h + n // B)) for h in range(0, H, n // B))
    else:
        yield from (Part(slice(b, b + n), slice(h, h + 1)) for h in range(H) for b in range(0, B, n))
