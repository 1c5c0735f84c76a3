"""vLLM's plug-in: it serves the folders of models and of converted ones, linear layers with their states in vLLM's
cache and softmax layers through vLLM's own attention.

The model is the one that transformers builds, with two changes in place: a mixer becomes a `ServedMixer`, which reads
and writes its states where vLLM keeps them, and softmax attention modules hand q, k and v to a layer of vLLM.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateCopyFunc, get_temporal_copy_spec
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid
from vllm.v1.attention.backends.linear_attn import LinearAttentionMetadata
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from regla.layers.attention import ReGLAAttention, ReGLAState
from regla.models.families import FAMILIES, Family, heads_of
from regla.serving.config import config_of, linear_config_of
from regla.serving.rows import mix_rows, state_layout

Layout = list[tuple[tuple[int, ...], torch.dtype]]  # of `state_layout`

ATTENTION = "regla_vllm"  # the name of `attend` among transformers' attention implementations


class ServedMixer(ReGLAAttention, MambaBase):
    """A mixer whose states are pages of vLLM's cache. Mixers are made so in place, by `serve_mixer`."""

    kv_cache: tuple[Tensor, ...]
    prefix: str
    layout: Layout

    def forward(  # type: ignore[override]
        self, x: Tensor, *, rotary: tuple[Tensor, Tensor] | None = None, **_: Any
    ) -> tuple[Tensor, None]:
        """x [1, N, C] of all texts of a step; masks and states of the caller are not for this layer."""
        metadata = get_forward_context().attn_metadata
        if metadata is None:  # vLLM measures memory
            return super().forward(x, rotary=rotary)[0], None
        step = cast(LinearAttentionMetadata, cast(dict, metadata)[self.prefix])
        texts = step.num_decodes + step.num_prefills
        tokens = step.num_decode_tokens + step.num_prefill_tokens
        starts = step.query_start_loc[: texts + 1]
        slots = step.state_indices_tensor[:texts].long()
        fresh = step.seq_lens[:texts] == starts.diff()
        before = ReGLAState(*(_forgotten(part[slots], fresh) for part in self.kv_cache))
        single = step.num_decodes
        known = range(texts + 1) if single == texts else starts.tolist()  # a step of single tokens waits for no numbers
        parts = None if rotary is None else (rotary[0][:, :tokens], rotary[1][:, :tokens])
        y_NC, after = mix_rows(super().forward, x[0, :tokens], parts, known, single, before)
        for page, part in zip(self.kv_cache, (part for part in after if part is not None), strict=True):
            page[slots] = part.to(page.dtype)
        return nn.functional.pad(y_NC, (0, 0, 0, x.shape[1] - tokens))[None], None

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        return tuple(shape for shape, _ in self.layout)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return tuple(dtype for _, dtype in self.layout)

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        return MambaAttentionBackendEnum.LINEAR


def _forgotten(state: Tensor, rows: Tensor) -> Tensor:
    """`state` [R, ...] with zeros, an empty state, in these rows: a page may hold what another text left there."""
    return torch.where(rows.view(-1, *[1] * (state.ndim - 1)), 0.0, state)


def serve_mixer(mixer: ReGLAAttention, prefix: str, layout: Layout, vllm_config: VllmConfig) -> None:
    """Make a mixer a `ServedMixer`, known to vLLM as `prefix`."""
    served = cast(Any, mixer)
    served.__class__ = ServedMixer
    served.prefix = prefix
    served.kv_cache = ()
    served.layout = layout
    vllm_config.compilation_config.static_forward_context[prefix] = served


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any
) -> tuple[Tensor, None]:
    """Softmax attention of q, k, v [1, H, N, D] by the module's layer of vLLM, which has the texts' keys and values;
    returns [1, N, H, D]."""
    q, k, v = (x[0].transpose(0, 1).flatten(1) for x in (query, key, value))
    o_NC: Tensor = cast(Any, module).served(q, k, v)
    heads, size = query.shape[1], query.shape[3]
    return o_NC.view(1, -1, heads, size), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attend)


def layout_of(vllm_config: VllmConfig) -> Layout:
    return state_layout(linear_config_of(vllm_config), vllm_config.model_config.dtype)


class ServedModel(nn.Module, HasInnerState, IsHybrid):
    """A causal language model as vLLM calls it: tokens of all texts of a step in one row."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config = config_of(vllm_config)
        with no_init_weights():
            self.causal: Any = AutoModelForCausalLM.from_config(
                config, dtype=vllm_config.model_config.dtype, attn_implementation=ATTENTION
            ).eval()
        family = FAMILIES.get(getattr(config, "original_model_type", ""), Family())
        heads, linear = heads_of(config), linear_config_of(vllm_config)
        self.causal.tie_weights()
        self.layout = layout_of(vllm_config)
        assert linear.layer_types is not None
        for number, kind in enumerate(linear.layer_types):
            attention: Any = family.attention_of(self.causal, number)
            name = f"{prefix}.layers.{number}.attn".lstrip(".")
            if kind == "linear_attention":
                mixers = [module for module in attention.modules() if isinstance(module, ReGLAAttention)]
                serve_mixer(mixers[0], name, self.layout, vllm_config)
                continue
            attention.served = Attention(
                heads.queries,
                heads.size,
                attention.scaling,
                num_kv_heads=heads.keys,
                cache_config=vllm_config.cache_config,
                per_layer_sliding_window=linear.sliding_window if kind == "sliding_attention" else None,
                prefix=name,
            )

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, ...], ...]:
        return tuple(shape for shape, _ in layout_of(vllm_config))

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        return tuple(dtype for _, dtype in layout_of(vllm_config))

    def get_mamba_state_copy_funcs(  # type: ignore[override]  # called of the model
        self, mamba_types: Iterable[MambaAttentionBackendEnum]
    ) -> dict[MambaAttentionBackendEnum, tuple[MambaStateCopyFunc, ...]]:
        """How to copy a state to where another text with the same beginning continues: as a whole."""
        return dict.fromkeys(mamba_types, (get_temporal_copy_spec,) * len(self.layout))

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return cast(Tensor, self.causal.get_input_embeddings()(input_ids))

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """Hidden states [N, C] of the tokens of a step."""
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self.embed_input_ids(input_ids)
        # With a mask, positions that restart are not taken for the boundaries of packed documents.
        real = torch.ones_like(positions[None])
        out = self.causal.base_model(
            inputs_embeds=inputs_embeds[None], position_ids=positions[None], attention_mask=real, use_cache=False
        )
        return cast(Tensor, out.last_hidden_state[0])

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """Logits [N, vocab_size], with what families do behind their heads."""
        config, logits = self.causal.config, self.causal.get_output_embeddings()(hidden_states)
        logits = logits / getattr(config, "logits_scaling", 1.0)
        cap = getattr(config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Copy the folder's weights; the names of those that were given."""
        own = dict(self.causal.named_parameters(remove_duplicate=False))
        own |= dict(self.causal.named_buffers(remove_duplicate=False))
        loaded = set()
        for name, weight in weights:
            if name not in own or own[name].shape != weight.shape:
                raise ValueError(f"the folder's weight {name} {list(weight.shape)} is none of the model in its config")
            own[name].data.copy_(weight)
            loaded.add(f"causal.{name}")
        return loaded
