"""The definition of the gated delta rule: one token at a time. It is also the decode step.

    S'_t = Diag(exp gk_t) S_{t-1}        u_t = beta_t (v_t - S'_t^T k_t)        S_t = S'_t + k_t u_t^T
    o_t = scale * S_t^T q_t

Shape legend: B batch, T time, H state heads, G queries per state head, K key channels, V value channels.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    gk: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`gated_delta_attention` token by token; see there for shapes and dtypes. Returns (o, final_state)."""
    T, H, K = k.shape[1:]
    acc = torch.promote_types(torch.float32, k.dtype)
    bounds = [0, T] if cu_seqlens is None else cu_seqlens.tolist()
    sequences = k.shape[0] * (len(bounds) - 1)
    if initial_state is None:
        initial_state = torch.zeros(sequences, H, K, v.shape[-1], device=k.device)
    states_BHKV = initial_state.to(acc).chunk(len(bounds) - 1)
    q_T, k_T, v_T, beta_T = (x.to(acc).unbind(1) for x in (q, k, v, beta))
    gk_T = () if gk is None else gk.to(acc).unbind(1)
    outputs, finals = [], []
    with torch.autocast(k.device.type, enabled=False):
        for S, (begin, end) in zip(states_BHKV, itertools.pairwise(bounds), strict=True):
            for t in range(begin, end):
                if gk_T:
                    S = S * gk_T[t].exp()[..., :, None]
                k_BH1K = k_T[t][..., None, :]
                u_BH1V = beta_T[t][..., None, None] * (v_T[t][..., None, :] - k_BH1K @ S)
                S = S + k_BH1K.mT * u_BH1V
                outputs.append(scale * (q_T[t].unflatten(1, (H, -1)) @ S).flatten(1, 2))
            finals.append(S)
    return torch.stack(outputs, 1).to(v.dtype), torch.cat(finals)
