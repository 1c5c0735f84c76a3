"""What an operation is given, in bundles, and the one order in which it travels from a layer to a kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from regla.ops.gates import log_refined_gate


class QKNorm(NamedTuple):
    """The RMS norm of queries and keys over a head's channels: x / sqrt(mean(x^2) + eps) times q or k, [K] each."""

    q: Tensor
    k: Tensor
    eps: float


class HeadNorm(NamedTuple):
    """A norm over each head's output: weight [HQ, V], with a bias [HQ, V] the layer norm, else the RMS norm
    (`regla.ops.output_norm`)."""

    weight: Tensor
    bias: Tensor | None
    eps: float


class Gates(NamedTuple):
    """What the state decays by, and how much of a token is written.

    gk, gv: natural log-decays of the key axis [B, T, H, K or 1] and of the value axis [B, T, H, V or 1]; None: none.
    rk, rv: logits of the refining gate, as gk and gv, which then hold the logits of the gate they refine.
    write: a factor on what is written, [B, T, H, 1]; None: 1.
    packed: a tensor of which gk, rk, gv and rv are parts, where there is one. It only says where they lie in memory:
        the four tensors are what counts, and one that is no part of it travels by itself.
    """

    gk: Tensor | None = None
    rk: Tensor | None = None
    gv: Tensor | None = None
    rv: Tensor | None = None
    write: Tensor | None = None
    packed: Packed | None = None

    def logarithms(self) -> tuple[Tensor | None, Tensor | None]:
        """The log-decays of both axes, those of refined gates computed from their logits."""
        gk, rk, gv, rv, *_ = self
        gk = gk if gk is None or rk is None else log_refined_gate(gk, rk)
        gv = gv if gv is None or rv is None else log_refined_gate(gv, rv)
        return gk, gv


class Forms(NamedTuple):
    """What of a call of the delta rule is logits still.

    features: the map of unit length that q and k are the logits of, a key of `regla.ops.features.UNIT_MAPS`; "given":
        they are features.
    beta_max: beta is beta_max * sigmoid of what is given; 0: it is as given.
    """

    features: str = "given"
    beta_max: float = 0.0


class Packed:
    """Tensors [B, T, heads, channels] that are views, side by side, of one tensor [B, T, all channels].

    Kernels take such a tensor as it is, and its gradient leaves them as one. `parts` are made here and nowhere else:
    whoever has one of them has a part of `whole`. What has been computed from a part is another tensor, and travels by
    itself.

    Args:
        whole: [B, T, channels].
        heads: (heads, channels of each) of every part, in order.
    """

    def __init__(self, whole: Tensor, heads: Sequence[tuple[int, int]]):
        self.whole = whole
        views = whole.split([H * D for H, D in heads], -1)
        self.parts = [view.unflatten(-1, size) for view, size in zip(views, heads, strict=True)]


class Call(NamedTuple):
    """One call of an operation. Shapes: B batch, T time, HQ query heads, H state heads, N sequences (B, or those packed
    into one row).

    q [B, T, HQ, K], k [B, T, H, K], v [B, T, H, V]: features, or with `key_max` the logits of the safe exponential.
    mask [B, T] bool: True for real tokens. cu_seqlens [N + 1]: boundaries of packed sequences.
    S [N, H, K, V], m [N, H]: the state before the first token; m only with `key_max`.
    key_max: how the stabiliser of the safe exponential runs; None: q and k are features already.
    qk_norm: a norm of q and k that goes before everything else.
    qkv: a tensor of which q, k and v are parts, where there is one; see `Gates.packed`.
    keep_state: whether the state after the last token is asked for.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    gates: Gates
    scale: float
    key_max: str | None = None
    mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    S: Tensor | None = None
    m: Tensor | None = None
    qk_norm: QKNorm | None = None
    qkv: Packed | None = None
    keep_state: bool = True

    def tensors(self) -> list[Tensor]:
        """Those that gradients may flow to."""
        weights = () if self.qk_norm is None else self.qk_norm[:2]
        return [x for x in (self.q, self.k, self.v, *self.gates[:5], self.S, *weights) if x is not None]


def owners(cu_seqlens: Tensor, T: int) -> Tensor:
    """[T], the number of the packed sequence of each of T tokens; cu_seqlens: [N + 1] int, their boundaries."""
    return torch.searchsorted(cu_seqlens[1:].contiguous(), torch.arange(T, device=cu_seqlens.device), right=True)


def masked(x: Tensor, mask: Tensor, fill: float = 0.0) -> Tensor:
    """x [B, T, heads, channels] with `fill` at padding: by choice, not by product, since 0 * nan is nan."""
    return torch.where(mask[..., None, None], x, fill)
