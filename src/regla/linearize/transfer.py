"""The proof that a conversion moved the weights to the right places, made before anything is trained.

Softmax attention, run through the projections of the new mixers, has to give the original's logits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

from regla.layers import ReGLAAttention
from regla.layers.positions import apply_rotary
from regla.models import ReGLAForCausalLM
from regla.runtime.device import float32_products


class SoftmaxThroughMixer(nn.Module):
    """Causal softmax attention by a mixer's own q, k, v and o projections, head layout and RoPE; for checks alone."""

    def __init__(self, mixer: ReGLAAttention) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, x: Tensor, *, rotary: tuple[Tensor, Tensor] | None = None, **_: Any) -> tuple[Tensor, None]:
        mixer, (B, T, _hidden) = self.mixer, x.shape
        q = mixer.q_proj(x).view(B, T, mixer.num_heads, mixer.head_dim)
        k = mixer.k_proj(x).view(B, T, mixer.num_kv_heads, mixer.head_dim)
        v = mixer.v_proj(x).view(B, T, mixer.num_kv_heads, mixer.value_head_dim)
        if rotary is not None:
            q, k = apply_rotary(q, *rotary), apply_rotary(k, *rotary)
        # The recurrence lets consecutive groups of query heads share a state; so do these.
        q = q.view(B, T, mixer.num_kv_heads, -1, mixer.head_dim).permute(0, 2, 3, 1, 4)  # [B, H, G, T, K]
        k, v = (y.transpose(1, 2)[:, :, None].expand(-1, -1, q.shape[2], -1, -1) for y in (k, v))
        o = scaled_dot_product_attention(q, k, v, is_causal=True)
        return mixer.o_proj(o.permute(0, 3, 1, 2, 4).reshape(B, T, -1)), None


def linear_layers(model: ReGLAForCausalLM) -> dict[int, nn.Module]:
    """The blocks whose mixer is ReGLA, by their number."""
    return {number: layer for number, layer in enumerate(model.model.layers) if layer.is_linear}


@contextmanager
def softmax_in_place_of_mixers(model: ReGLAForCausalLM, layers: Iterable[int] | None = None) -> Iterator[None]:
    """Within the context the given linear layers (None: all) compute softmax attention through their own weights."""
    found = linear_layers(model)
    linear = [found[number] for number in (found if layers is None else layers)]
    mixers = [cast(ReGLAAttention, layer.self_attn) for layer in linear]
    try:
        for layer, mixer in zip(linear, mixers, strict=True):
            layer.self_attn = SoftmaxThroughMixer(mixer)
        yield
    finally:
        for layer, mixer in zip(linear, mixers, strict=True):
            layer.self_attn = mixer


@torch.no_grad()
@float32_products()
def check_transfer(
    original: PreTrainedModel,
    converted: ReGLAForCausalLM,
    input_ids: Tensor | None = None,
    tolerance: float = 1e-4,
    *,
    layers: Iterable[int] | None = None,
) -> float:
    """Largest difference of logits between the original and softmax through the converted weights, relative to the
    largest |logit|.

    Args:
        original: the Hugging Face causal language model that was converted.
        converted: what `convert` made of it.
        input_ids: [B, T] tokens to compare on. None: 64 random ones.
        tolerance: what the difference may be.
        layers: the linear layers whose weights were transferred; the others compute what they do. None: all.

    Raises:
        ValueError: the difference is above `tolerance`; names the first layer whose output differs.
    """
    if input_ids is None:
        generator = torch.Generator().manual_seed(0)
        input_ids = torch.randint(original.config.vocab_size, (1, 64), generator=generator)
    input_ids = input_ids.to(next(converted.parameters()).device)
    training = original.training, converted.training
    original.eval(), converted.eval()
    try:
        expected = _in_float32(original, input_ids)
        with softmax_in_place_of_mixers(converted, layers):
            actual = _in_float32(converted, input_ids)
    finally:
        original.train(training[0]), converted.train(training[1])
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


def _in_float32(model: PreTrainedModel, input_ids: Tensor) -> Any:
    """What `model` gives, computed in float32 at least: in bfloat16 rounding would hide what a check is to find.

    Weights of a narrower dtype are copied for as long as that takes. RoPE's frequencies are computed anew, since moving
    a model to another dtype rounds them.
    """
    narrow = (torch.bfloat16, torch.float16)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    wide = {name: x.float() for name, x in tensors.items() if x.dtype in narrow}
    for path, module in model.named_modules():
        if hasattr(module, "original_inv_freq"):
            fresh = dict(type(module)(module.config).named_buffers())
            wide |= {f"{path}.{name}": x.to(tensors[f"{path}.{name}"].device) for name, x in fresh.items()}
    kwargs = {"input_ids": input_ids, "use_cache": False, "output_hidden_states": True}
    return functional_call(model, wide, kwargs=kwargs)


def _difference(value: Tensor, expected: Tensor) -> float:
    return ((value.double() - expected.double()).abs().max() / expected.double().abs().max()).item()
