"""Time and memory of generating from a short prompt, by the number of generated tokens (the paper's figure 5).

Greedy `model.generate` with a cache that grows with the text, as transformers makes it unless told otherwise, in one
call: the clock and the peak of the device's memory are read as the text reaches each length. `regla bench decode` times
a compiled step with a static cache instead.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import Cache

from regla.models.cache import CACHE, cache_bytes
from regla.models.modeling import ReGLAForCausalLM

PROMPT = 5
_WARM_UP = 8


class _Marks(StoppingCriteria):
    """Reads clock and memory at each length; ends nothing."""

    def __init__(self, lengths: Sequence[int], device: torch.device, cache: Cache) -> None:
        self.lengths, self.device, self.cache = set(lengths), device, cache
        self.rows: list[dict[str, Any]] = []
        self.began = self._now()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        tokens = input_ids.shape[1] - PROMPT
        if tokens in self.lengths:
            peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None
            found = {"tokens": tokens, "seconds": self._now() - self.began, "peak_bytes": peak}
            self.rows.append(found | {"cache_bytes": cache_bytes(self.cache)})
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


@torch.no_grad()
def generation(model: ReGLAForCausalLM, lengths: Sequence[int], *, batch: int = 1) -> list[dict[str, Any]]:
    """[{"tokens", "seconds", "peak_bytes", "cache_bytes"}], one for each number of generated tokens.

    Args:
        model: on its device; the prompt is PROMPT random tokens.
        lengths: numbers of tokens, ascending.
        batch: texts at a time.

    Returns:
        seconds since the call, those of the prompt included; peak_bytes of the device since the call (None on a CPU);
        cache_bytes held behind so many tokens.
    """
    model.eval()
    device = model.device
    generator = torch.Generator().manual_seed(0)
    prompt_BP = torch.randint(model.config.vocab_size, (batch, PROMPT), generator=generator, device="cpu").to(device)
    call = {"input_ids": prompt_BP, "attention_mask": torch.ones_like(prompt_BP), "do_sample": False}
    model.generate(**call, max_new_tokens=_WARM_UP, min_new_tokens=_WARM_UP)
    if device.type == "cuda":
        gc.collect()  # of what was trained before
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    cache = DynamicCache(config=model.config)
    marks = _Marks(lengths, device, cache)
    options = {"max_new_tokens": lengths[-1], "min_new_tokens": lengths[-1], CACHE: cache}
    model.generate(**call, **options, stopping_criteria=StoppingCriteriaList([marks]))
    return marks.rows
