"""Softmax attention: Llama's, and with the extras of linear layers where a comparison is to be at equal means."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb, eager_attention_forward

from regla.layers.norms import HeadRMSNorm, norm_and_gate, normalised, output_gated
from regla.layers.positions import ShortConvolution
from regla.models.configuration import ReGLAConfig


class SoftmaxAttention(LlamaAttention):
    """Project -> (short convolution) -> (q/k normalisation) -> (RoPE) -> softmax attention -> (norm) -> (output gate)
    -> out. Parts in brackets are optional, each as in `ReGLAAttention`; with RoPE alone this is LlamaAttention,
    parameter for parameter.
    """

    def __init__(self, config: ReGLAConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)  # type: ignore[arg-type]
        assert config.num_key_value_heads is not None and config.head_dim is not None
        hidden_size, heads, kv_heads, D = (
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        if config.attention_out_bias != config.attention_bias:  # LlamaAttention has one switch for all four projections
            self.o_proj = nn.Linear(heads * D, hidden_size, bias=bool(config.attention_out_bias))
        sliding = config.layer_types is not None and config.layer_types[layer_idx] == "sliding_attention"
        # For flash attention; other implementations find it in the mask.
        self.sliding_window = config.sliding_window if sliding else None
        taps, gate = config.softmax_conv_kernel_dim, config.softmax_output_gate
        self.conv = ShortConvolution((heads + 2 * kv_heads) * D, taps) if taps else None
        self.q_norm = nn.RMSNorm(D, config.rms_norm_eps) if config.softmax_qk_norm else None
        self.k_norm = nn.RMSNorm(D, config.rms_norm_eps) if config.softmax_qk_norm else None
        self.norm = HeadRMSNorm(heads, D, config.rms_norm_eps) if config.softmax_output_norm else None
        self.output_gate = nn.Linear(hidden_size, heads * D, bias=False) if gate else None
        self.output_activation = gate
        self.rope = config.softmax_rope

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        *,
        token_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """
        Args:
            hidden_states: [B, T, hidden_size].
            position_embeddings: (cos, sin) of RoPE, each [B or 1, T, head_dim]; None in a model without RoPE.
            attention_mask: the causal mask, in the form the attention implementation takes; None for plain causal.
            past_key_values: a cache that `adopt_cache` has seen, changed in place.
            token_mask: [B, T] bool, True for real tokens, for the convolution.
            cu_seqlens: [N + 1] int, boundaries of packed documents, for the convolution.
            kwargs: for the attention implementation.

        Returns:
            [B, T, hidden_size], and the attention weights if the implementation has them.
        """
        q, k, v = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        if self.conv is not None:
            cached = None if past_key_values is None else past_key_values.layers[self.layer_idx]
            qkv, conv_state = self.conv(
                torch.cat([q, k, v], -1),
                token_mask,
                cu_seqlens,
                None if cached is None else cached.conv_state,
                overwrite_state=cached is not None,
                backend=self.config.backend,
            )
            q, k, v = qkv.split([q.shape[-1], k.shape[-1], v.shape[-1]], -1)
            if cached is not None:
                cached.write_conv_state(conv_state)
        # [B, T, H * D] -> [B, H, T, D]
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        q, k = normalised(self.q_norm, q), normalised(self.k_norm, k)
        if self.rope:
            assert position_embeddings is not None
            q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        o, weights = attention(
            self,
            q,
            k,
            v,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        output_gate = None if self.output_gate is None else self.output_gate(hidden_states)
        if self.norm is not None:
            o = norm_and_gate(self.norm, o, output_gate, self.output_activation, self.config.backend)
        else:
            o = output_gated(o, output_gate, self.output_activation)
        o = o.flatten(2)  # [B, T, H, D] -> [B, T, H * D]
        return self.o_proj(o), weights
