"""Gated linear attention by kernels, of heads of any width: what a program holds at once, or slices of it."""

from __future__ import annotations

import torch
from torch import Tensor

from regla.ops.backends import widest
from regla.ops.fused import QKNorm, fused_attention


def fits(q: Tensor, k: Tensor, v: Tensor, gk: Tensor | None, gv: Tensor | None) -> bool:
    """Whether the GPU's kernels take whole heads."""
    return max(k.shape[-1], v.shape[-1]) <= widest(q, k, v, gk, gv)


def with_kernels(
    engine: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gk: Tensor | None,
    gv: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(o [B, T, HQ, V], final state [N, H, K, V]) of `regla.ops.gated_linear_attention`, whose arguments' shapes and
    dtypes these are. Heads wider than the kernels take are cut: a state's columns have nothing to do with one another,
    and of its rows outputs are sums."""
    K, V = k.shape[-1], v.shape[-1]
    if engine == "native" or fits(q, k, v, gk, gv):
        inputs = q, k, v, gk, gv, None, None, None, cu_seqlens, initial_state, None, scale
        o, state, _ = fused(engine, *inputs, safe_exp=False)
        return o, state
    most, slices = widest(q, k, v, gk, gv), []
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
        slices.append(with_kernels(engine, *parts, scale, S, cu_seqlens))
    outputs, states = zip(*slices, strict=True)
    o = torch.cat(outputs, -1) if of_values else torch.stack(outputs).sum(0)
    return o, torch.cat(states, -1 if of_values else -2)


def fused(
    engine: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gk: Tensor | None,
    gv: Tensor | None,
    refine_k: Tensor | None,
    refine_v: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    before: Tensor | None,
    scale: float,
    *,
    safe_exp: bool,
    key_max: str = "decay",
    qk_norm: QKNorm | None = None,
    qkv: Tensor | None = None,
    gates: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`fused_attention`, with decays of one number for all channels given to each."""
    K, V = k.shape[-1], v.shape[-1]
    gk, rk, gv, rv = (
        None if x is None else x.expand(*x.shape[:3], D) for x, D in ((gk, K), (refine_k, K), (gv, V), (refine_v, V))
    )
    return fused_attention(
        q,
        k,
        v,
        gk,
        rk,
        gv,
        rv,
        mask,
        cu_seqlens,
        None if initial_state is None else initial_state.float().contiguous(),
        before,
        scale=scale,
        safe_exp=safe_exp,
        decaying=key_max == "decay",
        engine=engine,
        norm=qk_norm,
        qkv=qkv,
        gates=gates,
    )


def _slice(g: Tensor | None, now: slice) -> Tensor | None:
    """Of an axis' decays, one number for all its channels or one for each."""
    return g if g is None or g.shape[-1] == 1 else g[..., now]
