"""Gated linear attention in blocks: plain PyTorch, any device, memory linear in T.

Shape legend: B batch, T time, H state heads, G queries per state head, K key channels, V value channels, C tokens per
chunk, N chunks, M = B*H*n blocks worked on at once.

Inside a chunk every pair s < t meets at exactly one level of a binary tree: s in the left half of a node of 2h tokens,
t in its right half. There the decay over (s, t] splits into

    exp(L_s) * exp(R_t),   L_s = sum of log-decay over (s, end of the left half],   R_t = over (end of the left half, t]

Both exponents are sums of numbers <= 0 over a few tokens: nothing overflows, nothing is a difference of long sums (a
reset of -1000 costs no digit), no bound on the gates is needed, and no factor that row t reads depends on a token
after t, so causality holds to the last bit. Prefix and suffix sums of the next level follow from this level's by one
addition each. Key-axis decay scales q and k before the scores, value-axis decay scales v and the output.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

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
    o, state = _Chunked.apply(*tensors, initial_state.to(acc), scale, C, segments)
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


class _Chunked(torch.autograd.Function):
    """Forward keeps the inputs and one state per chunk; backward recomputes the rest, a slab of chunks at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gk: Tensor | None,
        gv: Tensor | None,
        initial_state: Tensor,
        scale: float,
        C: int,
        segments: Segments | None,
    ) -> tuple[Tensor, Tensor]:
        B, T, H, K = k.shape
        V, N, acc = v.shape[-1], T // C, initial_state.dtype
        o = torch.empty(B, T, q.shape[2], V, dtype=v.dtype, device=v.device)
        states: list[Tensor] = []  # before each slab's chunks, [B, H, n, K, V]
        state = initial_state if segments is None else torch.zeros_like(initial_state[:1])
        finals = [] if segments is not None else None
        with torch.autocast(v.device.type, enabled=False):
            for lo, hi in _slabs(B * H * C * max(K, V), N, v.device):
                x = _Slab(q, k, v, gk, gv, C, lo, hi, acc)
                written = (x.decayed_k.transpose(1, 2) @ x.decayed_v).view(B, H, hi - lo, K, V)
                before = []
                for n in range(hi - lo):
                    if segments is not None:
                        opened = initial_state[segments.sequence[lo + n]][None]
                        state = torch.where(segments.first[lo + n], opened, state)
                    before.append(state)
                    state = x.decay(state, n) + written[:, :, n]
                    if finals is not None:
                        finals.append(state)
                S = torch.stack(before, 2)
                if ctx.needs_input_grad[0] or any(ctx.needs_input_grad[1:6]):
                    states.append(S)
                out = x.intra(x.scores())
                if x.gv is None:
                    out += x.from_state(S)
                else:
                    out.addcmul_(x.from_state(S), x.grow_v)
                _put(o, out.mul_(scale), lo, hi, C)
        ctx.save_for_backward(q, k, v, gk, gv, *states)
        ctx.scale, ctx.C, ctx.segments = scale, C, segments
        if finals is not None:
            assert segments is not None
            state = torch.cat(finals)[segments.last_chunk]
        return o, state

    @staticmethod
    def backward(ctx: Any, d_o: Tensor, d_final: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, gk, gv, *states = ctx.saved_tensors
        C, segments = ctx.C, ctx.segments
        B, T, H, K = k.shape
        V, N, acc = v.shape[-1], T // C, d_final.dtype
        grads = [x if x is None else torch.empty_like(x) for x in (q, k, v, gk, gv)]
        if segments is None:
            d_state, d_initial = d_final, None
        else:
            d_state = torch.zeros_like(d_final[:1])
            d_initial = torch.zeros_like(d_final)
        with torch.autocast(v.device.type, enabled=False):
            for (lo, hi), S in reversed(list(zip(_slabs(B * H * C * max(K, V), N, v.device), states, strict=True))):
                x = _Slab(q, k, v, gk, gv, C, lo, hi, acc)
                d_out = _blocks(d_o, lo, hi, C, H, acc) * ctx.scale
                d_read, inter = x.from_state_backward(S, d_out)
                after = []
                for n in reversed(range(hi - lo)):
                    if segments is not None:
                        sequence = segments.sequence[lo + n]
                        closes = segments.last_chunk[sequence] == lo + n
                        d_state = torch.where(closes, d_state + d_final[sequence][None], d_state)
                    after.append(d_state)
                    d_state = x.decay(d_state, n) + d_read[:, :, n]
                    if segments is not None:
                        opens = segments.first[lo + n]
                        d_initial = d_initial.index_add(0, sequence[None], torch.where(opens, d_state, 0.0))
                        d_state = torch.where(opens, 0.0, d_state)
                D = torch.stack(after[::-1], 2)
                for grad, value in zip(grads, x.backward(d_out, S, D, inter), strict=True):
                    if grad is not None:
                        _put(grad, value, lo, hi, C)
        return *grads, (d_state if d_initial is None else d_initial), None, None, None


def _slabs(chunk_numel: int, N: int, device: torch.device) -> list[tuple[int, int]]:
    """Ranges of chunks to work on at once: what fits a CPU's cache; on other devices enough to fill them."""
    budget = 1 << (18 if device.type == "cpu" and not torch.compiler.is_compiling() else 27)
    n = max(1, budget // chunk_numel)
    return [(lo, min(lo + n, N)) for lo in range(0, N, n)]


def _blocks(x: Tensor, lo: int, hi: int, C: int, H: int, acc: torch.dtype) -> Tensor:
    """[B, T, H*G, D] -> [M, C, G, D], M = B*H*n, for chunks lo..hi."""
    B, _, HG, D = x.shape
    x = x[:, lo * C : hi * C].reshape(B, hi - lo, C, H, HG // H, D)
    return x.permute(0, 3, 1, 2, 4, 5).to(acc).reshape(-1, C, HG // H, D)


def _put(x: Tensor, blocks: Tensor, lo: int, hi: int, C: int) -> None:
    """Inverse of `_blocks`: writes [M, C, G, D] (or [M, C, D]) into x[:, lo*C : hi*C], [B, T, H*G, D]."""
    B, _, HG, D = x.shape
    G = blocks.shape[2] if blocks.ndim == 4 else 1
    blocks = blocks.view(B, HG // G, hi - lo, C, G, D).permute(0, 2, 3, 1, 4, 5)
    x[:, lo * C : hi * C].view(B, hi - lo, C, HG // G, G, D).copy_(blocks)


class _Decay:
    """Prefix and suffix sums of one log-decay g [M, C, D] (D = channels or 1), level by level.

    At level h: prefix_t sums over [start of t's block of h tokens, t], suffix_s over (s, end of s's block].
    """

    def __init__(self, g: Tensor):
        self.g = g

    def levels(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield (h, exp R [M, nodes, h, D] of right halves, exp L of left halves); afterwards the sums span C."""
        M, C, D = self.g.shape
        prefix, suffix = self.g.clone(), torch.zeros_like(self.g)
        h = 1
        while h < C:
            p, s = prefix.view(M, -1, 2, h, D), suffix.view(M, -1, 2, h, D)
            yield h, prefix.exp().view_as(p)[:, :, 1], suffix.exp().view_as(s)[:, :, 0]
            s[:, :, 0] += p[:, :, 1, -1:]
            p[:, :, 1] += p[:, :, 0, -1:]
            h *= 2
        self.grow, self.shrink, self.total = prefix.exp(), suffix.exp(), prefix[:, -1]

    def backward(self, levels: list[tuple[Tensor, Tensor]], d_prefix: Tensor, d_suffix: Tensor) -> Tensor:
        """Gradient of g from those of the chunk's sums and of each level's (R, L): `levels` transposed."""
        M, C, D = self.g.shape
        h = C
        for d_R, d_L in reversed(levels):
            h //= 2
            p, s = d_prefix.view(M, -1, 2, h, D), d_suffix.view(M, -1, 2, h, D)
            p[:, :, 0, -1] += p[:, :, 1].sum(2)
            p[:, :, 1, -1] += s[:, :, 0].sum(2)
            p[:, :, 1] += d_R
            s[:, :, 0] += d_L
        return d_prefix


class _Slab:
    """Chunks lo..hi of all heads: the pieces of the forward pass and their gradients."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gk: Tensor | None,
        gv: Tensor | None,
        C: int,
        lo: int,
        hi: int,
        acc: torch.dtype,
    ):
        B, _, H, _ = k.shape
        self.lead = (B, H, hi - lo)
        self.q = _blocks(q, lo, hi, C, H, acc)  # [M, C, G, K]
        self.k, self.v = (_blocks(x, lo, hi, C, H, acc)[:, :, 0] for x in (k, v))  # [M, C, K], [M, C, V]
        self.gk, self.gv = (None if g is None else _Decay(_blocks(g, lo, hi, C, H, acc)[:, :, 0]) for g in (gk, gv))
        # Each level's factors are used twice, by forward and by backward, and small: kept for the slab's life.
        self.levels_k = [] if self.gk is None else list(self.gk.levels())
        self.levels_v = [] if self.gv is None else list(self.gv.levels())
        self.grown_q, self.decayed_k, self.decayed_v = self.q, self.k, self.v
        if self.gk is not None:
            self.grown_q, self.decayed_k = self.q * self.gk.grow[:, :, None], self.k * self.gk.shrink
        if self.gv is not None:
            self.decayed_v = self.v * self.gv.shrink
            self.grow_v = self.gv.grow[:, :, None]

    def decay(self, S: Tensor, n: int) -> Tensor:
        """S [B, H, K, V] decayed over chunk n."""
        if self.gk is not None:
            S = S * self.gk.total.view(*self.lead, -1)[:, :, n].exp()[..., :, None]
        if self.gv is not None:
            S = S * self.gv.total.view(*self.lead, -1)[:, :, n].exp()[..., None, :]
        return S

    def scores(self) -> Tensor:
        """P [M, C, G, C]: P[t, g, s] = sum_i q[t,g,i] k[s,i] exp(key-axis decay over (s, t]); right for s <= t only."""
        M, C, G, K = self.q.shape
        if self.gk is None:
            return (self.q.view(M, C * G, K) @ self.k.transpose(1, 2)).view(M, C, G, C)
        P = self.q.new_zeros(M, C, G, C)
        _diagonal(P).copy_((self.q * self.k[:, :, None]).sum(-1))
        for h, R, L in self.levels_k:
            rows, columns = self._right_q(h) * R[..., None, :], _halves(self.k, h)[:, :, 0] * L
            _node(P, h).copy_(_outer(rows.flatten(2, 3), columns))
        return P

    def _right_q(self, h: int) -> Tensor:
        M, C, G, K = self.q.shape
        return self.q.view(M, -1, 2, h, G, K)[:, :, 1]

    def intra(self, P: Tensor) -> Tensor:
        """[M, C, G, V]: o_t = sum_{s <= t} P[t, s] exp(value-axis decay over (s, t]) v_s."""
        M, C, G, _ = P.shape
        V = self.v.shape[-1]
        if self.gv is None:
            return (_tril(P).view(M, C * G, C) @ self.v).view(M, C, G, V)
        o = _diagonal(P)[..., None] * self.v[:, :, None]
        for h, R, L in self.levels_v:
            part = _matmul(_node(P, h), _halves(self.v, h)[:, :, 0] * L)
            o.view(M, -1, 2, h, G, V)[:, :, 1].addcmul_(part.view(M, -1, h, G, V), R[..., None, :])
        return o

    def from_state(self, S: Tensor) -> Tensor:
        """[M, C, G, V]: what the states S [B, H, n, K, V] before the chunks give, before value-axis decay."""
        M, C, G, K = self.q.shape
        return (self.grown_q.view(M, C * G, K) @ S.view(M, K, -1)).view(M, C, G, -1)

    def from_state_backward(self, S: Tensor, d_out: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient of S by the reading tokens, [B, H, n, K, V], and d_out times the value-axis decay [M, C, G, V]."""
        M, C, G, K = self.q.shape
        inter = d_out if self.gv is None else d_out * self.grow_v
        return (self.grown_q.view(M, C * G, K).transpose(1, 2) @ inter.view(M, C * G, -1)).view_as(S), inter

    def backward(self, d_out: Tensor, S: Tensor, D: Tensor, inter: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients (q, k, v, gk, gv) in block layout. D [B, H, n, K, V]: gradient of the state after each chunk."""
        M, C, G, K = self.q.shape
        V = self.v.shape[-1]
        S, D = S.view(M, K, V), D.view(M, K, V)
        d_grown_q = (inter.view(M, C * G, V) @ S.transpose(1, 2)).view(M, C, G, K)
        d_decayed_k, d_decayed_v = self.decayed_v @ D.transpose(1, 2), self.decayed_k @ D
        P = self.scores()
        d_P, d_v, d_gv = self._intra_backward(P, d_out)
        if self.gv is None:
            d_v += d_decayed_v
        else:
            d_v.addcmul_(d_decayed_v, self.gv.shrink)
        d_q, d_k, d_gk = self._scores_backward(d_P)
        if self.gk is None:
            d_q += d_grown_q
            d_k += d_decayed_k
        else:
            d_q.addcmul_(d_grown_q, self.gk.grow[:, :, None])
            d_k.addcmul_(d_decayed_k, self.gk.shrink)

        carried = None  # D * decayed S: what the decay over a whole chunk is worth
        for g, d_g, read, write in (
            (self.gk, d_gk, lambda: d_grown_q * self.grown_q, lambda: self.decayed_k * d_decayed_k),
            (self.gv, d_gv, lambda: self.from_state(S) * inter, lambda: self.decayed_v * d_decayed_v),
        ):
            if g is None:
                continue
            if carried is None:
                carried = (self._decay_all(S) * D).view(M, K, V)
            d_prefix, d_suffix = _fit(read().sum(2), g.g), _fit(write(), g.g)
            d_prefix[:, -1] += _fit(carried.sum(2 if g is self.gk else 1), g.g)
            d_g.append((d_prefix, d_suffix))
        gradients = [
            None if g is None else g.backward(d_g[:-1], *d_g[-1]) for g, d_g in ((self.gk, d_gk), (self.gv, d_gv))
        ]
        return d_q, d_k, d_v, *gradients

    def _decay_all(self, S: Tensor) -> Tensor:
        if self.gk is not None:
            S = S * self.gk.total.exp()[:, :, None]
        if self.gv is not None:
            S = S * self.gv.total.exp()[:, None, :]
        return S

    def _intra_backward(self, P: Tensor, d_out: Tensor) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
        M, C, G, _ = P.shape
        V = self.v.shape[-1]
        if self.gv is None:
            d_out = d_out.view(M, C * G, V)
            d_P = _tril((d_out @ self.v.transpose(1, 2)).view(M, C, G, C))
            return d_P, _tril(P).view(M, C * G, C).transpose(1, 2) @ d_out, []
        d_P = torch.zeros_like(P)
        _diagonal(d_P).copy_((d_out * self.v[:, :, None]).sum(-1))
        d_v = (_diagonal(P)[..., None] * d_out).sum(2)
        d_gv = []
        for h, R, L in self.levels_v:
            node = _node(P, h).contiguous()
            columns = _halves(self.v, h)[:, :, 0] * L
            rows = d_out.view(M, -1, 2, h, G, V)[:, :, 1] * R[..., None, :]
            flat = rows.flatten(2, 3)
            d_columns = _matmul(node.transpose(2, 3), flat)
            _node(d_P, h).copy_(_outer(flat, columns))
            _halves(d_v, h)[:, :, 0].addcmul_(d_columns, L)
            d_R = (rows * _matmul(node, columns).view_as(rows)).sum(3)
            d_gv.append((_fit(d_R, self.gv.g), _fit(columns * d_columns, self.gv.g)))
        return d_P, d_v, d_gv

    def _scores_backward(self, d_P: Tensor) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
        M, C, G, K = self.q.shape
        if self.gk is None:
            d_P = d_P.view(M, C * G, C)
            return (d_P @ self.k).view_as(self.q), d_P.transpose(1, 2) @ self.q.view(M, C * G, K), []
        on_diagonal = _diagonal(d_P)[..., None]
        d_q = on_diagonal * self.k[:, :, None]
        d_k = (on_diagonal * self.q).sum(2)
        d_gk = []
        for h, R, L in self.levels_k:
            node = _node(d_P, h).contiguous()
            columns = _halves(self.k, h)[:, :, 0] * L
            rows = self._right_q(h) * R[..., None, :]
            d_rows = _matmul(node, columns).view_as(rows)
            d_columns = _matmul(node.transpose(2, 3), rows.flatten(2, 3))
            d_q.view(M, -1, 2, h, G, K)[:, :, 1].addcmul_(d_rows, R[..., None, :])
            _halves(d_k, h)[:, :, 0].addcmul_(d_columns, L)
            d_gk.append((_fit((rows * d_rows).sum(3), self.gk.g), _fit(columns * d_columns, self.gk.g)))
        return d_q, d_k, d_gk


def _halves(x: Tensor, h: int) -> Tensor:
    """[M, C, D] -> [M, nodes, 2, h, D]."""
    return x.view(x.shape[0], -1, 2, h, x.shape[-1])


def _diagonal(P: Tensor) -> Tensor:
    """P [M, C, G, C] -> view [M, C, G] of s = t."""
    return P.diagonal(0, 1, 3).transpose(1, 2)


def _tril(P: Tensor) -> Tensor:
    """P [M, C, G, C] with s > t set to zero."""
    C = P.shape[1]
    return P.masked_fill(torch.ones(C, C, dtype=torch.bool, device=P.device).triu(1)[:, None], 0.0)


def _node(P: Tensor, h: int) -> Tensor:
    """P [M, C, G, C] -> view [M, nodes, h*G, h]: rows of the right halves against columns of the left ones."""
    M, C, G, _ = P.shape
    nodes = C // (2 * h)
    return P.view(M, nodes, 2, h * G, nodes, 2, h).diagonal(0, 1, 4)[:, 1, :, 0].permute(0, 3, 1, 2)


def _fit(x: Tensor, g: Tensor) -> Tensor:
    """Sum the channels where the decay g [..., D] has one for all."""
    return x if x.shape[-1] == g.shape[-1] else x.sum(-1, keepdim=True)


def _matmul(A: Tensor, X: Tensor) -> Tensor:
    """A [..., R, S] @ X [..., S, D]; by columns where S is so small that batched products only cost overhead."""
    if A.shape[-1] > 2:
        return A @ X
    out = A[..., :1] * X[..., :1, :]
    for j in range(1, A.shape[-1]):
        out.addcmul_(A[..., j : j + 1], X[..., j : j + 1, :])
    return out


def _outer(Y: Tensor, X: Tensor) -> Tensor:
    """Y [..., R, D] @ X [..., S, D]^T; by columns where S is so small that batched products only cost overhead."""
    if X.shape[-2] > 2:
        return Y @ X.transpose(-1, -2)
    return torch.cat([(Y * X[..., j : j + 1, :]).sum(-1, keepdim=True) for j in range(X.shape[-2])], -1)
