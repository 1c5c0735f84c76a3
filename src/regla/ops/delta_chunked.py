"""The gated delta rule in blocks: plain PyTorch, any device, memory linear in T.

Of the tokens of a chunk, with S the state before it, D_t the decay from its start to token t and A strictly lower
triangular,

    A_ts = beta_t (D_t k_t)^T (k_s / D_s)                        (never formed as a quotient, see `regla.ops.tree`)
    (I + A) U = Diag(beta) (V - (K o D) S)                       forward substitution

gives what the tokens write: behind that the rule is the additive one with U in place of V. With W and Y the solutions
of (I + A) [W, Y] = Diag(beta) [K o D, V], U = Y - W S, so that chunks meet their states in two products each.

Shape legend: B batch, T time, H state heads, G queries per state head, K key channels, V value channels, C tokens per
chunk, N chunks, n chunks of a slab, M = B*H*n blocks worked on at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, library

from regla.ops.chunked import CHUNK, _slabs, in_chunks
from regla.ops.tree import Slab, blocks, put


def chunked_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    gk: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`gated_delta_attention` by chunks; see there for the equation, shapes and dtypes. Returns (o, final_state)."""
    B, T, H, K = k.shape
    acc = torch.promote_types(torch.float32, k.dtype)
    C = min(CHUNK, 1 << max(T - 1, 0).bit_length())
    tensors, segments, slot_of_token = in_chunks([q, k, v, beta[..., None], gk], C, cu_seqlens)
    if initial_state is None:
        sequences = B if cu_seqlens is None else cu_seqlens.numel() - 1
        initial_state = torch.zeros(sequences, H, K, v.shape[-1], dtype=acc, device=k.device)
    inputs = [*tensors, initial_state.to(acc)]
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    o, state, _ = _forward(*inputs, scale, C, *(segments or (None, None, None)), keep)
    return (o[:, :T] if slot_of_token is None else o[:, slot_of_token]), state


class DeltaSlab:
    """Chunks lo..hi of all heads. Keys are one query more, the last, of an additive `Slab` whose values are U."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        gk: Tensor | None,
        C: int,
        lo: int,
        hi: int,
        acc: torch.dtype,
    ):
        H = k.shape[2]
        self.slab = Slab(q, k, v, gk, None, C, lo, hi, acc)
        self.slab.q = torch.cat([self.slab.q, self.slab.k[:, :, None]], 2)  # [M, C, G + 1, K]
        self.beta = blocks(beta, lo, hi, C, H, acc)[:, :, 0]  # [M, C, 1]
        self.v = self.slab.v
        self.P = self.slab.scores()  # [M, C, G + 1, C]
        self.overlap = self.P[:, :, -1].tril(-1)  # k_t against k_s, decayed, s < t
        self.A = self.beta * self.overlap
        decay = self.slab.gk
        self.grown_q = self.slab.q if decay is None else self.slab.q * decay.grow[:, :, None]
        self.grown_k = self.grown_q[:, :, -1]
        self.shrunk_k = self.slab.k if decay is None else self.slab.k * decay.shrink
        K = self.grown_k.shape[-1]
        solved = _solve(self.A, self.beta * torch.cat([self.grown_k, self.v], -1))
        self.W, self.Y = solved[..., :K], solved[..., K:]

    def per_chunk(self, x: Tensor) -> Tensor:
        """[M, ...] -> [B, H, n, ...]."""
        return x.view(*self.slab.lead, *x.shape[1:])


def _solve(A: Tensor, X: Tensor) -> Tensor:
    """(I + A)^-1 X for strictly lower triangular A."""
    return torch.linalg.solve_triangular(A, X, upper=False, unitriangular=True)


_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? gk, Tensor {}, float scale, int C, "
_SEGMENTS = "Tensor? first, Tensor? sequence, Tensor? last_chunk"


@library.custom_op(
    "regla::chunked_delta_forward",
    mutates_args=(),
    schema=f"({_INPUTS.format('initial_state')}{_SEGMENTS}, bool keep) -> (Tensor, Tensor, Tensor)",
)
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    gk: Tensor | None,
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
    finals = initial_state.clone()
    with torch.autocast(v.device.type, enabled=False):
        for lo, hi in _slabs(B * H * C * max(K, V), N, v.device):
            x = DeltaSlab(q, k, v, beta, gk, C, lo, hi, initial_state.dtype)
            W, Y, shrunk_k = (x.per_chunk(part) for part in (x.W, x.Y, x.shrunk_k))
            U = torch.empty_like(Y)
            before = states[:, :, lo:hi] if keep else initial_state.new_empty(B, H, hi - lo, K, V)
            for n in range(lo, hi):
                if first is not None and sequence is not None:
                    state = torch.where(first[n], initial_state[sequence[n : n + 1]], state)
                before[:, :, n - lo] = state
                U[:, :, n - lo] = Y[:, :, n - lo] - W[:, :, n - lo] @ state
                state = x.slab.decay(state, n - lo) + shrunk_k[:, :, n - lo].mT @ U[:, :, n - lo]
                if last_chunk is not None and sequence is not None:
                    at = sequence[n : n + 1]  # an index of one: a number would make a GPU wait
                    finals[at] = torch.where(last_chunk[at] == n, state, finals[at])
            x.slab.v = U.flatten(0, 2)
            x.slab.q, P = x.slab.q[:, :, :-1].contiguous(), x.P[:, :, :-1].contiguous()
            out = x.slab.intra(P)
            x.slab.add_from_state(out, before)
            put(o, out.mul_(scale), lo, hi, C)
    return o, state if first is None else finals, states


@_forward.register_fake
def _(q, k, v, beta, gk, initial_state, scale, C, first, sequence, last_chunk, keep):  # type: ignore[no-untyped-def]
    B, T, H, K = k.shape
    o = v.new_empty(B, T, q.shape[2], v.shape[-1])
    states = initial_state.new_empty(B, H, T // C if keep else 0, K, v.shape[-1])
    return o, torch.empty_like(initial_state), states


@library.custom_op(
    "regla::chunked_delta_backward",
    mutates_args=(),
    schema=f"(Tensor d_o, Tensor d_final, {_INPUTS.format('states')}{_SEGMENTS}) -> Tensor[]",
)
def _backward(
    d_o: Tensor,
    d_final: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    gk: Tensor | None,
    states: Tensor,
    scale: float,
    C: int,
    first: Tensor | None,
    sequence: Tensor | None,
    last_chunk: Tensor | None,
) -> list[Tensor]:
    """Gradients of those of q, k, v, beta, gk that exist, and of the initial state.

    From dS behind a chunk: dU = tril(P)^T dO + (K / D) dS, R = (I + A)^-T dU, and before it
    dS' = D dS + (Q o D)^T dO - W^T dU. beta takes R^T (V - (K o D) S - sum_s k_t k_s u_s), A takes -R U^T.
    """
    B, T, H, K = k.shape
    V, N = v.shape[-1], T // C
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, beta, gk) if x is not None]
    d_initial = d_final.clone()  # of a sequence without tokens, the state's gradient passes
    d_state = d_final if first is None else torch.zeros_like(d_final[:1])
    with torch.autocast(v.device.type, enabled=False):
        for lo, hi in reversed(_slabs(B * H * C * max(K, V), N, v.device)):
            x = DeltaSlab(q, k, v, beta, gk, C, lo, hi, states.dtype)
            slab, G = x.slab, q.shape[2] // H
            S = states[:, :, lo:hi]
            U = (x.Y - x.W @ S.reshape(-1, K, V)).contiguous()
            d_out = blocks(d_o, lo, hi, C, H, states.dtype) * scale
            flat = d_out.flatten(1, 2)  # [M, C G, V]
            P = x.P[:, :, :G].contiguous()
            lower = torch.ones(C, C, dtype=torch.bool, device=v.device).tril()[:, None]
            d_U = torch.where(lower, P, 0.0).flatten(1, 2).mT @ flat
            d_read = x.per_chunk(x.grown_q[:, :, :G].flatten(1, 2).mT @ flat)
            d_U, W, shrunk_k = (x.per_chunk(part) for part in (d_U, x.W, x.shrunk_k))
            after = torch.empty_like(d_read)
            for n in reversed(range(lo, hi)):
                if last_chunk is not None and sequence is not None:
                    at = sequence[n : n + 1]
                    d_state = torch.where(last_chunk[at] == n, d_state + d_final[at], d_state)
                i = n - lo
                after[:, :, i] = d_state
                d_U[:, :, i] += shrunk_k[:, :, i] @ d_state
                d_state = slab.decay(d_state, i) + d_read[:, :, i] - W[:, :, i].mT @ d_U[:, :, i]
                if first is not None and sequence is not None:
                    at = sequence[n : n + 1]
                    d_initial[at] = torch.where(first[n], d_state, d_initial[at])
                    d_state = torch.where(first[n], 0.0, d_state)
            values = _slab_gradients(x, U, d_U.flatten(0, 2), d_out, S, after)
            for grad, value in zip(grads, [y for y in values if y is not None], strict=True):
                put(grad, value, lo, hi, C)
    return [*grads, d_state if first is None else d_initial]


def _slab_gradients(
    x: DeltaSlab, U: Tensor, d_U: Tensor, d_out: Tensor, S: Tensor, after: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, beta, gk in block layout. U, d_U [M, C, V]; d_out [M, C, G, V]; S and after, the states
    before the chunks and the gradients of those behind, [B, H, n, K, V].

    With E = (K o D) S + tril(A / beta, -1) U, what the state answers for the keys, U = Diag(beta) (V - E).
    """
    slab, K = x.slab, x.grown_k.shape[-1]
    R = torch.linalg.solve_triangular(x.A.mT, d_U, upper=True, unitriangular=True)
    d_v = x.beta * R  # and -d_v is the gradient of E
    answers = x.grown_k @ S.reshape(-1, K, S.shape[-1]) + x.overlap @ U
    d_beta = (R * (x.v - answers)).sum(-1, keepdim=True)
    d_read = torch.cat([d_out, -d_v[:, :, None]], 2)
    M, C, queries, V = d_read.shape
    d_P = (d_read.view(M, C * queries, V) @ U.mT).view(M, C, queries, C)
    slab.d_q, slab.d_k, slab.d_gk = slab._scores_backward(d_P.masked_fill(_later(C, queries, U.device), 0.0))
    slab.v, slab.d_v, slab.d_read, slab.grown_q = U, torch.zeros_like(U), d_read, x.grown_q
    d_q, d_k, _, d_gk, _ = slab.state_backward(S, after)
    assert d_q is not None and d_k is not None
    return d_q[:, :, :-1], d_k + d_q[:, :, -1], d_v, d_beta, d_gk


def _later(C: int, queries: int, device: torch.device) -> Tensor:
    """[C, queries, C]: the tokens s that token t does not read: s > t, and for the last query, its key, s = t, too."""
    later = torch.ones(C, C, dtype=torch.bool, device=device).triu(1)
    return torch.stack([later] * (queries - 1) + [later | torch.eye(C, dtype=torch.bool, device=device)], 1)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, beta, gk, _, *options, _ = inputs
    ctx.options, segments = options[:2], options[2:]
    ctx.save_for_backward(q, k, v, beta, gk, output[2], *segments)


def _gradients(ctx: Any, d_o: Tensor, d_final: Tensor, d_states: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, beta, gk, states, *segments = ctx.saved_tensors
    found = iter(_backward(d_o, d_final, q, k, v, beta, gk, states, *ctx.options, *segments))
    grads = [None if x is None else next(found) for x in (q, k, v, beta, gk, states)]
    return *grads, *(None,) * 6


@_backward.register_fake
def _(d_o, d_final, q, k, v, beta, gk, states, *options):  # type: ignore[no-untyped-def]
    inputs = [x for x in (q, k, v, beta, gk) if x is not None]
    return [x.new_empty(x.shape) for x in inputs] + [torch.empty_like(d_final)]


_forward.register_autograd(_gradients, setup_context=_save)
