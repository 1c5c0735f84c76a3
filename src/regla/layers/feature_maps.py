"""Feature maps: how raw queries and keys enter the linear recurrence. One paper idea each."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from regla.layers.gates import Decays
from regla.ops import QKNorm, gated_linear_attention, safe_exp_attention

State = tuple[Tensor, Tensor]


class FeatureMap(nn.Module):
    """`forward` runs the recurrence on features of q [B, T, HQ, K] and k [B, T, H, K]; returns (h, (S, m) or None)."""

    def __init__(self, key_max: str, backend: str):
        super().__init__()
        self.key_max, self.backend = key_max, backend

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decays: Decays,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
        state: State | None,
        return_state: bool,
    ) -> tuple[Tensor, State | None]:
        raise NotImplementedError


class SafeExp(FeatureMap):
    """exp(q - max q), exp(k - m): bounded and non-negative (paper section 3.1); see `regla.ops.safe_exp_key`.

    together: a tensor [B, T, channels] whose channels are those of q, k and v, where there is one. qk_norm: a norm of q
    and k that goes before it.
    """

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decays: Decays,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
        state: State | None,
        return_state: bool,
        together: Tensor | None = None,
        qk_norm: QKNorm | None = None,
    ) -> tuple[Tensor, State | None]:
        return safe_exp_attention(
            q,
            k,
            v,
            decays.gk,
            decays.gv,
            refine_k=decays.refine_k,
            refine_v=decays.refine_v,
            initial_state=state,
            output_final_state=return_state,
            mask=mask,
            cu_seqlens=cu_seqlens,
            key_max=self.key_max,
            backend=self.backend,
            qk_norm=qk_norm,
            qkv=together,
            gates=decays.together,
        )


class ElementwiseMap(FeatureMap):
    """The same function `phi` of every channel of q and k; needs no stabiliser: m stays 0."""

    def phi(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decays: Decays,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
        state: State | None,
        return_state: bool,
    ) -> tuple[Tensor, State | None]:
        q, k = self.phi(q), self.phi(k)
        gk, gv = decays.logarithms()
        if mask is not None:
            real = mask[..., None, None]
            q, k, v = (torch.where(real, x, 0.0) for x in (q, k, v))
            gk, gv = (None if g is None else torch.where(real, g, 0.0) for g in (gk, gv))
        h, S = gated_linear_attention(
            q,
            k,
            v,
            gk,
            gv,
            initial_state=None if state is None else state[0],
            output_final_state=return_state,
            cu_seqlens=cu_seqlens,
            backend=self.backend,
        )
        return h, None if S is None else (S, S.new_zeros(S.shape[:2]))


class Identity(ElementwiseMap):
    """phi(x) = x."""

    def phi(self, x: Tensor) -> Tensor:
        return x


class ReLU(ElementwiseMap):
    """phi(x) = max(x, 0) (Kasai et al. 2021)."""

    def phi(self, x: Tensor) -> Tensor:
        return torch.relu(x)


class OnePlusELU(ElementwiseMap):
    """phi(x) = 1 + elu(x) (Katharopoulos et al. 2020)."""

    def phi(self, x: Tensor) -> Tensor:
        return 1 + torch.nn.functional.elu(x)


FEATURE_MAPS: dict[str, type[FeatureMap]] = {
    "safe_exp": SafeExp,
    "identity": Identity,
    "relu": ReLU,
    "one_plus_elu": OnePlusELU,
}
