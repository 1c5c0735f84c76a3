"""Cost of the next token against the length of the context, and the proof that streaming changes nothing."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regla.eval.streaming import stream
from regla.models.cache import cache_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PREFILL_CHUNK = 512


@dataclass(frozen=True)
class DecodingCost:
    """One more token behind a context of `context` tokens."""

    context: int
    milliseconds: float
    """Median."""
    cache_bytes: int


@torch.no_grad()
def decoding_costs(model: PreTrainedModel, contexts: Sequence[int], *, repeats: int = 40) -> list[DecodingCost]:
    """Cost of a token at each of the increasing `contexts`, after one sequence of random tokens that grows to them."""
    model.eval()
    generator = torch.Generator().manual_seed(0)
    cache = None
    seen = 0
    costs = []
    for context in contexts:
        while seen < context:
            length = min(_PREFILL_CHUNK, context - seen)
            ids_1C = torch.randint(model.config.vocab_size, (1, length), generator=generator, device="cpu")
            ids_1C = ids_1C.to(model.device)
            cache = model(input_ids=ids_1C, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
            seen += length
        assert cache is not None
        size = cache_bytes(cache)
        token_11 = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        taken = []
        for _ in range(repeats):
            start = time.perf_counter()
            model(input_ids=token_11, past_key_values=cache, use_cache=True).logits.sum().item()
            taken.append(time.perf_counter() - start)
        seen += repeats
        costs.append(DecodingCost(context, statistics.median(taken) * 1e3, size))
    return costs


@torch.no_grad()
def streaming_difference(model: PreTrainedModel, ids_1T: Tensor, *, chunk: int) -> float:
    """Largest absolute difference of any logit between one full forward pass and the same tokens in chunks."""
    full_1TV = model(input_ids=ids_1T.to(model.device), use_cache=False).logits
    streamed_1TV = torch.cat([logits for logits, _ in stream(model, ids_1T, chunk=chunk)], dim=1)
    return float((full_1TV - streamed_1TV).abs().max())
