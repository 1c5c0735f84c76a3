"""ReGLAModel and ReGLAForCausalLM: pre-norm blocks of a mixer and a SwiGLU MLP, in Llama's module names.

    x = x + mixer(norm(x));    x = x + mlp(norm(x))        mixer: ReGLAAttention or softmax attention, by layer_types

Shapes: B batch, T tokens of this call, L tokens seen by the cache before plus T.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from regla.layers.attention import ReGLAAttention
from regla.layers.init import init_linear_attention
from regla.models.cache import CACHE, adopt_cache, one_cache
from regla.models.configuration import ReGLAConfig
from regla.models.inputs import (
    LayerMasks,
    layer_masks,
    masks_for_generate,
    packed_positions,
    positions,
    settle_cache,
    settle_packing,
    token_mask,
)
from regla.models.rotary import RotaryEmbedding
from regla.models.softmax import SoftmaxAttention

NO_CONTINUOUS_BATCHING = (
    "Continuous batching pages keys and values, and a linear layer's state is neither; call generate(), or start the "
    "server without --continuous-batching."
)


class ReGLADecoderLayer(GradientCheckpointingLayer):
    """One block. `self_attn` is a `ReGLAAttention` or a `SoftmaxAttention`, by the layer's type."""

    def __init__(self, config: ReGLAConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.layer_types is not None and config.head_dim is not None
        self._checkpoints = False
        self.layer_idx = layer_idx
        self.is_linear = config.layer_types[layer_idx] == "linear_attention"
        self.linear_rope = config.linear_rope
        self.self_attn = (linear_mixer if self.is_linear else SoftmaxAttention)(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    @property
    def gradient_checkpointing(self) -> bool:  # type: ignore[override]
        """Whether the backward pass is to recompute this block: if enabled, and if there will be one. Text generated
        in between steps of training keeps its cache."""
        return self._checkpoints and torch.is_grad_enabled()

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enabled: bool) -> None:
        self._checkpoints = enabled

    def forward(
        self,
        hidden_states: Tensor,
        *,
        rotary: tuple[Tensor, Tensor] | None,
        causal_mask: Tensor | None,
        token_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        past_key_values: Cache | None,
        **kwargs: Any,
    ) -> Tensor:
        x = self.input_layernorm(hidden_states)
        if self.is_linear:
            cached = None if past_key_values is None else past_key_values.layers[self.layer_idx]
            mixed, state = self.self_attn(
                x,
                rotary=rotary if self.linear_rope else None,
                mask=token_mask,
                cu_seqlens=cu_seqlens,
                state=None if cached is None else cached.read(),
                return_state=cached is not None,
                overwrite_state=cached is not None,
            )
            if cached is not None:
                cached.write(state, x.shape[1])
        else:
            mixed, _ = self.self_attn(
                x,
                position_embeddings=rotary,
                attention_mask=causal_mask,
                past_key_values=past_key_values,
                token_mask=token_mask,
                cu_seqlens=cu_seqlens,
                **kwargs,
            )
        hidden_states = hidden_states + mixed
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class ReGLAPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation."""

    config: ReGLAConfig
    config_class = ReGLAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ReGLADecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": ReGLADecoderLayer, "attentions": LlamaAttention}  # noqa: RUF012
    _is_stateful = True  # a recurrent state cannot be cropped, so no assisted generation

    def __init__(self, config: ReGLAConfig, *args: Any, **kwargs: Any) -> None:
        config.check()  # again: attributes may have changed since the config was made
        super().__init__(config, *args, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        """Give every parameter its start; transformers calls it for each module, inner ones first.

        embeddings, projections and MLP: normal(0, initializer_range), biases 0
        norms: weight 1
        linear mixers: `regla.layers.init.init_linear_attention`, with the config's qk_initializer_range, gate_bias,
            refine_bias, gate_half_life and gate_half_life_over
        convolution of softmax mixers: normal(0, initializer_range) around its identity path
        RoPE: its frequencies, which are computed

        Weights that came from a checkpoint carry `_is_hf_initialized` and stay as they are.
        """
        if isinstance(module, ReGLAAttention):
            init_linear_attention(
                module,
                std=self.config.initializer_range,
                qk_std=self.config.qk_initializer_range,
                gate_bias=self.config.gate_bias,
                refine_bias=self.config.refine_bias,
                gate_half_life=self.config.gate_half_life,
                gate_half_life_over=self.config.gate_half_life_over,
            )
        elif isinstance(module, SoftmaxAttention) and module.conv is not None:
            nn.init.normal_(module.conv.weight, 0.0, self.config.initializer_range)
        else:
            super()._init_weights(module)

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # For classes from outside its own package transformers passes over modules that hold no parameter themselves,
        # and a mixer is one, in case they overwrite loaded weights. `_init_weights` does not.
        super()._initialize_weights(module, is_custom_code=False)

    create_masks_for_generate = staticmethod(masks_for_generate)


class ReGLAModel(ReGLAPreTrainedModel):
    """Token embeddings, the blocks, and the final norm."""

    def __init__(self, config: ReGLAConfig) -> None:
        super().__init__(config)
        self.vocab_size = config.vocab_size
        # No padding_idx, which would hold that row at zero: the padding token may occur in text, where it has to train
        # (often it is the separator). What is padding, attention_mask tells.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(ReGLADecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config) if config.uses_rope else None
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | LayerMasks | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states after the final norm.

        Args:
            input_ids: [B, T] tokens; or inputs_embeds [B, T, hidden_size].
            attention_mask: [B, L], 0 for padding, whose content then has no influence at all; or the dict of masks that
                `generate` makes for static caches.
            position_ids: [B or 1, T]. None: each row counts its real tokens from 0, those in the cache included.
            past_key_values, cache: two names of one argument (transformers 5.24 has renamed it): a transformers cache,
                changed in place.
            use_cache: return a cache. None: as the config says, except in training.
            cu_seq_lens_q: [N + 1] int, boundaries 0, ..., T of the documents packed into one row (B = 1). Nothing
                passes a boundary. Without it, boundaries are where given position_ids restart, if there is neither
                mask nor cache.
            kwargs: for the attention implementation of softmax layers.

        Raises:
            ValueError: a mask that does not fit; packing with a cache or a mask; a foreign cache; a cache in training
                with activation checkpointing; an exporter other than torch.export.
        """
        check_exporter()
        past_key_values = one_cache(past_key_values, cache)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids and inputs_embeds are both given or both missing; pass exactly one of them")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        B, T = inputs_embeds.shape[:2]

        cu_seq_lens_q = settle_packing(B, attention_mask, position_ids, past_key_values, use_cache, cu_seq_lens_q)
        past_key_values, _ = settle_cache(
            self,
            self.config,
            past_key_values,
            use_cache if cu_seq_lens_q is None else False,
            checkpointed=any(layer.gradient_checkpointing and layer.training for layer in self.layers),
        )
        restarts = None if cu_seq_lens_q is None else packed_positions(cu_seq_lens_q, T)
        if isinstance(attention_mask, dict):
            masks = attention_mask
        else:
            masks = layer_masks(self.config, inputs_embeds, attention_mask, past_key_values, restarts)
        rotary = None
        if self.rotary_emb is not None:
            if position_ids is None:
                position_ids = restarts
            if position_ids is None:
                position_ids = positions(attention_mask, past_key_values, inputs_embeds)
            rotary = self.rotary_emb(inputs_embeds, position_ids=position_ids)

        real = token_mask(masks)
        # Padding has no part in the model, so its embedding takes no gradient, not even from labels that follow it.
        hidden_states = inputs_embeds if real is None else torch.where(real[..., None], inputs_embeds, 0.0)
        assert self.config.layer_types is not None
        for layer, kind in zip(self.layers, self.config.layer_types, strict=True):
            hidden_states = layer(
                hidden_states,
                rotary=rotary,
                causal_mask=masks.get(kind),
                token_mask=real,
                cu_seqlens=cu_seq_lens_q,
                past_key_values=past_key_values,
                cu_seq_lens_q=cu_seq_lens_q,
                position_ids=position_ids if restarts is None else restarts,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **{CACHE: past_key_values})


class Generation:
    """What `generate` and transformers' server need to know of models with ReGLA layers, before the classes that
    generate."""

    linear_config: ReGLAConfig  # which layers are linear, and their options

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        # `generate` asks the cache for its length before the first forward.
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]
        if model_kwargs.get(CACHE) is not None:
            adopt_cache(model_kwargs[CACHE], self.linear_config)

    @property
    def init_continuous_batching(self) -> Any:
        # `transformers serve` asks whether there is such a method, and else says so and serves one request at a time.
        raise AttributeError(NO_CONTINUOUS_BATCHING)

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Not supported, see `NO_CONTINUOUS_BATCHING`."""
        raise ValueError(NO_CONTINUOUS_BATCHING)

    def continuous_batching_context_manager(self, *args: Any, **kwargs: Any) -> Any:
        """Not supported, see `NO_CONTINUOUS_BATCHING`."""
        raise ValueError(NO_CONTINUOUS_BATCHING)


class ReGLAForCausalLM(Generation, ReGLAPreTrainedModel, GenerationMixin):
    """`ReGLAModel` with a language-modelling head, its weight tied to the embeddings if the config says so."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: ReGLAConfig) -> None:
        super().__init__(config)
        self.linear_config = config
        self.model = ReGLAModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | LayerMasks | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the next token, and the mean cross-entropy if labels are given.

        Args:
            labels: [B, T] tokens, shifted inside; -100 is left out.
            logits_to_keep: how many tokens at the end get logits (0: all), or a 1-D tensor of their indices.

        The other arguments and errors are `ReGLAModel.forward`'s. Logits are [B, T, vocab_size] in the model's dtype.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=one_cache(past_key_values, cache),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: getattr(outputs, CACHE)},
        )


def check_exporter() -> None:
    """Raise a ValueError, in place of the exporter's own message, where linear layers cannot be exported."""
    if torch.jit.is_tracing():
        raise ValueError(
            "torch.jit.trace cannot record the operations of linear layers, which take lists of tensors; use "
            "torch.export.export"
        )
    if torch.onnx.is_in_onnx_export():
        raise ValueError(
            "ONNX has no form of the operations of linear layers; use torch.export.export, and AOTInductor to compile "
            "what it gives"
        )


def linear_mixer(
    config: ReGLAConfig, layer_idx: int, *, bias: bool | None = None, out_bias: bool | None = None
) -> ReGLAAttention:
    """The mixer of layer `layer_idx`; biases of q, k, v and of the output are the config's unless given."""
    mixer = ReGLAAttention(
        config.hidden_size,
        config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        value_head_dim=config.value_head_dim,
        update_rule=config.update_rule,
        beta_max=config.beta_max,
        feature_map=config.feature_map,
        feature_dim=config.feature_dim,
        horizon=config.max_position_embeddings,
        gate=config.gate,
        gate_axis=config.gate_axis,
        key_max=config.key_max,
        norm=config.attention_norm,
        norm_eps=config.rms_norm_eps,
        conv_size=config.linear_conv_kernel_dim,
        conv_activation=config.linear_conv_activation,
        qk_norm=config.qk_norm,
        qk_calibration=config.qk_calibration,
        output_gate=config.output_gate,
        bias=config.attention_bias if bias is None else bias,
        out_bias=bool(config.attention_out_bias) if out_bias is None else out_bias,
        gate_low_rank_dim=config.gate_low_rank_dim,
        window_branch=config.window_branch,
        window_sinks=config.window_sinks,
        window_dropout=config.window_dropout,
        backend=config.backend,
    )
    mixer.layer_idx = layer_idx
    return mixer
