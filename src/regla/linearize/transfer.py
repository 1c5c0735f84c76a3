"""The proof that a conversion moved the weights to the right places, made before anything is trained.

Softmax attention, run through the projections of the new mixers, has to give the original's logits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

from regla.layers.norms import normalised
from regla.layers.positions import apply_rotary
from regla.models.families import family_of
from regla.models.student import StudentAttention, linear_attention
from regla.runtime.device import float32_products


def projected(attention: StudentAttention, x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> list[Tensor]:
    """q [B, T, heads, K], k and v [B, T, key heads, K] of a linear layer, as the original's softmax would get them."""
    mixer = attention.mixer
    q, k, v = (
        projection(x).unflatten(-1, (heads, mixer.head_dim))
        for projection, heads in (
            (mixer.q_proj, mixer.num_heads),
            (mixer.k_proj, mixer.num_kv_heads),
            (mixer.v_proj, mixer.num_kv_heads),
        )
    )
    q, k = normalised(mixer.q_norm, q), normalised(mixer.k_norm, k)
    if rotary is not None:
        q, k = apply_rotary(q, *rotary), apply_rotary(k, *rotary)
    return [q, k, v]


class SoftmaxThroughMixer(nn.Module):
    """Softmax attention by a mixer's own projections, norms and head layout; for checks alone. RoPE, the mask and the
    scaling are the original's."""

    def __init__(self, attention: StudentAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(
        self,
        hidden_states: Tensor,
        *,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        mixer, (B, T, _hidden) = self.attention.mixer, hidden_states.shape
        q, k, v = projected(self.attention, hidden_states, position_embeddings)
        # The recurrence lets consecutive groups of query heads share a state; so do these.
        q = q.view(B, T, mixer.num_kv_heads, -1, mixer.head_dim).permute(0, 2, 3, 1, 4)  # [B, H, G, T, K]
        k, v = (y.transpose(1, 2)[:, :, None].expand(-1, -1, q.shape[2], -1, -1) for y in (k, v))
        mask = None if attention_mask is None else attention_mask[:, :, None]
        o = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.attention.scaling)
        return mixer.o_proj(o.permute(0, 3, 1, 2, 4).reshape(B, T, -1)), None


@contextmanager
def softmax_in_place_of_mixers(model: PreTrainedModel, layers: Iterable[int] | None = None) -> Iterator[None]:
    """Within the context the given linear layers (None: all) compute softmax attention through their own weights."""
    family, found = family_of(model.config), linear_attention(model)
    chosen = {number: found[number] for number in (found if layers is None else layers)}
    try:
        for number, attention in chosen.items():
            family.replace_attention(model, number, SoftmaxThroughMixer(attention))
        yield
    finally:
        for number, attention in chosen.items():
            family.replace_attention(model, number, attention)


@torch.no_grad()
@float32_products()
def check_transfer(
    original: PreTrainedModel,
    converted: PreTrainedModel,
    input_ids: Tensor | None = None,
    tolerance: float = 1e-4,
    *,
    layers: Iterable[int] | None = None,
) -> float:
    """Largest difference of logits between the original and softmax through the converted weights, relative to the
    largest |logit|.

    Args:
        original: the Hugging Face causal language model that was converted.
        converted: the student that `convert` made of it.
        input_ids: [B, T] tokens to compare on. None: 64 random ones, or as many as the original has positions for.
        tolerance: what the difference may be.
        layers: the linear layers whose weights were transferred; the others compute what they do. None: all.

    Raises:
        ValueError: the difference is above `tolerance`; names the first layer whose output differs.
    """
    if input_ids is None:
        generator = torch.Generator().manual_seed(0)
        length = min(64, original.config.max_position_embeddings)
        input_ids = torch.randint(original.config.vocab_size, (1, length), generator=generator, device="cpu")
    input_ids = input_ids.to(next(converted.parameters()).device)
    with _as_to_compare(original), _as_to_compare(converted):
        expected = _in_float32(original, input_ids)
        with softmax_in_place_of_mixers(converted, layers):
            actual = _in_float32(converted, input_ids)
    error = _difference(actual.logits, expected.logits)
    if not error <= tolerance:
        # hidden_states[i + 1] is what layer i gives, except that the last one is behind the final norm.
        pairs = zip(actual.hidden_states[1:], expected.hidden_states[1:], strict=True)
        wrong = [i for i, pair in enumerate(pairs) if not _difference(*pair) <= tolerance]
        where = f"layer {wrong[0]} is the first to differ" if wrong else "all layers agree, the head does not"
        raise ValueError(
            f"softmax through the transferred weights misses the original's logits by {error:.1e} of the largest, more "
            f"than {tolerance:.0e}; {where}: its weights were not transferred as the original uses them"
        )
    return error


@contextmanager
def _as_to_compare(model: PreTrainedModel) -> Iterator[None]:
    """In evaluation mode, and with attention that runs in float32 and is told its mask, as flash attention is not."""
    training, attention = model.training, model.config._attn_implementation
    try:
        model.eval()
        if attention not in ("eager", "sdpa"):
            model.config._attn_implementation = "sdpa"
        yield
    finally:
        model.train(training)
        model.config._attn_implementation = attention


def _in_float32(model: PreTrainedModel, input_ids: Tensor) -> Any:
    """What `model` gives, computed in float32 at least: in bfloat16 rounding would hide what a check is to find.

    Weights of a narrower dtype are copied for as long as that takes. RoPE's frequencies are computed anew, since moving
    a model to another dtype rounds them.
    """
    narrow = (torch.bfloat16, torch.float16)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    wide = {name: x.float() for name, x in tensors.items() if x.dtype in narrow}
    for path, module in model.named_modules():
        if "RotaryEmbedding" in type(module).__name__:
            with torch.device("cpu"):
                fresh = dict(type(module)(module.config).named_buffers())
            wide |= {f"{path}.{name}": x.to(tensors[f"{path}.{name}"].device) for name, x in fresh.items()}
    kwargs = {"input_ids": input_ids, "use_cache": False, "output_hidden_states": True}
    return functional_call(model, wide, kwargs=kwargs)


def _difference(value: Tensor, expected: Tensor) -> float:
    return ((value.double() - expected.double()).abs().max() / expected.double().abs().max()).item()
