"""The ReGLA mixer: what stands where softmax attention stood."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from regla.layers.calibration import QKCalibration, QKTemperature
from regla.layers.feature_maps import FEATURE_MAPS, SafeExp
from regla.layers.gates import GATE_AXES, GATES, Decays
from regla.layers.norms import NORMS, HeadNorm
from regla.layers.positions import ShortConvolution, apply_rotary
from regla.layers.projection import is_plain, project
from regla.ops import QKNorm
from regla.ops.attention import safe_exp_step_
from regla.ops.backends import step_engine
from regla.ops.features import KEY_MAX
from regla.ops.output_norm import ACTIVATIONS


class ReGLAState(NamedTuple):
    """What a layer remembers of the past. Zeros throughout mean: nothing yet."""

    S: Tensor  # [B, H, K, V'] float32; V' counts the normaliser's channels where there is one
    m: Tensor  # [B, H] float32, the unit of S: exp(m)
    conv: Tensor | None = None  # [B, conv_size - 1, channels], the last inputs of the short convolution


class ReGLAAttention(nn.Module):
    """Gated linear attention in the paper's form: project -> (short convolution) -> (q/k normalisation) -> (RoPE) ->
    (q/k calibration) -> (q/k temperature) -> feature map and gated recurrence -> norm -> (output gate) -> out; parts
    in brackets are optional.

    Args:
        hidden_size: channels of the input and the output.
        num_heads: query heads.
        num_kv_heads: state heads; each serves num_heads / num_kv_heads query heads. None: num_heads.
        head_dim: K, channels of a query or key. None: hidden_size / num_heads.
        value_head_dim: V, channels of a value. None: head_dim.
        feature_map: "safe_exp", "identity", "relu" or "one_plus_elu".
        gate: "refined", "sigmoid", "fast_decay", "gla", "scalar" or "none".
        gate_axis: "value", "key" or "both": the axis of the state that a refined or sigmoid gate decays.
        key_max: "decay", "running" or "sequence": the stabiliser of the safe exponential.
        norm: "rmsnorm", "layernorm", "sum" or "none".
        norm_eps: eps of the norms.
        conv_size: tokens the short convolution of q, k and v sees; 0 for none.
        qk_norm: RMS-normalise q and k per head with a learnt gain.
        qk_calibration: shift and scale q and k before the feature map (`QKCalibration`), for pretrained projections.
        qk_temperature: scale q and k by a learnt positive factor per head before the feature map (`QKTemperature`).
        output_gate: None, "silu" or "sigmoid".
        bias, out_bias: biases of the q, k, v projections, and of the output's.
        gate_low_rank_dim: rank of the "gla" gate.
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
        feature_map: str = "safe_exp",
        gate: str = "refined",
        gate_axis: str = "key",
        key_max: str = "decay",
        norm: str = "rmsnorm",
        norm_eps: float = 1e-6,
        conv_size: int = 0,
        qk_norm: bool = False,
        qk_calibration: bool = False,
        qk_temperature: bool = False,
        output_gate: str | None = None,
        bias: bool = False,
        out_bias: bool = False,
        gate_low_rank_dim: int = 16,
        backend: str = "auto",
    ):
        super().__init__()
        _one_of("feature_map", feature_map, FEATURE_MAPS)
        _one_of("gate", gate, GATES)
        _one_of("gate_axis", gate_axis, GATE_AXES)
        _one_of("key_max", key_max, KEY_MAX)
        _one_of("norm", norm, NORMS)
        _one_of("output_gate", output_gate, [None, *ACTIVATIONS])
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
        self.conv = ShortConvolution(qkv_channels, conv_size) if conv_size else None
        self.q_norm = nn.RMSNorm(K, norm_eps) if qk_norm else None
        self.k_norm = nn.RMSNorm(K, norm_eps) if qk_norm else None
        self.qk_calibration = QKCalibration(num_heads, num_kv_heads, K) if qk_calibration else None
        self.qk_temperature = QKTemperature(num_heads, num_kv_heads) if qk_temperature else None
        self.gate = GATES[gate](hidden_size, num_kv_heads, K, V, gate_axis, gate_low_rank_dim)
        self.feature_map = FEATURE_MAPS[feature_map](key_max, backend)
        self.norm = NORMS[norm](num_heads, V, norm_eps)
        self.output_gate = nn.Linear(hidden_size, num_heads * V, bias=False) if output_gate else None
        self.output_activation = output_gate

    def forward(
        self,
        x: Tensor,
        *,
        rotary: tuple[Tensor, Tensor] | None = None,
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
            mask: [B, T] bool, True for real tokens; what padding holds does not matter.
            cu_seqlens: [N + 1] int, boundaries of sequences packed into one row (B = 1).
            state: what came before x; not with cu_seqlens.
            return_state: return the state after x; not with cu_seqlens.
            overwrite_state: `state` may be overwritten, and S and m returned in its place: where the decode kernel
                runs, nothing is copied. Not with states that anything else still reads.

        Returns:
            [B, T, hidden_size] in the dtype of x, and the new state or None.
        """
        if cu_seqlens is not None and (state is not None or return_state):
            raise ValueError("cu_seqlens is given with a state; packed sequences start empty: pass one or the other")
        if mask is not None:
            x = torch.where(mask[..., None], x, 0.0)  # by choice: padding may hold nan, and gradients meet it too
        (q, k, v), qkv = project(x, self.q_proj, self.k_proj, self.v_proj)
        conv_state = None
        if self.conv is not None:
            widths = [part.shape[-1] for part in (q, k, v)]
            qkv = torch.cat([q, k, v], -1) if qkv is None else qkv
            qkv, conv_state = self.conv(qkv, mask, cu_seqlens, None if state is None else state.conv)
            q, k, v = qkv.split(widths, -1)
        q, k = q.unflatten(-1, (-1, self.head_dim)), k.unflatten(-1, (-1, self.head_dim))
        v = v.unflatten(-1, (-1, self.value_head_dim))
        parts = q, k, v
        if v.dtype == torch.float16:  # too narrow for outputs that are not normalised yet
            v = v.float()
        qk_norm = None if rotary is not None or overwrite_state else self._norm_before_features(x.device)
        if qk_norm is None and self.q_norm is not None and self.k_norm is not None:
            q, k = (norm(x.to(norm.weight.dtype)).to(x.dtype) for norm, x in ((self.q_norm, q), (self.k_norm, k)))
        if rotary is not None:
            q, k = apply_rotary(q, *rotary), apply_rotary(k, *rotary)
        if self.qk_calibration is not None:
            q, k = self.qk_calibration(q, k)
        if self.qk_temperature is not None:
            q, k = self.qk_temperature(q, k)
        decays = self.gate(x)
        v, decays = self.norm.prepare(v, decays)
        if decays.write is not None:  # of what the norm added, too: the sum of the keys is gated as the values are
            v = v * decays.write.to(v.dtype)
        after = None if state is None else (state.S, state.m)
        o = self._step_(q, k, v, decays, mask, state) if overwrite_state and cu_seqlens is None else None
        is_normalised = o is not None
        if o is None:
            inputs = q, k, v, decays, mask, cu_seqlens, after, return_state
            if isinstance(self.feature_map, SafeExp):
                together = qkv if q is parts[0] and k is parts[1] and v is parts[2] else None
                o, after = self.feature_map(*inputs, together=together, qk_norm=qk_norm)
            else:
                o, after = self.feature_map(*inputs)
        gate = None if self.output_gate is None else self.output_gate(x)
        if not is_normalised and isinstance(self.norm, HeadNorm):
            o, gate = self.norm(o, gate, self.output_activation, self.feature_map.backend), None
        elif not is_normalised:
            o = self.norm(o)
        o = o.flatten(2)
        if gate is not None and self.output_activation is not None:
            o = o * ACTIVATIONS[self.output_activation](gate)
        if parts[2].dtype == torch.float16:
            o = o.to(parts[2].dtype)
        y = self.o_proj(o)
        return y, ReGLAState(after[0], after[1], conv_state) if return_state and after is not None else None

    def _norm_before_features(self, device: torch.device) -> QKNorm | None:
        """The norms of q and k where nothing but the safe exponential follows, which takes them along; None where they
        are to be called: there are none, something else follows, or a norm is more than its weight."""
        q_norm, k_norm = self.q_norm, self.k_norm
        if q_norm is None or k_norm is None or self.qk_calibration is not None or self.qk_temperature is not None:
            return None
        expected = (self.head_dim,), q_norm.eps, device
        for norm in (q_norm, k_norm):
            if not is_plain(norm) or (norm.normalized_shape, norm.eps, norm.weight.device) != expected:
                return None
        if q_norm.eps is None or not isinstance(self.feature_map, SafeExp):
            return None
        return QKNorm(q_norm.weight, k_norm.weight, q_norm.eps)

    def _step_(
        self, q: Tensor, k: Tensor, v: Tensor, decays: Decays, mask: Tensor | None, state: ReGLAState | None
    ) -> Tensor | None:
        """The normalised output of one token [B, 1, HQ, V], `state` overwritten, by the decode kernel; None, and
        nothing done, where it cannot run."""
        if not isinstance(self.feature_map, SafeExp) or state is None:
            return None
        gk, gv, refine_k, refine_v = decays.gk, decays.gv, decays.refine_k, decays.refine_v
        S, m, _ = state
        key_max, backend = self.feature_map.key_max, self.feature_map.backend
        dense = S.dtype == m.dtype == torch.float32 and S.is_contiguous() and m.is_contiguous()
        if not dense or S.requires_grad:
            return None
        engine = step_engine(backend, key_max, k, v, q, gk, gv, refine_k, refine_v)
        if engine is None:
            return None
        weight, bias = None, None
        if isinstance(self.norm, HeadNorm) and self.norm.weight.device == v.device:
            # Weights that are kept elsewhere come to the device when the norm itself is called.
            weight, bias = self.norm.weight, self.norm.bias
        h = safe_exp_step_(
            q,
            k,
            v,
            S,
            m,
            gk,
            gv,
            refine_k=refine_k,
            refine_v=refine_v,
            mask=mask,
            key_max=key_max,
            engine=engine,
            weight=weight,
            bias=bias,
            eps=self.norm.eps,
        )
        return self.norm(h) if weight is None else h


def _one_of(name: str, value: str | None, known: Iterable[str | None]) -> None:
    names = list(known)
    if value not in names:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, names))}")
