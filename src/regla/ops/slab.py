"""A slab of chunks: what happens inside them, and what they give to and take from the state.

Shape legend: B batch, T time, H state heads, G queries per state head, K key channels, V value channels, C tokens per
chunk, N chunks per sequence; of a slab: h heads, b sequences, M = h*b*N chunks.

With `grow`, `shrink` of `regla.ops.pieces` (1 on an axis that does not decay) and `end` the decay over a whole chunk:

    q' = q grow_k      k' = k shrink_k      v' = v shrink_v      P = tril(q' k'^T)
    o = grow_v (P v' + q' S)                S_next = end_k end_v S + (end_k k')^T (end_v v')

That is the first piece of each axis. Further ones, of the few chunks that have them, add to P, o and what is written;
only the first one reads S. S is in units of 1 / UNIT for each axis that decays, as k' and v' are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from regla.ops.pieces import REACH_KEY, REACH_VALUE, UNIT, Piece, pieces


class Part(NamedTuple):
    """The sequences and state heads that a slab has."""

    batch: slice
    heads: slice

    def of(self, x: Tensor, H: int, C: int) -> Tensor:
        """View [h, b, N, G, C, D] of x [B, T, H*G, D]."""
        B, T, HG, D = x.shape
        return x.view(B, T // C, C, H, HG // H, D)[self.batch, :, :, self.heads].permute(3, 0, 1, 4, 2, 5)

    def chunks(self, x: Tensor, H: int, C: int, acc: torch.dtype) -> Tensor:
        """[B, T, H*G, D] -> [M, G*C, D]; without a copy where it is one head and G is 1."""
        view = self.of(x, H, C)
        return view.reshape(view[..., 0, 0, 0].numel(), -1, x.shape[-1]).to(acc)


class Slab:
    """Some heads of all chunks, with the pieces of their decays."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gk: Tensor | None,
        gv: Tensor | None,
        part: Part,
        C: int,
        acc: torch.dtype,
    ):
        H = k.shape[2]
        self.q, self.k, self.v = (part.chunks(x, H, C, acc) for x in (q, k, v))
        self.key = pieces(None if gk is None else part.chunks(gk, H, C, acc), REACH_KEY)
        self.value = pieces(None if gv is None else part.chunks(gv, H, C, acc), REACH_VALUE)
        self.unit = UNIT ** sum(g is not None for g in (gk, gv))  # of S
        # The tokens' side of each product, one per piece.
        self.q_grown = [p.grown(p.pick(self.q)) for p in self.key]
        self.k_shrunk = [p.shrunk(p.pick(self.k)) for p in self.key]
        self.v_shrunk = [p.shrunk(p.pick(self.v)) for p in self.value]
        self.k_end = self.k  # [M, C, K], decayed to the end of the chunk
        if gk is not None:
            self.k_end = self.k_shrunk[0] * self.key[0].end()
            for p, k in zip(self.key[1:], self.k_shrunk[1:], strict=True):
                p.add(self.k_end, k * p.end())

    def total(self) -> Tensor:
        """[M, K or 1, V or 1]: what a whole chunk leaves of each element of the state."""
        total = self.k.new_ones(1, 1, 1).expand(len(self.k), 1, 1)
        if self.key[0].grow is not None:
            total = total * self.key[0].end().transpose(1, 2)
        if self.value[0].grow is not None:
            total = total * self.value[0].end()
        return total

    def written(self) -> Tensor:
        """[M, K, V]: what each chunk adds to the state."""
        total = None
        for p, v in zip(self.value, self.v_shrunk, strict=True):
            v_end = v if p.grow is None else v * p.end()
            total = p.add(total, p.pick(self.k_end).transpose(1, 2) @ v_end)
        assert total is not None
        return total

    def scores(self) -> Tensor:
        """P [M, G*C, C]: q_t . k_s under the decay of the key axis over (s, t], 0 for s > t."""
        P = None
        for p, q, k in zip(self.key, self.q_grown, self.k_shrunk, strict=True):
            P = p.add(P, _causal(q @ k.transpose(1, 2)))
        assert P is not None
        return P

    def output(self, S: Tensor, scale: float) -> Tensor:
        """o [M, G*C, V], from the states S [M, K, V] before the chunks."""
        P, o = self.scores(), None
        for p, v in zip(self.value, self.v_shrunk, strict=True):
            part = (self.q_grown[0] @ S).baddbmm_(P, v) if o is None else p.pick(P) @ v
            o = p.add(o, p.grown(part, scale))
        assert o is not None
        return o

    def read_backward(self, d_o: Tensor, factor: float) -> Tensor:
        """[M, K, V]: gradient of the states before the chunks by the tokens that read them, of factor * d_o
        [M, G*C, V]."""
        self.d_o, self.factor = d_o, factor
        self.d_grown = self.value[0].grown(d_o, factor)
        return self.q_grown[0].transpose(1, 2) @ self.d_grown

    def backward(self, S: Tensor, D: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q, k, v, gk, gv in the layout of `Part.chunks`, from the states S before each chunk and the
        gradients D of those after it, [M, K, V]; after `read_backward`."""
        d_P, d_q_read, d_k_end, d_v, d_gv = self._values_backward(S, D)
        if self.key[0].grow is None:
            d_k_end.baddbmm_(d_P.transpose(1, 2), self.q)
            return d_q_read.baddbmm_(d_P, self.k), d_k_end, d_v, None, d_gv
        d_q = d_k = d_gk = None
        for p, q, k in zip(self.key, self.q_grown, self.k_shrunk, strict=True):
            d, end = p.pick(d_P), p.end()
            d_k_shrunk = p.pick(d_k_end) * end
            carried = (d_k_shrunk * k).sum(1)
            if d_q is None:
                d_q_grown = d_q_read.baddbmm_(d, k)
                D_end = D if self.value[0].grow is None else D * self.value[0].end()
                carried += (S * D_end).sum(2) * end[:, 0]
            else:
                d_q_grown = d @ k
            d_k_shrunk.baddbmm_(d.transpose(1, 2), q)
            d_gk = p.add(d_gk, _decay_backward(p, q * d_q_grown, k, d_k_shrunk, carried))
            d_q, d_k = p.add(d_q, p.grown(d_q_grown)), p.add(d_k, p.shrunk(d_k_shrunk))
        return d_q, d_k, d_v, d_gk, d_gv

    def _values_backward(self, S: Tensor, D: Tensor) -> tuple[Any, ...]:
        """Gradients of P, of the first piece's grown q by the states it reads, of k_end, v, gv."""
        P = self.scores()
        d_P = d_q_read = d_k_end = d_v = d_gv = None
        for p, v in zip(self.value, self.v_shrunk, strict=True):
            first = d_P is None
            d = self.d_grown if first else p.grown(p.pick(self.d_o), self.factor)
            P_p, k_end, D_end = p.pick(P), p.pick(self.k_end), p.pick(D)
            if p.grow is not None:
                D_end = D_end * p.end()
            d_P = p.add(d_P, _causal(d @ v.transpose(1, 2)))
            d_k_end = p.add(d_k_end, v @ D_end.transpose(1, 2))
            d_v_shrunk = k_end @ D_end
            if p.grow is not None:
                carried = (d_v_shrunk * v).sum(1)
                if first:
                    S_end = S if self.key[0].grow is None else S * self.key[0].end().transpose(1, 2)
                    carried += (S_end * D_end).sum(1)
                o = (self.q_grown[0] @ S).baddbmm_(P, v) if first else P_p @ v  # before its factor `grow`
            d_v_shrunk.baddbmm_(P_p.transpose(1, 2), d)
            if p.grow is not None:
                d_gv = p.add(d_gv, _decay_backward(p, o.mul_(d), v, d_v_shrunk, carried))
            d_v = p.add(d_v, p.shrunk(d_v_shrunk))
            if first:
                d_q_read = d @ S.transpose(1, 2)
        return d_P, d_q_read, d_k_end, d_v, d_gv


def _decay_backward(p: Piece, read: Tensor, x: Tensor, d_x: Tensor, carried: Tensor) -> Tensor:
    """Gradient of the log-decay, [m, C, D]. That of B_t is what t reads, `read` [m, G*C, D'], less what it writes,
    x * d_x, and at the end what is carried on, [m, D']; that of a log-decay is the sum over the B that contain it."""
    assert p.grow is not None
    m, C, D = p.grow.shape
    read = read.view(m, -1, C, x.shape[-1])
    d_B = (read.squeeze(1) if read.shape[1] == 1 else read.sum(1)).addcmul_(x, d_x, value=-1)
    d_B[:, -1] += carried
    if D == 1:
        d_B = d_B.sum(-1, keepdim=True)
    d_g = d_B.new_ones(C, C).triu_().expand(m, C, C) @ d_B
    return d_g if p.after is None else torch.where(p.after, d_g, 0.0)


def _causal(P: Tensor) -> Tensor:
    """P [M, G*C, C] with s > t set to zero, in place."""
    P.view(len(P), -1, P.shape[-1], P.shape[-1]).tril_()
    return P
