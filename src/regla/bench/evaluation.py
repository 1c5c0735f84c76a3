"""What it saves to run a shared prefix once: `ContinuationScorer` with and without sharing, on one model.

A question of P tokens has A answers of a few tokens each. Whole sequences cost A (P + answer) tokens, a shared prefix
P + A answer: with long questions up to A times less.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

import torch

from regla.bench.measure import Case, Row
from regla.bench.models import build, configs
from regla.eval.prefix import Answer, ContinuationScorer, Pair
from regla.models import ReGLAConfig
from regla.train.model import layer_types

ANSWERS, ANSWER_TOKENS = 4, 16
_BATCH = 32
_TURNS = 3


def cases(device: torch.device, dtype: str, *, quick: bool = False) -> list[Case]:
    """The softmax, ReGLA and hybrid models of `regla.bench.models`, behind prefixes of several lengths."""
    prefixes, items = ((40,), 4) if quick else ((128, 512, 2048), 128)
    models = configs(max_length=4096, quick=quick)
    pure = models["regla"]
    types = {"layer_types": layer_types("hybrid", pure.num_hidden_layers)}
    models["hybrid"] = ReGLAConfig(**{**pure.to_dict(), **types})

    def case(subject: str) -> Case:
        return Case(f"eval/{subject}", lambda: measure(subject, models[subject], prefixes, items, device, dtype))

    return [case(subject) for subject in models]


def measure(
    subject: str, config: ReGLAConfig, prefixes: tuple[int, ...], items: int, device: torch.device, dtype: str
) -> Iterator[Row]:
    """Seconds of both ways, taking turns; medians. The answers must be the same up to rounding."""
    model = build(config, device, torch.float32)
    shared, whole = (ContinuationScorer(model, batch_size=_BATCH, dtype=dtype, share=share) for share in (True, False))
    for prefix in prefixes:
        pairs = _pairs(config.vocab_size, items, prefix)
        taken: dict[ContinuationScorer, list[float]] = {shared: [], whole: []}
        answers: dict[ContinuationScorer, dict[int, Answer]] = {shared: {}, whole: {}}
        for turn in range(_TURNS + 1):
            for scorer in (shared, whole):
                start = time.perf_counter()
                scorer.score(pairs, answers[scorer].__setitem__)  # answers are numbers: nothing is left to wait for
                if turn:  # the first one compiles
                    taken[scorer].append(time.perf_counter() - start)
        seconds = {scorer: statistics.median(found) for scorer, found in taken.items()}
        differences = [abs(answers[shared][index][0] - answers[whole][index][0]) for index in range(len(pairs))]
        yield {
            "benchmark": "bench eval",
            "subject": subject,
            "setting": {
                "prefix": prefix,
                "answers": ANSWERS,
                "answer_tokens": ANSWER_TOKENS,
                "items": items,
                "batch": _BATCH,
                "dtype": dtype,
            },
            "parameters": model.num_parameters(),
            "seconds_whole": seconds[whole],
            "seconds_shared": seconds[shared],
            "speed_up": seconds[whole] / seconds[shared],
            "largest_difference": max(differences),
        }


def _pairs(vocab_size: int, items: int, prefix: int) -> list[Pair]:
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(vocab_size, (count,), generator=generator, device="cpu").tolist()

    questions = [tokens(prefix) for _ in range(items)]
    return [(question, tokens(ANSWER_TOKENS)) for question in questions for _ in range(ANSWERS)]
