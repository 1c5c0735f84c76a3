"""Kernels on features, of heads of any width: what a program holds at once, or slices of it."""

from __future__ import annotations

import torch
from torch import Tensor

from regla.ops.call import Call, Gates
from regla.ops.fused import fused_attention


def in_slices(
    engine: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gk: Tensor | None,
    gv: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    most: int = 0,
) -> tuple[Tensor, Tensor]:
    """(o [B, T, HQ, V], final state [N, H, K, V]) of `regla.ops.gated_linear_attention`, whose arguments' shapes and
    dtypes these are, `most` channels of a head at once (0: all of them). A state's columns have nothing to do with one
    another, and of its rows outputs are sums."""
    K, V = k.shape[-1], v.shape[-1]
    if not most or max(K, V) <= most:
        call = Call(q, k, v, Gates(gk=gk, gv=gv), scale, cu_seqlens=cu_seqlens, S=initial_state)
        o, state, _ = fused_attention(call, engine)
        return o, state
    slices = []
    of_values = most < V
    for start in range(0, V if of_values else K, most):
        now = slice(start, start + most)
        S = initial_state
        if of_values:
            parts = q, k, v[..., now], gk, _slice(gv, now)
            S = None if S is None else S[..., now]
        else:
            parts = q[..., now], k[..., now], v, _slice(gk, now), gv
            S = None if S is None else S[..., now, :]
        slices.append(in_slices(engine, *parts, scale, S, cu_seqlens, most))
    outputs, states = zip(*slices, strict=True)
    o = torch.cat(outputs, -1) if of_values else torch.stack(outputs).sum(0)
    return o, torch.cat(states, -1 if of_values else -2)


def _slice(g: Tensor | None, now: slice) -> Tensor | None:
    """Of an axis' decays, one number for all its channels or one for each."""
    return g if g is None or g.shape[-1] == 1 else g[..., now]
