"""The definition: one token at a time. Every other backend is tested against this file. It is also the decode step.

    S_t = Diag(exp gk_t) S_{t-1} Diag(exp gv_t) + k_t v_t^T        h_t = scale * S_t^T q_t

Shape legend: B batch, T time, H state heads, G queries per state head, K key channels, V value channels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def recurrent_gated_linear_attention(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    gk: Tensor | None,
    gv: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`gated_linear_attention` token by token; see there for shapes and dtypes. Returns (o, final_state)."""
    if cu_seqlens is not None:
        return _each_sequence(q_BTHK, k_BTHK, v_BTHV, gk, gv, scale, initial_state, cu_seqlens)
    B, T, H, K = k_BTHK.shape
    acc = torch.promote_types(torch.float32, k_BTHK.dtype)
    S = initial_state
    if S is None:
        S = torch.zeros(B, H, K, v_BTHV.shape[-1], device=k_BTHK.device)
    S = S.to(acc)
    q, k, v, gk, gv = ([None] * T if x is None else x.to(acc).unbind(1) for x in (q_BTHK, k_BTHK, v_BTHV, gk, gv))
    outputs = []
    with torch.autocast(k_BTHK.device.type, enabled=False):
        for t in range(T):
            if gk[t] is not None:
                S = S * gk[t].exp()[..., :, None]
            if gv[t] is not None:
                S = S * gv[t].exp()[..., None, :]
            S = S + k[t][..., :, None] * v[t][..., None, :]
            q_BHGK = q[t].view(B, H, -1, K)
            outputs.append(scale * (q_BHGK @ S).flatten(1, 2))
    return torch.stack(outputs, 1).to(v_BTHV.dtype), S


def _each_sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gk: Tensor | None,
    gv: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor,
) -> tuple[Tensor, Tensor]:
    bounds = cu_seqlens.tolist()
    outputs, states = [], []
    for n, (lo, hi) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        parts = [None if x is None else x[:, lo:hi] for x in (q, k, v, gk, gv)]
        S = None if initial_state is None else initial_state[n : n + 1]
        o, S = recurrent_gated_linear_attention(*parts, scale, S, None)  # type: ignore[arg-type]
        outputs.append(o)
        states.append(S)
    return torch.cat(outputs, 1), torch.cat(states)
