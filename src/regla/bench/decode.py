"""Tokens per second of `model.generate` with a static cache, behind contexts of many lengths.

A cache of just the room that is needed is filled with a context of random tokens, in chunks; then `generate` goes on
from there. The time of a token is (t(long) - t(short)) / (long - short) of two calls that generate so many tokens:
what a call costs once, the first token included, does not count. Between calls the cache's count of tokens is set back
to the context, so that every call sees the same length. On a GPU `generate` compiles the model's step by itself.

In turns. The pace of a host that calls a GPU changes by more than what a context costs a model of linear layers. So
one more case has one cache with room for the longest context, and takes the contexts in turns, each repeat all of them:
its rows have the median, over the turns, of a context's time in units of the shortest one's in the same turn.

The floor of a step is the time in which a plain copy moves what every step must: the weights but the embeddings read
once, the cache read once, and the states of linear layers written once.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regla.bench.measure import Case, Row, copy_rate, dtype_name, floor_columns, quantiles
from regla.bench.models import build, configs

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

    from regla.models import ReGLAForCausalLM

BENCHMARK = "bench decode"
CONTEXTS = (1024, 4096, 16384, 65536)
BATCHES = (1, 8, 64)
_PREFILL_TOKENS = 8192  # of all sequences together, in one forward pass
_SHORT, _LONG, _REPEATS = 8, 136, 25


def cases(
    device: torch.device,
    dtype: torch.dtype,
    *,
    quick: bool = False,
    eager: bool = False,
    overrides: Mapping[str, Any] | None = None,
) -> list[Case]:
    """Every batch size and context with the softmax model, then with ReGLA, and that with all contexts in turns;
    `overrides` as in `configs`."""
    configs(max_length=1, quick=quick, overrides=overrides)  # what does not fit is found before anything is measured
    batches, contexts, long = ((1, 2), (16, 64), _SHORT + 8) if quick else (BATCHES, CONTEXTS, _LONG)
    found = []
    for batch in batches:
        for context in contexts:
            for model in ("softmax", "regla"):
                name = f"{model}/batch{batch}/context{context}"
                measure = partial(_measure, model, batch, [context], device, dtype, quick, eager, long, overrides)
                found.append(Case(name, measure))
        measure = partial(_measure, "regla", batch, contexts, device, dtype, quick, eager, long, overrides)
        found.append(Case(f"regla/batch{batch}/in_turns", measure))
    return found


def _measure(
    name: str,
    batch: int,
    contexts: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    quick: bool,
    eager: bool,
    new_tokens: int,
    overrides: Mapping[str, Any] | None,
) -> Iterator[Row | str]:
    from transformers import StaticCache

    compiled = device.type == "cuda" and not eager
    longest = max(contexts)
    own = {"overrides": dict(overrides)} if overrides and name != "softmax" else {}

    def row(context: int) -> Row:
        setting = {"batch": batch, "context": context, "dtype": dtype_name(dtype), "compiled": compiled}
        if len(contexts) > 1:
            setting["in_turns"] = True
        return {"benchmark": BENCHMARK, "subject": name, "setting": setting, **own}

    if compiled:
        torch.compiler.reset()  # else a second length makes the compiler give up fixed shapes
    try:
        rate = copy_rate(device, quick=quick)
        config = configs(max_length=longest + new_tokens, quick=quick, overrides=overrides)[name]
        model = build(config, device, dtype).eval()
        cache = StaticCache(config=config, max_cache_len=longest + new_tokens)
        fill(model, cache, batch, longest)
        each, peak = _time_generate(model, cache, batch, contexts, new_tokens, eager, 5 if quick else _REPEATS)
    except torch.OutOfMemoryError:
        for context in contexts:
            yield row(context) | {"out_of_memory": True}
        return
    held, moved = _cache_bytes(cache)
    moved += sum(p.numel() * p.element_size() for p in model.parameters())
    embeddings = model.get_input_embeddings().weight
    moved -= embeddings.numel() * embeddings.element_size()
    for context, found in zip(contexts, each, strict=True):
        timing = quantiles(found, "clock")
        ratios = [x / shortest for x, shortest in zip(found, each[0], strict=True)]
        yield (
            row(context)
            | {"parameters": model.num_parameters()}
            | timing.as_row()
            | ({"of_shortest": statistics.median(ratios)} if len(contexts) > 1 else {})
            | {"tokens_per_second": batch / timing.p50_us * 1e6}
            | floor_columns(moved, rate, timing.p50_us)
            | {"peak_bytes": peak, "cache_bytes": held}
        )


@torch.no_grad()
def fill(model: ReGLAForCausalLM, cache: Cache, batch: int, context: int) -> None:
    """Let the model read `context` random tokens of each sequence into `cache`, in chunks."""
    chunk = max(1, _PREFILL_TOKENS // batch)
    for start in range(0, context, chunk):
        ids_BC = torch.randint(model.config.vocab_size, (batch, min(chunk, context - start)), device=model.device)
        model(input_ids=ids_BC, past_key_values=cache, use_cache=True, logits_to_keep=1)


def _time_generate(
    model: ReGLAForCausalLM,
    cache: Cache,
    batch: int,
    contexts: Sequence[int],
    new_tokens: int,
    eager: bool,
    repeats: int,
) -> tuple[list[list[float]], int | None]:
    """(seconds of a step behind each context in each turn, peak memory of the device in bytes or None)."""
    cuda = model.device.type == "cuda"
    ids_B1 = torch.randint(model.config.vocab_size, (batch, 1), device=model.device)

    def seconds(context: int, tokens: int) -> float:
        mask_BL = torch.ones(batch, context + 1, dtype=torch.long, device=model.device)
        set_length(cache, context)
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        new_BL = _generate(model, ids_B1, mask_BL, cache, tokens, eager)
        if cuda:
            torch.cuda.synchronize()
        taken = time.perf_counter() - start
        assert new_BL.shape[1] == 1 + tokens
        return taken

    if cuda:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    for context in contexts:
        for _ in range(2):  # compiles, captures
            seconds(context, _SHORT)
        seconds(context, new_tokens)
    each: list[list[float]] = [[] for _ in contexts]
    for _ in range(repeats):
        for context, found in zip(contexts, each, strict=True):
            found.append((seconds(context, new_tokens) - seconds(context, _SHORT)) / (new_tokens - _SHORT))
    return each, torch.cuda.max_memory_allocated() if cuda else None


def _generate(
    model: ReGLAForCausalLM, ids_B1: Tensor, mask_BL: Tensor, cache: Cache, tokens: int, eager: bool
) -> Tensor:
    options: dict[str, Any] = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    return model.generate(
        input_ids=ids_B1, attention_mask=mask_BL, past_key_values=cache, disable_compile=eager, **options
    )


def set_length(cache: Cache, length: int) -> None:
    """Make a filled static cache count `length` tokens: what lies behind them is overwritten.

    States of linear layers stay what they are; their content does not change what a step costs.
    """
    for layer in cache.layers:
        layer.cumulative_length.fill_(length)


def _cache_bytes(cache: Cache) -> tuple[int, int]:
    """(bytes held, bytes a step moves: read once and, of linear layers' states, written once)."""
    from regla.models.cache import ReGLACacheLayer, cache_bytes

    states = [x for layer in cache.layers if isinstance(layer, ReGLACacheLayer) for x in layer.read() or ()]
    written = sum(x.numel() * x.element_size() for x in states if x is not None)
    held = cache_bytes(cache)
    return held, held + written
