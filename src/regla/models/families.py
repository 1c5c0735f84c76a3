"""Where each model family of transformers keeps the parts of its attention: one row of `FAMILIES` each.

A row has what a mixer takes over. All other parts of a model stay the family's own and need no word here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D


class Heads(NamedTuple):
    """Head counts of an attention layer and the channels of a head, the same for queries, keys and values."""

    queries: int
    keys: int
    size: int

    @property
    def rows(self) -> list[int]:
        """Output channels of q, k and v."""
        return [self.queries * self.size, self.keys * self.size, self.keys * self.size]


class Projection(NamedTuple):
    """A linear map y = W x + b."""

    weight: Tensor  # [out, in]
    bias: Tensor | None  # [out]


#: From an attention module to its projections q, k and v, heads one after the other.
Layout = Callable[[nn.Module, Heads], Sequence[Projection]]


def projection(module: nn.Module) -> Projection:
    """The map that a linear module computes. GPT-2's Conv1D keeps its weight transposed."""
    weight, bias = cast(Tensor, module.weight), cast("Tensor | None", module.bias)
    return Projection(weight.T if isinstance(module, Conv1D) else weight, bias)


def separate(attention: nn.Module, heads: Heads) -> list[Projection]:
    """Three modules: q_proj, k_proj and v_proj."""
    return [projection(attention.get_submodule(f"{letter}_proj")) for letter in "qkv"]


def stacked(name: str) -> Layout:
    """One module: the rows of q, then those of k, then those of v."""

    def layout(attention: nn.Module, heads: Heads) -> list[Projection]:
        weight, bias = projection(attention.get_submodule(name))
        biases = [None] * 3 if bias is None else bias.split(heads.rows)
        return [Projection(*parts) for parts in zip(weight.split(heads.rows), biases, strict=True)]

    return layout


def stacked_by_head(name: str) -> Layout:
    """One module: of each head the rows of q, of k and of v ([heads, 3, head size])."""

    def layout(attention: nn.Module, heads: Heads) -> list[Projection]:
        weight, bias = projection(attention.get_submodule(name))
        weights = weight.unflatten(0, (heads.queries, 3, heads.size)).unbind(1)
        biases = [None] * 3 if bias is None else bias.view(heads.queries, 3, heads.size).unbind(1)
        return [
            Projection(weight.flatten(0, 1), None if bias is None else bias.flatten())
            for weight, bias in zip(weights, biases, strict=True)
        ]

    return layout


def _nothing_refused(config: PreTrainedConfig) -> str | None:
    return None


@dataclass(frozen=True, kw_only=True)
class Family:
    """The attention of one family, by names of its modules."""

    layers: str = "layers"
    """The list of blocks, in the base model."""
    attention: str = "self_attn"
    """The attention module, in a block."""
    qkv: Layout = separate
    out: str = "o_proj"
    """The output projection, in the attention module."""
    norm: str | None = None
    """What the modules q_norm and k_norm normalise: each "head" by itself, "all" heads together, or nothing (None)."""
    dropout: str | None = None
    """A dropout behind the output projection, in the attention module."""
    learned_positions: bool = False
    """Whether positions are a table, which ends at max_position_embeddings."""
    refused: Callable[[PreTrainedConfig], str | None] = _nothing_refused
    """Of a configuration: the variant of attention that cannot be converted and what it is set to, or None."""

    def blocks(self, model: PreTrainedModel) -> nn.ModuleList:
        """The blocks of a model, with or without its head."""
        return cast(nn.ModuleList, model.base_model.get_submodule(self.layers))

    def attention_of(self, model: PreTrainedModel, number: int) -> nn.Module:
        """The attention module of block `number`."""
        return self.blocks(model)[number].get_submodule(self.attention)

    def replace_attention(self, model: PreTrainedModel, number: int, new: nn.Module) -> None:
        """Put a module in the place of that one."""
        place, _, name = self.attention.rpartition(".")
        setattr(self.blocks(model)[number].get_submodule(place), name, new)


def _cross_attention(config: Any) -> str | None:
    return "add_cross_attention is True" if config.add_cross_attention else None


def _bidirectional(config: Any) -> str | None:
    return "use_bidirectional_attention is True" if config.use_bidirectional_attention else None


#: By the original's model_type.
FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(norm="head"),
    "qwen3_moe": Family(norm="head"),
    "gemma3_text": Family(norm="head", refused=_bidirectional),
    "olmo2": Family(norm="all"),
    "granite": Family(),
    "phi3": Family(qkv=stacked("qkv_proj")),
    "gpt_neox": Family(attention="attention", qkv=stacked_by_head("query_key_value"), out="dense"),
    "gpt2": Family(
        layers="h",
        attention="attn",
        qkv=stacked("c_attn"),
        out="c_proj",
        dropout="resid_dropout",
        learned_positions=True,
        refused=_cross_attention,
    ),
}


def family_of(config: PreTrainedConfig) -> Family:
    """The row of a configuration, the original's or a student's; KeyError if there is none."""
    return FAMILIES[getattr(config, "original_model_type", config.model_type)]


def blocks_of(model: PreTrainedModel) -> nn.ModuleList:
    """The blocks of a model of our own class, of a student, or of an original."""
    config = model.config
    family = FAMILIES.get(getattr(config, "original_model_type", config.model_type), Family())
    return family.blocks(model)


def last_position(config: PreTrainedConfig) -> int | None:
    """How many tokens a model has positions for; None where positions are computed, or the family has no row."""
    family = FAMILIES.get(getattr(config, "original_model_type", config.model_type))
    return config.max_position_embeddings if family is not None and family.learned_positions else None


def heads_of(config: PreTrainedConfig) -> Heads:
    """Head counts and size, under the names that transformers' configurations agree on."""
    queries = config.num_attention_heads
    keys = getattr(config, "num_key_value_heads", None) or queries
    return Heads(queries, keys, getattr(config, "head_dim", None) or config.hidden_size // queries)


def window(config: PreTrainedConfig) -> int | None:
    """Tokens that a sliding-window layer of an original sees; None if no layer has a window."""
    return config.sliding_window if "sliding_attention" in softmax_kinds(config) else None


def softmax_kinds(config: PreTrainedConfig) -> list[str]:
    """Of each layer of an original: "full_attention", or "sliding_attention" where it has a window."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return list(kinds)
    window = getattr(config, "sliding_window", None)
    return ["full_attention" if window is None else "sliding_attention"] * config.num_hidden_layers
