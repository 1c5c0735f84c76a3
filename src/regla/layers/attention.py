"""The ReGLA mixer: what stands where softmax attention stood."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from regla.layers.calibration import QKCalibration
from regla.layers.defaults import DEFAULTS
from regla.layers.feature_maps import FEATURE_MAPS, num_features
from regla.layers.gates import GATE_AXES, GATES, default_rank
from regla.layers.map_base import MapOptions
from regla.layers.norms import NORMS, normalised, prepared
from regla.layers.plain import is_plain
from regla.layers.positions import ShortConvolution, apply_rotary
from regla.layers.projection import project
from regla.layers.recurrence import UPDATE_RULES, Output, Past, Tokens, check_rule
from regla.layers.window import Kept, WindowBranch, check_window
from regla.ops.call import Packed, QKNorm
from regla.ops.features import KEY_MAX
from regla.ops.output_norm import ACTIVATIONS


class ReGLAState(NamedTuple):
    """What a layer remembers of the past. Zeros throughout mean: nothing yet."""

    S: Tensor  # [B, H, F, V'] float32; F features of a key, V' counts the normaliser's channels where there is one
    m: Tensor  # [B, H] float32, the unit of S: exp(m); of maps that need positions the number of tokens; else 0
    conv: Tensor | None = None  # [B, conv_size - 1, channels], the last inputs of the short convolution
    window: Tensor | None = None  # [B, sinks + window - 1, H, K + V], keys and values of the window branch
    seen: Tensor | None = None  # [B] int64, with the branch: how many real tokens there were

    def each(self, function: Callable[[Tensor], Tensor]) -> ReGLAState:
        """The state whose parts are function(part)."""
        return ReGLAState(*(None if part is None else function(part) for part in self))  # type: ignore[arg-type]


class ReGLAAttention(nn.Module):
    """Gated linear attention in the paper's form (figure 1): project -> (short convolution) -> (q/k normalisation) ->
    (RoPE) -> (q/k calibration) -> gate -> recurrence of a feature map and an update rule -> norm -> (output gate) ->
    (window branch) -> out; parts in brackets are optional. Defaults are those of `regla.layers.defaults`, as of models.

    Args:
        hidden_size: channels of the input and the output.
        num_heads: query heads.
        num_kv_heads: state heads; each serves num_heads / num_kv_heads query heads. None: num_heads.
        head_dim: K, channels of a query or key. None: hidden_size / num_heads.
        value_head_dim: V, channels of a value. None: head_dim.
        update_rule: "additive" or "delta".
        feature_map: a name in `regla.layers.feature_maps.FEATURE_MAPS`: "safe_exp", "safe_exp_unscaled", "identity",
            "relu", "one_plus_elu", "t2r", "hedgehog", "dpfp", "favor_plus", "rfa", "cosformer", "focused" or
            "polaformer", and of a length of at most 1, as the delta rule needs them, "unit_safe_exp", "unit_identity",
            "unit_silu", "sum_dpfp" or "rfa".
        feature_dim: F, features of a head, for the maps that leave a choice: "t2r", "dpfp" and "sum_dpfp" (2 K nu),
            "favor_plus" and "rfa". None: the map's own.
        horizon: of "cosformer": the longest text.
        beta_max: of the delta rule, the largest beta, up to 2; above 1 eigenvalues of the transition may be negative.
        gate: "refined", "refined_low_rank", "sigmoid", "fast_decay", "gla", "mamba2", "scalar" or "none".
        gate_axis: "value", "key" or "both": the axis of the state that a refined or sigmoid gate decays; "head": one
            number a head decays its whole state.
        key_max: "decay", "running" or "sequence": the stabiliser of the safe exponential.
        norm: "rmsnorm", "layernorm", "sum" or "none".
        norm_eps: eps of the norms.
        conv_size: tokens the short convolution of q, k and v sees; 0 for none.
        conv_activation: None, "silu" or "sigmoid": behind the short convolution.
        qk_norm: RMS-normalise q and k per head with a learnt gain.
        qk_calibration: shift and scale q and k before the feature map (`QKCalibration`), for pretrained projections.
        output_gate: None, "silu" or "sigmoid".
        bias, out_bias: biases of the q, k, v projections, and of the output's.
        gate_low_rank_dim: rank of the "gla" and "refined_low_rank" gates. None: hidden_size / 8.
        window_branch: tokens of a softmax attention beside the recurrence, each head's share of which is learnt
            (`regla.layers.window.WindowBranch`); 0 for none. It takes q, k and v behind the q/k normalisation and RoPE,
            and is not behind the output gate, as softmax attention is not.
        window_sinks: first tokens that it sees, too.
        window_dropout: how likely it is, in training, that a text goes without it.
        backend: of the recurrence, see `regla.ops.gated_linear_attention`.

    Raises:
        ValueError: unknown names, head counts that do not divide.

    >>> layer = ReGLAAttention(64, 4)
    >>> y, state = layer(torch.randn(2, 10, 64), return_state=True)
    >>> y_next, state = layer(torch.randn(2, 1, 64), state=state, return_state=True)
    """

    layer_idx: int | None = None  # its place in a model, which sets it

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        value_head_dim: int | None = None,
        update_rule: str = DEFAULTS.update_rule,
        beta_max: float = DEFAULTS.beta_max,
        feature_map: str = DEFAULTS.feature_map,
        feature_dim: int | None = None,
        horizon: int = 2048,
        gate: str = DEFAULTS.gate,
        gate_axis: str = DEFAULTS.gate_axis,
        key_max: str = DEFAULTS.key_max,
        norm: str = DEFAULTS.norm,
        norm_eps: float = DEFAULTS.norm_eps,
        conv_size: int = DEFAULTS.conv_size,
        conv_activation: str | None = DEFAULTS.conv_activation,
        qk_norm: bool = DEFAULTS.qk_norm,
        qk_calibration: bool = DEFAULTS.qk_calibration,
        output_gate: str | None = DEFAULTS.output_gate,
        bias: bool = DEFAULTS.bias,
        out_bias: bool = False,
        gate_low_rank_dim: int | None = DEFAULTS.gate_low_rank_dim,
        window_branch: int = DEFAULTS.window_branch,
        window_sinks: int = DEFAULTS.window_sinks,
        window_dropout: float = DEFAULTS.window_dropout,
        backend: str = DEFAULTS.backend,
    ):
        super().__init__()
        _one_of("update_rule", update_rule, UPDATE_RULES)
        _one_of("feature_map", feature_map, FEATURE_MAPS)
        _one_of("gate", gate, GATES)
        _one_of("gate_axis", gate_axis, GATE_AXES)
        _one_of("key_max", key_max, KEY_MAX)
        _one_of("norm", norm, NORMS)
        _one_of("output_gate", output_gate, [None, *ACTIVATIONS])
        _one_of("conv_activation", conv_activation, [None, *ACTIVATIONS])
        check_rule(update_rule, feature_map=feature_map, gate=GATES[gate], gate_axis=gate_axis, beta_max=beta_max)
        check_window(window_branch, window_sinks, window_dropout)
        if horizon < 1:
            raise ValueError(f"horizon is {horizon}; expected the tokens of the longest text, at least 1")
        num_kv_heads = num_kv_heads or num_heads
        if num_heads % num_kv_heads:
            raise ValueError(f"num_heads is {num_heads}; expected a multiple of num_kv_heads = {num_kv_heads}")
        if head_dim is None and hidden_size % num_heads:
            raise ValueError(f"hidden_size {hidden_size} is no multiple of num_heads = {num_heads}: give head_dim")
        if conv_size == 1 or conv_size < 0:
            raise ValueError(f"conv_size is {conv_size}; expected 0 (none) or at least 2 tokens")
        K = head_dim or hidden_size // num_heads
        V = value_head_dim or K
        self.hidden_size, self.num_heads, self.num_kv_heads = hidden_size, num_heads, num_kv_heads
        self.head_dim, self.value_head_dim = K, V
        self.q_proj = nn.Linear(hidden_size, num_heads * K, bias=bias)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * K, bias=bias)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * V, bias=bias)
        self.o_proj = nn.Linear(num_heads * V, hidden_size, bias=out_bias)
        qkv_channels = num_heads * K + num_kv_heads * (K + V)
        self.conv = ShortConvolution(qkv_channels, conv_size, conv_activation) if conv_size else None
        self.q_norm = nn.RMSNorm(K, norm_eps) if qk_norm else None
        self.k_norm = nn.RMSNorm(K, norm_eps) if qk_norm else None
        self.qk_calibration = QKCalibration(num_heads, num_kv_heads, K) if qk_calibration else None
        rank = gate_low_rank_dim or default_rank(hidden_size)
        F = num_features(feature_map, K, V, feature_dim)
        self.gate = GATES[gate](hidden_size, num_kv_heads, F, V, gate_axis, rank)
        self.feature_map = FEATURE_MAPS[feature_map](MapOptions(num_heads, num_kv_heads, K, F, key_max, horizon))
        self.rule = UPDATE_RULES[update_rule](hidden_size, num_kv_heads, F, self.feature_map, beta_max, backend)
        self.norm = NORMS[norm](num_heads, V, norm_eps)
        self.output_gate = nn.Linear(hidden_size, num_heads * V, bias=False) if output_gate else None
        self.output_activation = output_gate
        self.window = None
        if window_branch:
            self.window = WindowBranch(num_heads, window_branch, window_sinks, K**-0.5, window_dropout)

    def forward(
        self,
        x: Tensor,
        *,
        rotary: tuple[Tensor, Tensor] | None = None,
        window_rotary: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        state: ReGLAState | None = None,
        return_state: bool = False,
        overwrite_state: bool = False,
    ) -> tuple[Tensor, ReGLAState | None]:
        """
        Args:
            x: [B, T, hidden_size].
            rotary: (cos, sin), each [B or 1, T, R <= head_dim]; None for no RoPE.
            window_rotary: of the window branch; None: `rotary`.
            mask: [B, T] bool, True for real tokens; what padding holds does not matter.
            cu_seqlens: [N + 1] int, boundaries of sequences packed into one row (B = 1).
            state: what came before x; not with cu_seqlens.
            return_state: return the state after x; not with cu_seqlens.
            overwrite_state: `state` may be overwritten, and returned in its place: where the decode kernels run,
                nothing is copied. Not with states that anything else still reads.

        Returns:
            [B, T, hidden_size] in the dtype of x, and the new state or None.
        """
        if cu_seqlens is not None and (state is not None or return_state):
            raise ValueError("cu_seqlens is given with a state; packed sequences start empty: pass one or the other")
        if mask is not None:
            x = torch.where(mask[..., None], x, 0.0)  # by choice: padding may hold nan, and gradients meet it too
        q, k, v, qkv, conv = self._project_and_convolve(x, mask, cu_seqlens, state, overwrite_state)
        q, k, qk_norm = self._normalise(q, k, rotary)
        near, kept = self._attend_near(q, k, v, window_rotary or rotary, mask, cu_seqlens, state)
        q, k = self._rotate_and_calibrate(q, k, rotary)
        dtype = v.dtype
        if dtype == torch.float16:  # too narrow for outputs that are not normalised yet
            v = v.float()
        v, gates = prepared(self.norm, v, self.rule.gates(self.gate(x), x))
        tokens = Tokens(q, k, v, gates, qk_norm, qkv, mask, cu_seqlens)
        past = Past(None if state is None else (state.S, state.m), return_state, overwrite_state)
        output_gate = None if self.output_gate is None else self.output_gate(x)
        output = Output(self.norm, output_gate, self.output_activation)
        o, after = self.rule(self.feature_map, tokens, past, output)
        if self.window is not None and near is not None:
            o = self.window.mix(o, near, cu_seqlens)
        o = o.flatten(2)
        y = self.o_proj(o.to(dtype) if dtype == torch.float16 else o)
        return y, None if after is None else ReGLAState(after[0], after[1], conv, *kept)

    def _project_and_convolve(
        self,
        x: Tensor,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
        state: ReGLAState | None,
        overwrite: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Packed | None, Tensor | None]:
        """q, k, v, the tensor of which they are parts if there is one, and the new state of the convolution."""
        parts, whole = project(x, self.q_proj, self.k_proj, self.v_proj)
        K, V, conv = self.head_dim, self.value_head_dim, None
        heads = [(self.num_heads, K), (self.num_kv_heads, K), (self.num_kv_heads, V)]
        if self.conv is not None:
            whole = torch.cat(parts, -1) if whole is None else whole
            before, backend = None if state is None else state.conv, self.rule.backend
            whole, conv = self.conv(whole, mask, cu_seqlens, before, overwrite_state=overwrite, backend=backend)
        if whole is None:
            q, k, v = (part.unflatten(-1, size) for part, size in zip(parts, heads, strict=True))
            return q, k, v, None, conv
        qkv = Packed(whole, heads)
        return *qkv.parts, qkv, conv  # type: ignore[return-value]

    def _normalise(
        self, q: Tensor, k: Tensor, rotary: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, QKNorm | None]:
        """q, k, and their norm where nothing comes between it and the recurrence, which then does it."""
        qk_norm = self._norm_before_recurrence(q.device) if rotary is None and self.window is None else None
        if qk_norm is None:
            q, k = normalised(self.q_norm, q), normalised(self.k_norm, k)
        return q, k, qk_norm

    def _attend_near(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
        state: ReGLAState | None,
    ) -> tuple[Tensor | None, Kept | tuple[None, None]]:
        """What the window branch gives, and what it keeps."""
        if self.window is None:
            return None, (None, None)
        if rotary is not None:
            q, k = apply_rotary(q, *rotary), apply_rotary(k, *rotary)
        past = None
        if state is not None:
            if state.window is None or state.seen is None:
                raise ValueError("state is of a layer without a window branch, and this one has it; pass its own")
            past = state.window, state.seen
        near, kept = self.window(q, k, v, mask, cu_seqlens, past)
        return near, kept

    def _rotate_and_calibrate(
        self, q: Tensor, k: Tensor, rotary: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        if rotary is not None:
            q, k = apply_rotary(q, *rotary), apply_rotary(k, *rotary)
        if self.qk_calibration is not None:
            q, k = self.qk_calibration(q, k)
        return q, k

    def _norm_before_recurrence(self, device: torch.device) -> QKNorm | None:
        """The norms of q and k by their weights; None where there are none, where something else follows or where a
        norm is more than its weight: then they are called."""
        q_norm, k_norm = self.q_norm, self.k_norm
        if q_norm is None or k_norm is None or self.qk_calibration is not None:
            return None
        if not self.rule.forms_features(self.feature_map):
            return None
        if not (is_plain(q_norm, nn.RMSNorm) and is_plain(k_norm, nn.RMSNorm)):
            return None
        expected = (self.head_dim,), q_norm.eps, device
        for norm in (q_norm, k_norm):
            if norm.weight is None or (norm.normalized_shape, norm.eps, norm.weight.device) != expected:
                return None
        return None if q_norm.eps is None else QKNorm(q_norm.weight, k_norm.weight, q_norm.eps)


def _one_of(name: str, value: str | None, known: Iterable[str | None]) -> None:
    names = list(known)
    if value not in names:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, names))}")
