"""The command's side of the probes: cells of models, probes, lengths, depths, pairs and gaps; a record of each.

Every model gets the same questions: they come from the seed and the cell alone.
"""

from __future__ import annotations

import difflib
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from regla.eval.probes import text, tokens
from regla.eval.probes.score import Answers, Share, answer_text, answer_tokens, join, share
from regla.runtime.errors import OptionError, check_count, check_seed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROBES = {
    "mqar": "multi-query associative recall (Zoology): P pairs of ids, then their keys again",
    "induction": "what followed this token before",
    "copy": "a random segment again",
    "passkey": "a number hidden in text",
    "needle": "a sentence hidden in text",
    "kv": "one of several facts hidden in text",
}
TEXT_PROBES = ("passkey", "needle", "kv")
_TEXT_ROWS = 8  # prompts at a time, whose logits are of the last token alone

DISTANCE = 16  # tokens of a bin of distances


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to ask.

    Raises:
        ValueError: a probe that does not exist, or numbers that cannot be.
    """

    probes: tuple[str, ...]
    lengths: tuple[int, ...] = (256,)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    pairs: tuple[int, ...] = (4, 16)
    gaps: tuple[int, ...] = (0,)
    limit: int = 100
    """Sequences of a cell."""
    seed: int = 0

    def __post_init__(self) -> None:
        for probe in self.probes:
            if probe not in PROBES:
                near = difflib.get_close_matches(probe, PROBES, n=1, cutoff=0)
                raise OptionError(
                    "{probes} has {name!r}, which does not exist; the nearest is {near!r}, and all are {all}.",
                    name=probe,
                    near=near[0],
                    all=", ".join(PROBES),
                )
        for name in ("probes", "lengths", "depths", "pairs", "gaps"):
            if not getattr(self, name):
                raise OptionError(f"{{{name}}} is empty; name at least one, or leave it out.")
        for name, least in (("lengths", 1), ("pairs", 1), ("gaps", 0)):
            for value in getattr(self, name):
                check_count(name, value, least=least)
        for depth in self.depths:
            if not 0 <= depth <= 1:
                raise OptionError(
                    "{depths} has {depth:g}, expected 0 (the beginning) to 1 (right before the question).", depth=depth
                )
        check_count("limit", self.limit, least=2)  # one sequence has no standard error
        check_seed(self.seed)

    def cells(self) -> Iterator[Cell]:
        for probe in self.probes:
            for length in self.lengths:
                if probe == "mqar":
                    fitting = [(p, g) for p in self.pairs for g in self.gaps if 4 * p + g <= length]
                    if not fitting:
                        tokens.check_mqar(min(self.pairs), min(self.gaps), length=length, vocab_size=2**31)
                    for pairs, gap in fitting:
                        yield Cell(probe=probe, length=length, pairs=pairs, gap=gap)
                elif probe == "kv":
                    for pairs in self.pairs:
                        yield Cell(probe=probe, length=length, pairs=pairs)
                elif probe == "copy":
                    yield Cell(probe=probe, length=length)
                else:
                    for depth in self.depths:
                        yield Cell(probe=probe, length=length, depth=depth)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Questions of one kind."""

    probe: str
    length: int
    pairs: int | None = None
    gap: int | None = None
    depth: float | None = None

    @property
    def name(self) -> str:
        parts = [f"{value:g} {name}" for name, value in (("pairs", self.pairs), ("gap", self.gap)) if value is not None]
        return ", ".join(parts + ([] if self.depth is None else [f"depth {self.depth:g}"])) or "-"

    def seed(self, seed: int) -> np.random.Generator:
        return np.random.default_rng([seed, zlib.crc32(repr(self).encode())])


@dataclass(frozen=True, kw_only=True)
class Record:
    """What one model did in one cell."""

    model: str
    probe: str
    length: int
    pairs: int | None
    gap: int | None
    depth: float | None
    n: int
    """Answers."""
    sequences: int
    chance: float
    """Of `likelihood`; that of `generation` is about 0."""
    likelihood: float
    likelihood_se: float
    generation: float
    generation_se: float
    nats: float
    """Mean -ln p of the right answer."""
    nats_se: float
    by_distance: tuple[dict[str, Any], ...] = ()
    """Of mqar: {first, last, n, generation, generation_se, ...} by the tokens between a value and its query."""


def run_cell(
    model: PreTrainedModel,
    name: str,
    cell: Cell,
    *,
    limit: int,
    seed: int,
    haystack: text.Haystack | None,
    vocab_size: int,
    batch_size: int = 16,
    dtype: str = "float32",
) -> Record:
    """Ask `limit` sequences of one cell. haystack: for probes in text; vocab_size: ids to draw from."""
    rng = cell.seed(seed)
    if cell.probe in TEXT_PROBES:
        assert haystack is not None
        parts, chance = [], 1.0
        for start in range(0, limit, _TEXT_ROWS):
            prompts = _prompts(cell, rng, haystack, min(_TEXT_ROWS, limit - start))
            chance = prompts.chance
            parts.append(answer_text(model, prompts.ids_BT, prompts.candidates, dtype=dtype))
        return record(name, cell, join(parts), chance)
    asked = _asked(cell, rng, limit, vocab_size)
    answers = answer_tokens(model, asked, batch_size=batch_size, dtype=dtype)
    return record(name, cell, answers, asked.chance)


def _prompts(cell: Cell, rng: np.random.Generator, haystack: text.Haystack, rows: int) -> text.Prompts:
    if cell.probe == "kv":
        assert cell.pairs is not None
        return text.key_values(rng, haystack, rows=rows, length=cell.length, pairs=cell.pairs)
    assert cell.depth is not None
    make: Callable[..., text.Prompts] = {"passkey": text.passkey, "needle": text.needle}[cell.probe]
    return make(rng, haystack, rows=rows, length=cell.length, depth=cell.depth)


def _asked(cell: Cell, rng: np.random.Generator, rows: int, vocab_size: int) -> tokens.Asked:
    size = {"rows": rows, "length": cell.length, "vocab_size": vocab_size}
    if cell.probe == "mqar":
        assert cell.pairs is not None and cell.gap is not None
        return tokens.mqar(rng, **size, cells=[(cell.pairs, cell.gap)])
    if cell.probe == "induction":
        assert cell.depth is not None
        return tokens.induction(rng, **size, depths=[cell.depth])
    return tokens.copy(rng, **size)


def record(model: str, cell: Cell, answers: Answers, chance: float) -> Record:
    return Record(
        model=model,
        **asdict(cell),
        chance=chance,
        **figures(answers),
        by_distance=tuple(by_distance(answers)) if cell.probe == "mqar" else (),
    )


def figures(answers: Answers) -> dict[str, Any]:
    """n, sequences, and means with standard errors, None where one sequence alone was asked."""
    found: dict[str, Any] = {"n": len(answers.row_N), "sequences": len(answers.row_N.unique())}
    for name in ("likelihood", "generation", "nats"):
        values_N: Tensor = getattr(answers, f"{name}_N")
        mean: Share = share(values_N, answers.row_N)
        found |= {name: mean.mean, f"{name}_se": None if math.isnan(mean.se) else mean.se}
    return found


def by_distance(answers: Answers, width: int = DISTANCE) -> Iterator[dict[str, Any]]:
    """Figures of bins of `width` tokens between the answer's first appearance and the question; empty ones left out."""
    bin_N = answers.distance_N // width
    for index in bin_N.unique().tolist():
        yield {"first": index * width, "last": (index + 1) * width - 1} | figures(answers.of(bin_N == index))


def training_cells(pairs: Sequence[int], gaps: Sequence[int], *, length: int, vocab_size: int) -> list[Cell]:
    """What a model that is trained on mqar is scored on: every (pairs, gap) that fits."""
    fitting = tokens.fitting_cells(pairs, gaps, length=length, vocab_size=vocab_size)
    return [Cell(probe="mqar", length=length, pairs=p, gap=g) for p, g in fitting]
