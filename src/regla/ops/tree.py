"""Pairs of tokens inside a chunk under any decay: each at its node of a binary tree.

Shape legend: m chunks, G queries per state head, C tokens per chunk, D channels.

Every pair s < t meets at exactly one level of the tree: s in the left half of a node of 2h tokens, t in its right half.
There the decay over (s, t] splits into

    exp(L_s) * exp(R_t),   L_s = sum of log-decay over (s, end of the left half],   R_t = over (end of the left half, t]

Both factors are products of at most C numbers <= 1: nothing overflows, nothing is a quotient or a difference of long
sums (a reset of -1000 costs no digit), and no factor that row t reads depends on a token after t. The next level's
factors follow from this level's by one product each. With A_ts,i = exp(decay of channel i over (s, t]) for s <= t:
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def scores(x: Tensor, y: Tensor, g: Tensor) -> Tensor:
    """P [m, G, C, C]: P_ts = sum_i x_ti A_ts,i y_si of x [m, G, C, D], y [m, C, D]; 0 for s > t. g [m, C, D]."""
    P = x.new_zeros(*x.shape[:3], x.shape[2])
    P.diagonal(0, 2, 3).copy_((x * y[:, None]).sum(-1))
    for h, R, L in _levels(g):
        _node(P, h).copy_(_outer(_halves(x, h)[:, :, :, 1] * R, _halves(y, h)[:, :, 0] * L))
    return P


def read(P: Tensor, y: Tensor, g: Tensor) -> Tensor:
    """[m, G, C, D]: sum over s of P_ts A_ts y_s."""
    out = P.diagonal(0, 2, 3)[..., None] * y[:, None]
    for h, R, L in _levels(g):
        _halves(out, h)[:, :, :, 1].addcmul_(_product(_node(P, h), (_halves(y, h)[:, :, 0] * L)[:, None]), R)
    return out


def gather(P: Tensor, x: Tensor, g: Tensor) -> Tensor:
    """[m, C, D]: sum over t and queries of P_ts A_ts x_t."""
    out = (P.diagonal(0, 2, 3)[..., None] * x).sum(1)
    for h, R, L in _levels(g):
        part = _product(_node(P, h).transpose(-1, -2), _halves(x, h)[:, :, :, 1] * R)
        _halves(out, h)[:, :, 0].addcmul_(part.sum(1), L)
    return out


def _levels(g: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(h, exp R [m, 1, nodes, h, D] of right halves, exp L [m, nodes, h, D] of left ones): views, for use before the
    next. At level h, `grow`_t spans [start of t's block of h tokens, t] and `shrink`_s (s, end of s's block]."""
    grow, shrink = g.exp(), torch.ones_like(g)
    h = 1
    while h < g.shape[1]:
        right, left = _halves(grow, h), _halves(shrink, h)
        yield h, right[:, None, :, 1], left[:, :, 0]
        left[:, :, 0] *= right[:, :, 1, -1:]
        right[:, :, 1] *= right[:, :, 0, -1:]
        h *= 2


def _halves(x: Tensor, h: int) -> Tensor:
    """[..., C, D] -> view [..., nodes, 2, h, D]."""
    return x.view(*x.shape[:-2], -1, 2, h, x.shape[-1])


def _node(P: Tensor, h: int) -> Tensor:
    """P [m, G, C, C] -> view [m, G, nodes, h, h]: rows of the right halves against columns of the left ones."""
    nodes = P.shape[-1] // (2 * h)
    return P.view(*P.shape[:2], nodes, 2, h, nodes, 2, h).diagonal(0, 2, 5)[:, :, 1, :, 0].permute(0, 1, 4, 2, 3)


def _product(A: Tensor, x: Tensor) -> Tensor:
    """A [..., R, S] @ x [..., S, D]; by columns where S is so small that batched products only cost overhead."""
    if A.shape[-1] > 2:
        return A @ x
    out = A[..., :1] * x[..., :1, :]
    for j in range(1, A.shape[-1]):
        out.addcmul_(A[..., j : j + 1], x[..., j : j + 1, :])
    return out


def _outer(x: Tensor, y: Tensor) -> Tensor:
    """x [m, G, ..., R, D] @ y [m, ..., S, D]^T; by columns where S is so small that products only cost overhead."""
    y = y[:, None]
    if y.shape[-2] > 2:
        return x @ y.transpose(-1, -2)
    return torch.cat([(x * y[..., j : j + 1, :]).sum(-1, keepdim=True) for j in range(y.shape[-2])], -1)
