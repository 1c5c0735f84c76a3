"""The safe exponential feature map in its exact causal form (paper section 3.1, equations in docs/math.md).

The features of the keys are taken relative to a causal stabiliser m_t, and the state carries the change of unit: a
decay of exp(m_{t-1} - m_t) on every channel. m is a unit, as a common exponent is: it takes no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from regla.ops.call import masked, owners

#: Stands for "no key yet": far below any key, and finite, because inf - inf is not a number.
NO_KEY = -1e30

#: The features are held 2^48 = e^33.3 above their unit exp(m_t). m comes down by what the slowest channel of each token
#: decays, and since that is now one channel, now another, it stays above what the state really holds after an outlier
#: key: without the lift, the features of ordinary keys behind an outlier of +88 would fall below float32's smallest
#: normal number, and lose digits for as long as m takes to come down. A power of two rounds nothing.
LIFT = 48

KEY_MAX = ("decay", "running", "sequence")


def variance_reduction(K: int) -> float:
    """The factor 1 / (e sqrt(K (e^2 - 1))): for standard normal logits it makes exp(q).exp(k) over K channels vary
    by 1 (paper section 3.1). It drops out behind a scale-free normalisation."""
    return 1 / (math.e * math.sqrt(K * (math.e**2 - 1)))


def safe_exp_query(q: Tensor) -> Tensor:
    """phi_q(q)_i = exp(q_i - max_j q_j), in (0, 1]: per token and head (paper section 3.1).

    Args:
        q: query logits [..., K], any floating dtype.

    Returns:
        Features [..., K], at least float32. The maximum takes no gradient: it is a factor common to the whole output
        of a head, which a scale-free normalisation removes.
    """
    q = q.to(torch.promote_types(q.dtype, torch.float32))
    return (q - q.detach().amax(-1, keepdim=True)).exp()


def unit_safe_exp(x: Tensor) -> Tensor:
    """phi(x) = e / |e|_2, e_i = exp(x_i - max_j x_j), over the last axis: positive, of length 1, and without a maximum
    over time.

    Args:
        x: logits [..., K], any floating dtype.

    Returns:
        Features [..., K] in the dtype of x, computed in float32 at least.
    """
    return torch.nn.functional.normalize(safe_exp_query(x), dim=-1).to(x.dtype)


def unit_silu(x: Tensor) -> Tensor:
    """phi(x) = silu(x) / |silu(x)|_2 over the last axis: of length 1, of either sign.

    Args:
        x: logits [..., K], any floating dtype.

    Returns:
        Features [..., K] in the dtype of x, computed in float32 at least.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.nn.functional.normalize(torch.nn.functional.silu(wide), dim=-1).to(x.dtype)


#: Maps of each token's q or k to features of length 1, which the GPU's kernels of the delta rule form themselves.
UNIT_MAPS: dict[str, Callable[[Tensor], Tensor]] = {"unit_safe_exp": unit_safe_exp, "unit_silu": unit_silu}


def safe_exp_key(
    k: Tensor,
    log_decay: Tensor | None = None,
    *,
    key_max: str = "decay",
    initial_max: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """phi_k(k_t)_i = exp(k_{t,i} - m_t), in (0, 1], with a stabiliser m_t that looks at no later key.

        "decay":    m_t = max(m_{t-1} + log_decay_t, max_i k_{t,i})   recovers as an outlier is forgotten
        "running":  m_t = max(m_{t-1}, max_i k_{t,i})                 never comes down
        "sequence": m_t = max over the whole sequence                 the paper's literal form; not causal

    Args:
        k: key logits [B, T, H, K], any floating dtype.
        log_decay: [B, T, H], the slowest channel's log-decay (its maximum over channels), <= 0; None means 0.
        key_max: which stabiliser.
        initial_max: m before the first token [N, H]; None means that there was no key yet.
        mask: [B, T] bool, True for real tokens: a padding token leaves m as it is and has zero features.
        cu_seqlens: [N + 1] boundaries of packed sequences (B = 1): m restarts at each.

    Returns:
        Features [B, T, H, K]; the change of unit m_{t-1} - m_t [B, T, H], to be added to every channel's log-decay;
        and the last m [N, H] (`NO_KEY` where a sequence has had no token). All at least float32.
    """
    m, unit, final = key_stabiliser(
        k, log_decay, key_max=key_max, initial_max=initial_max, mask=mask, cu_seqlens=cu_seqlens
    )
    features = (k.to(m.dtype) - m[..., None]).exp()
    return features if mask is None else masked(features, mask), unit, final


def lifted_key_features(k: Tensor, m: Tensor, mask: Tensor | None) -> Tensor:
    """2^LIFT exp(k_t - m_t), [B, T, H, K]: the same features where the range of float32 is wider, see `LIFT`."""
    half = ((k.to(m.dtype) - m[..., None]) / 2).exp() * 2.0 ** (LIFT // 2)  # exp(k - m) by itself may underflow
    return half.square() if mask is None else masked(half.square(), mask)


@torch.no_grad()
def lowering(h: Tensor) -> Tensor:
    """The factor [..., 1] that takes outputs h [..., V] of lifted features back: 2^-LIFT.

    An output that would vanish is held at 2^-60 instead. That is what follows an outlier key: its size says nothing,
    and behind a scale-free normalisation its direction is as good as any other's. The factor takes no gradient.
    """
    smallest = 2.0 ** (LIFT - 60)
    largest = h.detach().abs().amax(-1, keepdim=True).clamp_min(2.0**-100)
    return (smallest / largest).clamp_min(1.0) * 2.0**-LIFT


@torch.no_grad()
def key_stabiliser(
    k: Tensor,
    log_decay: Tensor | None,
    *,
    key_max: str,
    initial_max: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """m [B, T, H], m_{t-1} - m_t [B, T, H] and the last m [N, H] of `safe_exp_key`."""
    B, T, H, _ = k.shape
    top = k.detach().to(torch.promote_types(k.dtype, torch.float32)).amax(-1)
    step = torch.zeros_like(top) if log_decay is None or key_max != "decay" else log_decay.to(top.dtype)
    if mask is not None:
        top = top.masked_fill(~mask[..., None], NO_KEY)
        step = step.masked_fill(~mask[..., None], 0.0)
    sequences = B if cu_seqlens is None else cu_seqlens.numel() - 1
    before = top.new_full((sequences, H), NO_KEY) if initial_max is None else initial_max.to(top.dtype)
    tokens = torch.arange(T, device=k.device)
    if cu_seqlens is None:
        opens, first = tokens == 0, before[:, None]
    else:
        owner = owners(cu_seqlens, T)
        opens, first = tokens == cu_seqlens[owner], before[owner][None]
    opens = opens[None, :, None]
    if key_max != "sequence":
        m = _decaying_maximum(top, step, torch.where(opens, first, NO_KEY), opens)
    elif cu_seqlens is None:
        m = torch.maximum(top.amax(1, keepdim=True), first).expand(B, T, H)
    else:
        m = before.scatter_reduce(0, owner[:, None].expand(T, H), top[0], "amax")[owner][None]
    previous = torch.where(opens, first, m.roll(1, 1))
    if cu_seqlens is None:
        return m, previous - m, m[:, -1]
    ends, is_empty = cu_seqlens[1:], cu_seqlens.diff() == 0
    return m, previous - m, torch.where(is_empty[:, None], before, m[0, (ends - 1).clamp_min(0)])


def _decaying_maximum(top: Tensor, step: Tensor, before: Tensor, opens: Tensor) -> Tensor:
    """m_t = max(m_{t-1} + step_t, top_t), restarting from `before` where `opens`; all [B, T, H].

    A scan by doubling over pairs (sum of steps, maximum): log2(T) passes, no long sums that would cost digits.
    """
    m = torch.where(opens, torch.maximum(before + step, top), top)
    step = torch.where(opens, -torch.inf, step)  # nothing from before the opening gets past it
    T, d = top.shape[1], 1
    while d < T:
        earlier_m = torch.nn.functional.pad(m[:, :-d], (0, 0, d, 0), value=NO_KEY)
        earlier_step = torch.nn.functional.pad(step[:, :-d], (0, 0, d, 0))
        m, step = torch.maximum(earlier_m + step, m), earlier_step + step
        d *= 2
    return m
