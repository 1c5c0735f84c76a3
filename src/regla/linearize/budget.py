"""What a conversion will take, computed from configurations alone."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from regla.linearize.config import StagePlan
from regla.linearize.losses import LOGITS
from regla.models.cache import expected_cache_bytes
from regla.report.tables import plain

#: Lengths at which caches are compared.
LENGTHS = (1024, 8 * 1024, 64 * 1024, 512 * 1024)

_ADAM_BYTES = 16  # per parameter in training: float32 weight, gradient, and two moments
_TEACHER_BYTES = 4
_LOGITS = 6  # float32 tensors of that many logits that a distillation step holds at its peak


def parameter_counts(original: PreTrainedConfig, converted: PreTrainedConfig) -> tuple[int, int]:
    """Parameters of both models, tied ones once; builds them without memory for their weights."""
    with torch.device("meta"):
        models = [AutoModelForCausalLM.from_config(config) for config in (original, converted)]
    first, second = (sum(parameter.numel() for parameter in model.parameters()) for model in models)
    return first, second


def budget(
    original: PreTrainedConfig, converted: Any, stages: Sequence[StagePlan], *, batch_size: int, seq_len: int
) -> str:
    """Parameters, memory, tokens and caches, as text."""
    before, after = parameter_counts(original, converted)
    linear = converted.linear_config
    softmax = type(converted).from_dict(converted.to_dict() | {"linear_layers": []}).linear_config
    training = after * _ADAM_BYTES + before * _TEACHER_BYTES
    training += _LOGITS * 4 * min(LOGITS, batch_size * seq_len * original.vocab_size)
    tokens = sum(stage.tokens for stage in stages)
    shares = [
        f"  {stage.name:<24} {stage.tokens:,} ({stage.steps:,} steps of {stage.batch_size} x {stage.seq_len})"
        for stage in stages
    ]
    flops = (6 * after + 2 * before) * tokens
    kinds = linear.layer_types
    lines = [
        f"layers            {len(kinds)}, {kinds.count('linear_attention')} of them to become ReGLA",
        f"parameters        {before:,} now, {after:,} then ({after / before - 1:+.1%})",
        f"weights           {_size(4 * after)} in float32, {_size(2 * after)} in bfloat16",
        f"training tokens   {tokens:,}",
        *shares,
        f"training memory   {_size(training)} and the activations (weights, gradients, Adam, the original, logits)",
        f"training compute  {flops / 1e15:.3g} PFLOP",
        "",
        "cache of one sequence, bfloat16 keys and values:",
    ]
    caches = [
        [
            f"{length // 1024}k tokens",
            *(_size(expected_cache_bytes(config, length)) for config in (softmax, linear)),
        ]
        for length in LENGTHS
    ]
    return "\n".join(lines) + "\n" + plain(["", "original", "converted"], caches)


def seconds_per_sequence(config: PreTrainedConfig, *, batch_size: int, seq_len: int, device: torch.device) -> float:
    """Measured time of one training sequence, forward and backward, of a model of `config` with random weights.

    A GPU runs a whole batch, since one sequence does not fill it; a CPU one sequence. In the caller's autocast.
    """
    model = AutoModelForCausalLM.from_config(config).to(device).train()
    rows = batch_size if device.type == "cuda" else 1
    tokens = torch.zeros(rows, seq_len, dtype=torch.long, device=device)
    for _ in range(2):  # the first one warms up
        start = time.perf_counter()
        model(tokens, labels=tokens).loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
    return seconds / rows


def training_time(seconds: float, *, sequences: int, device: torch.device) -> str:
    """A line of the estimate, from `seconds_per_sequence`. The original runs forward only: a third of both passes."""
    return (
        f"estimated time    {sequences * seconds * 4 / 3 / 60:,.1f} minutes on {device.type}: {sequences:,} "
        f"sequences of {seconds:.3g} s, forward and backward (measured), and a third more for the original"
    )


def _size(count: float) -> str:
    units = ["B", "kB", "MB", "GB", "TB"]
    while count >= 999.5 and len(units) > 1:
        count /= 1000
        units.pop(0)
    return f"{count:.3g} {units[0]}"
