"""One long sequence through a model, chunk by chunk: what the cache holds is all that one chunk tells the next.

    logits_t = f(x_t, state_{t-1}),   state_t = g(x_t, state_{t-1})

equals the full forward pass up to rounding, for every cut into chunks. With ReGLA layers alone the cache has one size
at any length; softmax layers add a key and a value for every token.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regla.runtime.device import precision

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache


@torch.no_grad()
def stream(
    model: PreTrainedModel, ids_1T: Tensor, *, chunk: int, dtype: str = "float32"
) -> Iterator[tuple[Tensor, Any]]:
    """Logits [1, C, V] of each chunk of `chunk` tokens (the last may be shorter), and the cache behind it.

    ids_1T: int64 [1, T], on any device; chunks move to the model's. The cache is one object, changed by the next chunk.
    """
    if chunk <= 0:
        raise ValueError(f"chunk is {chunk}, expected a number of tokens above 0.")
    model.eval()
    cache: Cache | None = None
    for ids_1C in ids_1T.split(chunk, dim=1):
        with precision(model.device, dtype):
            out = model(input_ids=ids_1C.to(model.device), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        yield out.logits, cache
