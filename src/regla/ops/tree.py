"""One slab of chunks: every pair of tokens inside a chunk, by a tree, and what chunks give to and take from the state.

Shape legend: B batch, T time, H state heads, G queries per state head, K key channels, V value channels, C tokens per
chunk, n chunks of the slab, M = B*H*n blocks.

Inside a chunk every pair s < t meets at exactly one level of a binary tree: s in the left half of a node of 2h tokens,
t in its right half. There the decay over (s, t] splits into

    exp(L_s) * exp(R_t),   L_s = sum of log-decay over (s, end of the left half],   R_t = over (end of the left half, t]

Both factors are products of at most C numbers <= 1: nothing overflows, nothing is a quotient or a difference of long
sums (a reset of -1000 costs no digit), no bound on the gates is needed, and no factor that row t reads depends on a
token after t, so causality holds to the last bit. The next level's factors follow from this level's by one product
each. Key-axis decay scales q and k before the scores, value-axis decay scales v and the output.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def blocks(x: Tensor, lo: int, hi: int, C: int, H: int, acc: torch.dtype) -> Tensor:
    """[B, T, H*G, D] -> [M, C, G, D], M = B*H*n, for chunks lo..hi."""
    B, _, HG, D = x.shape
    x = x[:, lo * C : hi * C].reshape(B, hi - lo, C, H, HG // H, D)
    return x.permute(0, 3, 1, 2, 4, 5).to(acc).contiguous().view(-1, C, HG // H, D)


def put(x: Tensor, blocks: Tensor, lo: int, hi: int, C: int) -> None:
    """Inverse of `blocks`: writes [M, C, G, D] (or [M, C, D]) into x[:, lo*C : hi*C], [B, T, H*G, D]."""
    B, _, HG, D = x.shape
    G = blocks.shape[2] if blocks.ndim == 4 else 1
    blocks = blocks.view(B, HG // G, hi - lo, C, G, D).permute(0, 2, 3, 1, 4, 5)
    x[:, lo * C : hi * C].view(B, hi - lo, C, HG // G, G, D).copy_(blocks)


class _Decay:
    """The factors exp(R), exp(L) of one log-decay g [M, C, D] (D = channels or 1), level by level.

    At level h, `grow`_t spans [start of t's block of h tokens, t] and `shrink`_s spans (s, end of s's block]. They are
    products: each is used once for an output, so that their rounding (2e-6 at most over 64 tokens) does not build up.
    What is carried from chunk to chunk, `total`, comes from the sum of logarithms.
    """

    def __init__(self, g: Tensor):
        self.g = g
        self.total = g.sum(1).exp()  # [M, D]
        self.grow = self.shrink = g  # set by `levels`

    def levels(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield (h, exp R [M, nodes, h, D] of right halves, exp L of left halves), views to be used before the next
        one; afterwards `grow` and `shrink` span the chunk."""
        _M, C, _D = self.g.shape
        self.grow, self.shrink = self.g.exp(), torch.ones_like(self.g)
        h = 1
        while h < C:
            grow, shrink = _halves(self.grow, h), _halves(self.shrink, h)
            yield h, grow[:, :, 1], shrink[:, :, 0]
            shrink[:, :, 0] *= grow[:, :, 1, -1:]
            grow[:, :, 1] *= grow[:, :, 0, -1:]
            h *= 2

    def backward(self, levels: list[tuple[Tensor, Tensor]], d_grow: Tensor, d_shrink: Tensor) -> Tensor:
        """Gradient of g from those of log grow and log shrink, [M, C, D] over the chunk (overwritten) and
        [M, nodes, h, D] at each level: `levels` transposed. Sums only: a gate's gradient that is tiny stays exact."""
        h = self.g.shape[1]
        for d_right, d_left in reversed(levels):
            h //= 2
            grow, shrink = _halves(d_grow, h), _halves(d_shrink, h)
            grow[:, :, 0, -1] += grow[:, :, 1].sum(2)
            grow[:, :, 1, -1] += shrink[:, :, 0].sum(2)
            grow[:, :, 1] += d_right
            shrink[:, :, 0] += d_left
        return d_grow


class Slab:
    """Chunks lo..hi of all heads: the pieces of the forward pass and their gradients.

    `scores` and `intra`, or `local_backward`, come first: they leave the decays' factors over whole chunks behind.
    """

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
        self.q = blocks(q, lo, hi, C, H, acc)  # [M, C, G, K]
        self.k, self.v = (blocks(x, lo, hi, C, H, acc)[:, :, 0] for x in (k, v))  # [M, C, K], [M, C, V]
        self.gk, self.gv = (None if g is None else _Decay(blocks(g, lo, hi, C, H, acc)[:, :, 0]) for g in (gk, gv))

    def scores(self) -> Tensor:
        """P [M, C, G, C]: P[t, g, s] = sum_i q[t,g,i] k[s,i] exp(key-axis decay over (s, t]); right for s <= t only."""
        M, C, G, K = self.q.shape
        if self.gk is None:
            return (self.q.view(M, C * G, K) @ self.k.transpose(1, 2)).view(M, C, G, C)
        P = self.q.new_zeros(M, C, G, C)
        _diagonal(P).copy_((self.q * self.k[:, :, None]).sum(-1))
        for h, R, L in self.gk.levels():
            rows, columns = _right(self.q, h) * R[..., None, :], _halves(self.k, h)[:, :, 0] * L
            _node(P, h).copy_(_outer(rows.flatten(2, 3), columns))
        return P

    def intra(self, P: Tensor) -> Tensor:
        """[M, C, G, V]: o_t = sum_{s <= t} P[t, s] exp(value-axis decay over (s, t]) v_s."""
        M, C, G, _ = P.shape
        if self.gv is None:
            return (_tril(P).view(M, C * G, C) @ self.v).view(M, C, G, -1)
        o = _diagonal(P)[..., None] * self.v[:, :, None]
        for h, R, L in self.gv.levels():
            part = _matmul(_node(P, h), _halves(self.v, h)[:, :, 0] * L)
            right = _right(o, h)
            right.addcmul_(part.view(right.shape), R[..., None, :])
        return o

    def written(self) -> Tensor:
        """[B, H, n, K, V]: what each chunk adds to the state."""
        k = self.k if self.gk is None else self.k * self.gk.shrink
        v = self.v if self.gv is None else self.v * self.gv.shrink
        return (k.transpose(1, 2) @ v).view(*self.lead, k.shape[-1], v.shape[-1])

    def add_from_state(self, out: Tensor, S: Tensor) -> None:
        """Add to out [M, C, G, V] what the states S [B, H, n, K, V] before the chunks give."""
        M, C, G, K = self.q.shape
        q = self.q if self.gk is None else self.q * self.gk.grow[:, :, None]
        if self.gv is None:
            out.view(M, C * G, -1).baddbmm_(q.view(M, C * G, K), S.reshape(M, K, -1))
        else:
            out.addcmul_((q.view(M, C * G, K) @ S.reshape(M, K, -1)).view_as(out), self.gv.grow[:, :, None])

    def decay(self, S: Tensor, n: int) -> Tensor:
        """S [B, H, K, V] decayed over chunk n."""
        if self.gk is not None:
            S = S * self.gk.total.view(*self.lead, -1)[:, :, n, :, None]
        if self.gv is not None:
            S = S * self.gv.total.view(*self.lead, -1)[:, :, n, None, :]
        return S

    def local_backward(self, d_out: Tensor) -> None:
        """Gradients of the pairs inside chunks, from d_out [M, C, G, V], kept for `state_backward` to complete."""
        d_P, self.d_v, self.d_gv = self._intra_backward(self.scores(), d_out)
        self.d_q, self.d_k, self.d_gk = self._scores_backward(d_P)

    def read_backward(self, d_out: Tensor) -> Tensor:
        """Gradient of the states before the chunks by the tokens that read them, [B, H, n, K, V]."""
        M, C, G, K = self.q.shape
        self.d_read = d_out if self.gv is None else d_out * self.gv.grow[:, :, None]
        self.grown_q = self.q if self.gk is None else self.q * self.gk.grow[:, :, None]
        d_S = self.grown_q.view(M, C * G, K).transpose(1, 2) @ self.d_read.view(M, C * G, -1)
        return d_S.view(*self.lead, K, -1)

    def state_backward(self, S: Tensor, D: Tensor) -> tuple[Tensor | None, ...]:
        """All gradients (q, k, v, gk, gv) in block layout, from the states before each chunk and the gradients D of
        those after it, [B, H, n, K, V]."""
        M, C, G, K = self.q.shape
        S, D = S.reshape(M, K, -1), D.reshape(M, K, -1)
        decayed_k = self.k if self.gk is None else self.k * self.gk.shrink
        decayed_v = self.v if self.gv is None else self.v * self.gv.shrink
        d_grown_q = (self.d_read.view(M, C * G, -1) @ S.transpose(1, 2)).view_as(self.q)
        d_decayed_k, d_decayed_v = decayed_v @ D.transpose(1, 2), decayed_k @ D
        d_gk = d_gv = None
        if self.gk is None:
            self.d_q += d_grown_q
            self.d_k += d_decayed_k
        else:
            self.d_q.addcmul_(d_grown_q, self.gk.grow[:, :, None])
            self.d_k.addcmul_(d_decayed_k, self.gk.shrink)
            d_gk = self._decay_backward(
                self.gk, self.d_gk, d_grown_q.mul_(self.grown_q), decayed_k * d_decayed_k, self._carried(S, D).sum(2)
            )
        if self.gv is None:
            self.d_v += d_decayed_v
        else:
            self.d_v.addcmul_(d_decayed_v, self.gv.shrink)
            read = (self.grown_q.view(M, C * G, K) @ S).view_as(self.d_read)
            d_gv = self._decay_backward(
                self.gv, self.d_gv, read.mul_(self.d_read), decayed_v * d_decayed_v, self._carried(S, D).sum(1)
            )
        return self.d_q, self.d_k, self.d_v, d_gk, d_gv

    def _carried(self, S: Tensor, D: Tensor) -> Tensor:
        """What the decay over a whole chunk is worth, [M, K, V]."""
        carried = S * D
        if self.gk is not None:
            carried *= self.gk.total[:, :, None]
        if self.gv is not None:
            carried *= self.gv.total[:, None, :]
        return carried

    @staticmethod
    def _decay_backward(
        decay: _Decay, levels: list[tuple[Tensor, Tensor]], read: Tensor, write: Tensor, carried: Tensor
    ) -> Tensor:
        d_grow, d_shrink = _fit(_sum_queries(read, 2), decay.g), _fit(write, decay.g)
        d_grow[:, -1] += _fit(carried, decay.g)
        return decay.backward(levels, d_grow, d_shrink)

    def _intra_backward(self, P: Tensor, d_out: Tensor) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
        M, C, G, _ = P.shape
        if self.gv is None:
            d_out = d_out.view(M, C * G, -1)
            d_P = _tril((d_out @ self.v.transpose(1, 2)).view(M, C, G, C))
            return d_P, _tril(P).view(M, C * G, C).transpose(1, 2) @ d_out, []
        d_P = torch.zeros_like(P)
        _diagonal(d_P).copy_((d_out * self.v[:, :, None]).sum(-1))
        d_v = _sum_queries(_diagonal(P)[..., None] * d_out, 2)
        d_gv = []
        for h, R, L in self.gv.levels():
            node = _node(P, h)
            columns = _halves(self.v, h)[:, :, 0] * L
            rows = _right(d_out, h) * R[..., None, :]
            flat = rows.flatten(2, 3)
            d_columns = _matmul(node.transpose(2, 3), flat)
            _node(d_P, h).copy_(_outer(flat, columns))
            _halves(d_v, h)[:, :, 0].addcmul_(d_columns, L)
            d_R = _sum_queries(rows.mul_(_matmul(node, columns).view(rows.shape)), 3)
            d_gv.append((_fit(d_R, self.gv.g), _fit(columns.mul_(d_columns), self.gv.g)))
        return d_P, d_v, d_gv

    def _scores_backward(self, d_P: Tensor) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
        M, C, G, K = self.q.shape
        if self.gk is None:
            d_P = d_P.view(M, C * G, C)
            return (d_P @ self.k).view_as(self.q), d_P.transpose(1, 2) @ self.q.view(M, C * G, K), []
        on_diagonal = _diagonal(d_P)[..., None]
        d_q = on_diagonal * self.k[:, :, None]
        d_k = _sum_queries(on_diagonal * self.q, 2)
        d_gk = []
        for h, R, L in self.gk.levels():
            node = _node(d_P, h)
            columns = _halves(self.k, h)[:, :, 0] * L
            rows = _right(self.q, h) * R[..., None, :]
            d_rows = _matmul(node, columns).view(rows.shape)
            d_columns = _matmul(node.transpose(2, 3), rows.flatten(2, 3))
            _right(d_q, h).addcmul_(d_rows, R[..., None, :])
            _halves(d_k, h)[:, :, 0].addcmul_(d_columns, L)
            d_R = _sum_queries(rows.mul_(d_rows), 3)
            d_gk.append((_fit(d_R, self.gk.g), _fit(columns.mul_(d_columns), self.gk.g)))
        return d_q, d_k, d_gk


def _right(x: Tensor, h: int) -> Tensor:
    """x [M, C, G, D] -> view [M, nodes, h, G, D] of the right halves."""
    M, _, G, D = x.shape
    return x.view(M, -1, 2, h, G, D)[:, :, 1]


def _sum_queries(x: Tensor, dim: int) -> Tensor:
    return x.squeeze(dim) if x.shape[dim] == 1 else x.sum(dim)


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
