"""The equations in float64 and in absolute units, without a stabiliser: what every form must reproduce.

exp(100) squared, times any decay, is still far inside float64's range, so nothing here needs care.
"""

import torch
from torch import Tensor


def gla(q, k, v, gk, gv, scale, S):
    """S_t = Diag(exp gk) S_{t-1} Diag(exp gv) + k v^T, o_t = scale S^T q; all [B, T, H, D], S [B, H, K, V]."""
    _B, T, H, _ = k.shape
    o = []
    for t in range(T):
        if gk is not None:
            S = gk[:, t].exp()[..., :, None] * S
        if gv is not None:
            S = S * gv[:, t].exp()[..., None, :]
        S = S + k[:, t, :, :, None] * v[:, t, :, None, :]
        o.append(scale * torch.einsum("bhgk,bhkv->bhgv", q[:, t].unflatten(1, (H, -1)), S).flatten(1, 2))
    return torch.stack(o, 1), S


def log_refined_gate(a, c):
    """log F by the paper's formula, arranged so that float64 loses nothing that the tests look at."""
    one_minus_g, g = torch.sigmoid(-a), torch.sigmoid(a)
    r, one_minus_r = torch.sigmoid(c), torch.sigmoid(-c)
    u = one_minus_g * (one_minus_g + 2 * one_minus_r * g)
    near_zero = torch.nn.functional.logsigmoid(a) + (g + 2 * r * one_minus_g).clamp_min(1e-300).log()
    return torch.where(u < 0.3, torch.log1p(-u.clamp_max(0.5)), near_zero)


def regla(q, k, v, gk, gv, S, m, mask=None):
    """The paper's h_t (up to a factor per token and head), and (S, m) with m from its recursion, token by token.

    S, m: the state before the first token, S in units of 2^-48 exp(m). None: none.
    """
    B, T, H, K = k.shape
    unit = 2.0**-48  # of the states that regla.ops hands out
    absolute = torch.zeros(B, H, K, v.shape[-1], dtype=k.dtype) if S is None else S * unit * m.exp()[..., None, None]
    m = torch.full((B, H), -1e30, dtype=k.dtype) if m is None else m
    features = k.exp()
    real = torch.ones(B, T, dtype=torch.bool) if mask is None else mask
    features = torch.where(real[..., None, None], features, 0.0)
    gk, gv = (None if g is None else torch.where(real[..., None, None], g, 0.0) for g in (gk, gv))
    h, absolute = gla((q - q.detach().amax(-1, keepdim=True)).exp(), features, v, gk, gv, 1.0, absolute)
    with torch.no_grad():
        for t in range(T):
            slowest = sum(g[:, t].amax(-1) for g in (gk, gv) if g is not None)
            m = torch.where(real[:, t, None], torch.maximum(m + slowest, k[:, t].amax(-1)), m)
    return h, absolute / unit * (-m).exp()[..., None, None], m


def per_token(x: Tensor, reference: Tensor) -> float:
    """Worst relative error over tokens and heads: ||x - reference|| / ||reference|| over the last axis."""
    error = (x.double() - reference).norm(dim=-1) / reference.norm(dim=-1).clamp_min(1e-300)
    return error.max().item()


def overall(x: Tensor, reference: Tensor) -> float:
    """||x - reference|| / ||reference|| of a whole tensor."""
    return ((x.double() - reference).norm() / reference.norm().clamp_min(1e-300)).item()
