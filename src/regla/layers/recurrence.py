"""The update rule of a mixer: from queries, keys, values and gates to the normalised and gated output."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from regla.layers.feature_maps import FeatureMap
from regla.layers.norms import head_norm, norm_and_gate, output_gated
from regla.ops.additive import attend
from regla.ops.call import Call, Gates, Packed, QKNorm
from regla.ops.features import variance_reduction

Memory = tuple[Tensor, Tensor]


class Tokens(NamedTuple):
    """What the tokens of a call bring, and how they lie: q [B, T, HQ, K], k [B, T, H, K], v [B, T, H, V], the gates, a
    norm of q and k that is still to be done, the tensor of which q, k and v are parts, mask and cu_seqlens."""

    q: Tensor
    k: Tensor
    v: Tensor
    gates: Gates
    qk_norm: QKNorm | None = None
    qkv: Packed | None = None
    mask: Tensor | None = None
    cu_seqlens: Tensor | None = None


class Past(NamedTuple):
    """(S [N, H, K, V], m [N, H]) before the first token, or None; whether the state after the last is asked for; and
    whether S and m may be overwritten with it."""

    state: Memory | None
    keep: bool
    overwrite: bool = False


class Output(NamedTuple):
    """What comes behind the recurrence: the norm, and the logits [B, T, HQ V] and activation of the output gate."""

    norm: nn.Module
    gate: Tensor | None
    activation: str | None


class AdditiveRule(nn.Module):
    """S_t = Diag(a_t) S_{t-1} Diag(b_t) + phi(k_t) v_t^T, h_t = scale S_t^T phi(q_t) (paper equations 3-13)."""

    def __init__(self, feature_map: FeatureMap, head_dim: int, backend: str):
        super().__init__()
        self.scale = head_dim**-0.5 if feature_map.key_max is None else variance_reduction(head_dim)
        self.backend = backend

    def forward(self, feature_map: FeatureMap, x: Tokens, past: Past, output: Output) -> tuple[Tensor, Memory | None]:
        """(norm(h) * activation(gate) [B, T, HQ, V], the state after the last token or None)."""
        q, k = feature_map(x.q, x.k)
        S, m = (None, None) if past.state is None else past.state
        key_max, options = feature_map.key_max, (x.qk_norm, x.qkv, past.keep)
        call = Call(q, k, x.v, x.gates, self.scale, key_max, x.mask, x.cu_seqlens, S, m, *options)
        norm = head_norm(output.norm, q.device) if past.overwrite and q.shape[1] == 1 else None
        h, state, is_normalised = attend(call, self.backend, norm=norm, overwrite=past.overwrite)
        if is_normalised:
            return output_gated(h, output.gate, output.activation), state
        return norm_and_gate(output.norm, h, output.gate, output.activation, self.backend), state
