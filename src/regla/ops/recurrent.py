"""The definition: one token at a time. Every other backend is tested against this file. It is also the decode step.

    S_t = Diag(exp gk_t) S_{t-1} Diag(exp gv_t) + k_t v_t^T        o_t = scale * S_t^T q_t

In float32 long half-lives drift: exp(g) is rounded to a multiple of 6e-8, so that a half-life of n tokens is off by up
to n / 2.3e7 of itself (0.4 % at 1e5, 4 % at 1e6), and from 2.3e7 on nothing decays. The C kernels, which decay token by
token, too, have the same limit; the chunked form adds logarithms first. For such gates use it, or float64.

Shape legend: B batch, T time, H state heads, G queries per state head, K key channels, V value channels.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def recurrent_gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gk: Tensor | None,
    gv: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`gated_linear_attention` token by token; see there for shapes and dtypes. Returns (o, final_state)."""
    T, H, K = k.shape[1:]
    acc = torch.promote_types(torch.float32, k.dtype)
    bounds = [0, T] if cu_seqlens is None else cu_seqlens.tolist()
    sequences = k.shape[0] * (len(bounds) - 1)
    if initial_state is None:
        initial_state = torch.zeros(sequences, H, K, v.shape[-1], device=k.device)
    states_BHKV = initial_state.to(acc).chunk(len(bounds) - 1)
    q_T, k_T, v_T = (x.to(acc).unbind(1) for x in (q, k, v))
    gk_T, gv_T = (() if g is None else g.to(acc).unbind(1) for g in (gk, gv))
    outputs, finals = [], []
    with torch.autocast(k.device.type, enabled=False):
        for S, (begin, end) in zip(states_BHKV, itertools.pairwise(bounds), strict=True):
            for t in range(begin, end):
                if gk_T:
                    S = S * gk_T[t].exp()[..., :, None]
                if gv_T:
                    S = S * gv_T[t].exp()[..., None, :]
                S = S + k_T[t][..., :, None] * v_T[t][..., None, :]
                q_BHGK = q_T[t].unflatten(1, (H, -1))
                outputs.append(scale * (q_BHGK @ S).flatten(1, 2))
            finals.append(S)
    return torch.stack(outputs, 1).to(v.dtype), torch.cat(finals)
