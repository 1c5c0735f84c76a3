"""Students: a model in its original's own transformers class, with mixers in place of some attention modules.

`student_class(LlamaForCausalLM)` is `ReGLALlamaForCausalLM`, a subclass. Blocks, norms, MLPs, positions and the head
are the original's; a `StudentAttention` stands where the attention module stood and is called as it was.

Shapes: B batch, T tokens of this call.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from regla.layers.attention import ReGLAAttention
from regla.layers.init import init_linear_attention
from regla.models.cache import ReGLACacheLayer
from regla.models.families import Family, family_of, heads_of, softmax_kinds, window
from regla.models.hub import AUTO_CLASSES, publish
from regla.models.modeling import Generation, check_exporter, linear_mixer
from regla.models.rotary import frequencies_kept
from regla.models.student_configuration import PREFIX, student_config_class
from regla.models.student_inputs import LinearTokens, checkpointed, masks_for_generate, prepared, set_checkpointing
from regla.models.window_attention import limit_attention


class StudentAttention(nn.Module):
    """A mixer behind the call of the family's attention module.

    Args:
        mixer: the linear layer.
        rope: rotate queries and keys where the family passes `position_embeddings`.
        dropout: behind the output projection.
        layer_idx: its number among the blocks.
        scaling: what the original multiplies q . k by. With `window`, for comparisons with its softmax.
        window: how many tokens the original attends to, itself included; None: all.
    """

    def __init__(
        self,
        mixer: ReGLAAttention,
        *,
        rope: bool,
        dropout: nn.Module,
        layer_idx: int,
        scaling: float,
        window: int | None,
    ):
        super().__init__()
        self.mixer, self.rope, self.dropout, self.layer_idx = mixer, rope, dropout, layer_idx
        self.scaling, self.window = scaling, window

    def forward(
        self,
        hidden_states: Tensor,
        *,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Cache | None = None,
        layer_past: Cache | None = None,
        cache: Cache | None = None,
        regla_tokens: LinearTokens = LinearTokens(),  # noqa: B008  # a tuple
        **_: Any,
    ) -> tuple[Tensor, None]:
        """
        Args:
            hidden_states: [B, T, hidden_size].
            position_embeddings: (cos, sin) of RoPE, each [B or 1, T, rotated channels].
            past_key_values, layer_past, cache: names of families for a cache that `adopt_cache` has seen.
            regla_tokens: which tokens are real and where packed documents begin.

        Returns:
            [B, T, hidden_size], and None in place of attention weights.
        """
        caches = [one for one in (past_key_values, layer_past, cache) if one is not None]
        cached = cast(ReGLACacheLayer, caches[0].layers[self.layer_idx]) if caches else None
        y, state = self.mixer(
            hidden_states,
            rotary=position_embeddings if self.rope else None,
            window_rotary=position_embeddings,
            mask=regla_tokens.mask,
            cu_seqlens=regla_tokens.cu_seqlens,
            state=None if cached is None else cached.read(),
            return_state=cached is not None,
            overwrite_state=cached is not None,
        )
        if cached is not None:
            cached.write(state, hidden_states.shape[1])
        return self.dropout(y), None

    def mix(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        """What `forward` gives for whole texts x [B, T, hidden_size], without the dropout."""
        y: Tensor = self.mixer(x, rotary=rotary if self.rope else None, window_rotary=rotary)[0]
        return y


class OriginalNorm(nn.Module):
    """An original's normalisation of queries or keys [B, T, H, K]: of each head, or of all heads as one vector."""

    def __init__(self, norm: nn.Module, kind: str):
        super().__init__()
        self.original, self.kind = norm, kind

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.original(x if self.kind == "head" else x.flatten(-2))
        return y.view(x.shape)


def student_attention(attention: nn.Module, family: Family, config: Any, number: int) -> StudentAttention:
    """What takes the place of an original's attention module in block `number` of a student with this configuration;
    norms and dropout move over."""
    biases = [projection.bias is not None for projection in family.qkv(attention, heads_of(config))]
    out = attention.get_submodule(family.out)
    linear = config.linear_config
    mixer = linear_mixer(linear, number, bias=any(biases), out_bias=out.bias is not None)
    if mixer.window is not None:
        mixer.window.scale = cast(float, attention.scaling)
    if family.norm is not None:
        for name in ("q_norm", "k_norm"):
            setattr(mixer, name, OriginalNorm(attention.get_submodule(name), family.norm))
    return StudentAttention(
        mixer,
        rope=linear.linear_rope,
        dropout=attention.get_submodule(family.dropout) if family.dropout else nn.Identity(),
        layer_idx=number,
        scaling=cast(float, attention.scaling),
        window=window(config) if softmax_kinds(config)[number] == "sliding_attention" else None,
    )


class Student(Generation):
    """What is mixed into an original's classes."""

    original_class: Any
    config: Any
    _is_stateful = True  # a recurrent state cannot be cropped, so no assisted generation

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        base = self.base_model  # type: ignore[attr-defined]
        if not isinstance(base, Student):  # the original's constructor made it; generic heads ask AutoModel
            base.__class__ = student_class(cast(Any, type(base)))
        if "linear_config" not in vars(base):
            base._replace_attention()
        self.linear_config = base.linear_config
        self.post_init()  # type: ignore[attr-defined]

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # transformers reads the source of the class.
        return bool(cls.original_class._can_set_attn_implementation())

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return bool(cls.original_class._can_set_experts_implementation())

    def _replace_attention(self) -> None:
        self.linear_config = self.config.linear_config
        model = cast(PreTrainedModel, self)
        family = family_of(self.config)
        for number in self.config.linear_layers:
            new = student_attention(family.attention_of(model, number), family, self.config, number)
            family.replace_attention(model, number, new)
        windowed = self.config.windowed
        for number in windowed["layers"] if windowed else ():
            limit_attention(family.attention_of(model, number), windowed["window"], windowed["sinks"])

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:
        with frequencies_kept(cast(nn.Module, self)):
            return super()._apply(fn, *args, **kwargs)  # type: ignore[misc]

    def _init_weights(self, module: nn.Module) -> None:
        """A mixer starts as `regla.layers.init.init_linear_attention` says, all else as in the original."""
        if isinstance(module, ReGLAAttention):
            config = self.linear_config
            init_linear_attention(
                module,
                std=config.initializer_range,
                gate_bias=config.gate_bias,
                refine_bias=config.refine_bias,
                gate_half_life=config.gate_half_life,
                gate_half_life_over=config.gate_half_life_over,
            )
        else:
            super()._init_weights(module)  # type: ignore[misc]

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # As in ReGLAPreTrainedModel: transformers would pass over mixers, which hold no parameter themselves.
        super()._initialize_weights(module, is_custom_code=False)  # type: ignore[misc]

    create_masks_for_generate = staticmethod(masks_for_generate)


@functools.cache
def student_class(original: Any) -> Any:
    """The class of students in an original's class: its base model, or one with a head."""
    name = PREFIX + original.__name__
    config_class = student_config_class(original.config_class)
    members: dict[str, Any] = {
        "__module__": __name__,
        "__doc__": original.__doc__,
        "config_class": config_class,
        "original_class": original,
    }
    if _is_base_model(original):
        members["forward"] = _forward(original)
    cls = type(name, (Student, original), members)
    setattr(sys.modules[__name__], name, cls)
    # transformers does so for the class of a model as it is constructed, which is not yet this one for a base model.
    dict.__setitem__(_CAN_RECORD_REGISTRY, str(cls), cls._can_record_outputs)  # type: ignore[attr-defined]
    return cls


def publish_models(config_class: Any) -> None:
    """Make the models of a student's configuration class known to transformers' Auto classes."""
    for auto in AUTO_CLASSES:
        known = getattr(transformers, auto)._model_mapping
        if config_class.original_class in known:
            publish(auto, config_class, student_class(known[config_class.original_class]))


def _is_base_model(original: type[PreTrainedModel]) -> bool:
    known: Any = transformers.AutoModel._model_mapping
    return original is known[original.config_class]


def _forward(original: type[PreTrainedModel]) -> Any:
    """The base model's forward, behind the preparation of what it is given."""
    names = list(inspect.signature(original.forward).parameters)[1:]

    @functools.wraps(original.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        check_exporter()
        blocks = family_of(self.config).blocks(self)
        arguments = prepared(self, blocks, dict(zip(names, args, strict=False)) | kwargs)
        # Blocks that are checkpointed drop the cache; without gradients there is nothing to recompute.
        paused = [] if torch.is_grad_enabled() else checkpointed(self, blocks)
        set_checkpointing(paused, False)
        try:
            return original.forward(self, **arguments)
        finally:
            set_checkpointing(paused, True)

    return forward


def linear_attention(model: nn.Module) -> dict[int, StudentAttention]:
    """The linear layers of a student, by their number."""
    return {module.layer_idx: module for module in model.modules() if isinstance(module, StudentAttention)}


def __getattr__(name: str) -> Any:
    """Classes of students by name, such as ReGLALlamaForCausalLM: what pickles and saved folders ask for."""
    original = getattr(transformers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    if isinstance(original, type) and issubclass(original, PreTrainedConfig):
        return student_config_class(original)
    if isinstance(original, type) and issubclass(original, PreTrainedModel):
        return student_class(original)
    raise AttributeError(f"module {__name__} has no {name}")
