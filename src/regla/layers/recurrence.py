"""The update rule of a mixer: from queries, keys, values and gates to the normalised and gated output."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from regla.layers.feature_maps import FEATURE_MAPS, SafeExp
from regla.layers.gates import FastDecayGate, Gate, ScalarGate
from regla.layers.map_base import FeatureMap
from regla.layers.norms import head_norm, norm_and_gate, output_gated
from regla.layers.plain import is_plain
from regla.ops.additive import attend
from regla.ops.call import Call, Forms, Gates, Packed, QKNorm, owners
from regla.ops.delta import attend_delta
from regla.ops.features import UNIT_MAPS, variance_reduction

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
    """S_t = Diag(a_t) S_{t-1} Diag(b_t) + phi(k_t) v_t^T, h_t = scale S_t^T phi(q_t) (paper equations 3-13).

    features: of a key; scale is their number^-1/2, or the variance reduction factor for exponential features.
    """

    def __init__(
        self, hidden_size: int, num_heads: int, features: int, feature_map: FeatureMap, beta_max: float, backend: str
    ):
        super().__init__()
        exponential = variance_reduction(features) if feature_map.variance_reduced else 1.0
        self.scale = features**-0.5 if feature_map.key_max is None else exponential
        self.backend = backend

    def gates(self, gates: Gates, x: Tensor) -> Gates:
        """What the rule needs besides the forget gate: nothing."""
        return gates

    def forms_features(self, feature_map: FeatureMap) -> bool:
        """Whether the recurrence takes logits, and forms the features of this map itself."""
        return isinstance(feature_map, SafeExp)

    def forward(self, feature_map: FeatureMap, x: Tokens, past: Past, output: Output) -> tuple[Tensor, Memory | None]:
        """(norm(h) * activation(gate) [B, T, HQ, V], the state after the last token or None)."""
        S, m = (None, None) if past.state is None else past.state
        if feature_map.needs_positions:
            positions, counted = _positions(x, m)
            q, k = feature_map(x.q, x.k, positions)
        else:
            q, k = feature_map(x.q, x.k)
        key_max, options = feature_map.key_max, (x.qk_norm, x.qkv, past.keep)
        call = Call(q, k, x.v, x.gates, self.scale, key_max, x.mask, x.cu_seqlens, S, m, *options)
        reads_once = feature_map.reads == 1
        norm = head_norm(output.norm, q.device) if past.overwrite and q.shape[1] == 1 and reads_once else None
        h, state, is_normalised = attend(call, self.backend, norm=norm, overwrite=past.overwrite)
        if feature_map.needs_positions and state is not None:
            state = state[0], state[1] + counted[:, None]
        if is_normalised:
            return output_gated(h, output.gate, output.activation), state
        if not reads_once and getattr(output.norm, "of_each_read", False):
            return output_gated(feature_map.merge(output.norm(h)), output.gate, output.activation), state
        h = feature_map.merge(h)
        return norm_and_gate(output.norm, h, output.gate, output.activation, self.backend), state


def _positions(x: Tokens, before: Tensor | None) -> tuple[Tensor, Tensor]:
    """The places of the tokens in their texts [B, T], padding not counted, and how many there are after the last [B].

    before: [B, H], how many came before, the same number for every head.
    """
    B, T = x.k.shape[:2]
    if x.cu_seqlens is not None:
        start = x.cu_seqlens[owners(x.cu_seqlens, T)]
        return (torch.arange(T, device=start.device) - start)[None], x.cu_seqlens[-1:]
    real = torch.ones(B, T, dtype=torch.long, device=x.k.device) if x.mask is None else x.mask.long()
    start = real.new_zeros(B) if before is None else before[:, 0].long()
    places = start[:, None] + real.cumsum(1)
    return (places - 1).clamp_min(0), places[:, -1]


class DeltaRule(nn.Module):
    """S_t = S'_t + beta_t phi(k_t) (v_t - S'_t^T phi(k_t))^T, S'_t = Diag(a_t) S_{t-1}, h_t = scale S_t^T phi(q_t)

    with beta_t = beta_max sigmoid(w x_t + b), one number a head (paper equation 8, with decay;
    `regla.ops.gated_delta_attention`). A beta above 1 turns the old answer around: an eigenvalue of the transition is
    then negative (Grazzi et al. 2024, arXiv 2411.12537).
    """

    def __init__(
        self, hidden_size: int, num_heads: int, features: int, feature_map: FeatureMap, beta_max: float, backend: str
    ):
        super().__init__()
        self.scale = features**-0.5
        self.beta_max = beta_max
        self.backend = backend
        self.beta_proj = nn.Linear(hidden_size, num_heads)

    def gates(self, gates: Gates, x: Tensor) -> Gates:
        if gates.gv is not None or gates.write is not None:
            raise ValueError(_KEY_AXIS_ALONE)  # of a gate of a user's own: those of GATES are checked before
        return gates._replace(write=self.beta_proj(x))

    def forms_features(self, feature_map: FeatureMap) -> bool:
        """Whether the recurrence takes logits, and forms the features of this map itself."""
        return _map_of_recurrence(feature_map) != "given"

    def forward(self, feature_map: FeatureMap, x: Tokens, past: Past, output: Output) -> tuple[Tensor, Memory | None]:
        """(norm(h) * activation(gate) [B, T, HQ, V], the state after the last token or None)."""
        forms = Forms(_map_of_recurrence(feature_map), self.beta_max)
        q, k = feature_map(x.q, x.k) if forms.features == "given" else (x.q, x.k)
        S, m = (None, None) if past.state is None else past.state
        options = (x.qk_norm, x.qkv, past.keep)
        call = Call(q, k, x.v, x.gates, self.scale, None, x.mask, x.cu_seqlens, S, None, *options)
        norm = head_norm(output.norm, q.device) if past.overwrite and q.shape[1] == 1 else None
        h, after, is_normalised = attend_delta(
            call, forms, self.backend, validate=False, norm=norm, overwrite=past.overwrite
        )
        m = after.new_zeros(after.shape[:2]) if m is None else m  # 0: the state needs no stabiliser
        state = (after, m) if past.keep else None
        if is_normalised:
            return output_gated(h, output.gate, output.activation), state
        backend = "auto" if self.backend == "recurrent" else self.backend
        return norm_and_gate(output.norm, h, output.gate, output.activation, backend), state


def _map_of_recurrence(feature_map: FeatureMap) -> str:
    """The key of `regla.ops.features.UNIT_MAPS` of a map that the delta rule forms itself; else "given"."""
    return next((name for name in UNIT_MAPS if is_plain(feature_map, FEATURE_MAPS[name])), "given")


UPDATE_RULES: dict[str, type[AdditiveRule] | type[DeltaRule]] = {"additive": AdditiveRule, "delta": DeltaRule}

_KEY_AXIS_ALONE = (
    "update_rule is 'delta', which decays the key axis alone: use gate_axis='key' or gate_axis='head', or "
    "update_rule='additive'"
)


def check_rule(update_rule: str, *, feature_map: str, gate: type[Gate], gate_axis: str, beta_max: float) -> None:
    """Raise a ValueError for what does not fit an update rule."""
    if not 0 < beta_max <= 2:
        raise ValueError(f"beta_max is {beta_max}; expected a number above 0 and up to 2, behind which states grow")
    if update_rule != "delta":
        if beta_max != 1:
            raise ValueError(
                f"beta_max is {beta_max} and update_rule {update_rule!r}, which has no beta: use update_rule='delta', "
                "or leave beta_max out"
            )
        return
    if not FEATURE_MAPS[feature_map].delta:
        raise ValueError(
            f"update_rule is 'delta' and feature_map {feature_map!r}, whose keys have no fixed length; expected "
            "features of unit length: use feature_map='unit_safe_exp', or update_rule='additive'"
        )
    if gate.has_axis and gate_axis not in ("key", "head"):
        raise ValueError(f"gate_axis is {gate_axis!r}, and {_KEY_AXIS_ALONE}")
    if issubclass(gate, ScalarGate | FastDecayGate):
        raise ValueError(
            f"update_rule is 'delta', to which a {gate.__name__} does not belong: use another gate, with one number a "
            "head gate='sigmoid' and gate_axis='head', or update_rule='additive'"
        )
