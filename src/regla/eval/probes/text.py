"""Probes in text, for language models: passkey, needle, key-value. All come from a seed and a text to hide facts in.

    passkey   ... The pass key is 48213. Remember it. ...                What is the pass key? The pass key is
    needle    ... The best thing to do in Lisbon is to fly a kite. ...   The best thing to do in Lisbon is
    kv        ... The code word of Anna is river. ... (several) ...      The code word of Anna is

A prompt has exactly the tokens asked for: the text around the facts is cut to fit. Facts of passkey and needle stand at
`depth`, 0 at the beginning and 1 right before the question; those of kv at random places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CANDIDATES = 10  # of passkey and needle; kv has the values of its context

_CITIES = ("Lisbon", "Oslo", "Cairo", "Lima", "Kyoto", "Dublin", "Prague", "Havana", "Nairobi", "Quito")
_DEEDS = (
    *("to fly a kite", "to ride the old tram", "to drink hot chocolate", "to climb the tower", "to visit the market"),
    *("to listen to jazz", "to feed the birds", "to row on the lake", "to read in the park", "to dance at night"),
)
_NAMES = (
    *("Anna", "Boris", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Iris", "Jack", "Karen", "Leo", "Maria"),
    *("Nathan", "Olga", "Peter", "Quinn", "Rosa", "Simon", "Tina", "Ursula", "Victor", "Wendy", "Xavier", "Yvonne"),
    *("Zoe", "Arthur", "Bella", "Carlos", "Diana", "Edgar", "Fiona", "George", "Hannah", "Igor", "Julia", "Kevin"),
    *("Laura", "Martin", "Nora", "Oscar", "Paula", "Robert", "Sarah", "Thomas", "Vera", "Walter", "Alice", "Bruno"),
    *("Cecil", "Doris", "Erik", "Flora", "Gustav", "Helen", "Ivan", "Jane", "Kurt", "Linda", "Mark", "Nina", "Otto"),
    *("Pam", "Ralph"),
)
_WORDS = (
    *("river", "candle", "mountain", "garden", "silver", "window", "winter", "apple", "bridge", "castle", "dragon"),
    *("engine", "forest", "guitar", "hammer", "island", "jungle", "kitchen", "ladder", "mirror", "needle", "ocean"),
    *("pencil", "queen", "rabbit", "saddle", "temple", "violin", "wagon", "yellow", "anchor", "basket", "copper"),
    *("desert", "eagle", "feather", "glass", "honey", "iron", "jacket", "king", "lemon", "marble", "night", "orange"),
    *("paper", "rocket", "sugar", "tiger", "velvet", "water", "arrow", "bottle", "cotton", "diamond", "flower"),
    *("ginger", "harbour", "ink", "jewel", "lantern", "magnet", "nutmeg", "pepper", "rose", "stone"),
)
MOST_PAIRS = min(len(_NAMES), len(_WORDS))


@dataclass(frozen=True)
class Prompts:
    """Prompts that end right before their answer."""

    ids_BT: Tensor
    """int64."""
    candidates: list[list[list[int]]]
    """C answers for each prompt as ids, the right one first."""

    @property
    def chance(self) -> float:
        return 1 / len(self.candidates[0])


class Haystack:
    """Text in tokens to hide facts in.

    Args:
        ids_N: tokens of a text, int [N]; a shorter one than asked for repeats.
        first: the id that stands before a text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ids_N: np.ndarray, first: int) -> None:
        self.tokenizer, self.ids_N, self.first = tokenizer, ids_N, first

    def tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def answer(self, question: str, answer: str) -> list[int]:
        """The tokens that `answer` adds behind `question`."""
        before, both = self.tokens(question), self.tokens(question + answer)
        return both[len(before) :] if both[: len(before)] == before else self.tokens(answer)

    def prompt(
        self, rng: np.random.Generator, facts: Sequence[tuple[float, str]], question: str, length: int, name: str
    ) -> list[int]:
        """`length` tokens: text from a random place with facts at their depths, and the question."""
        hidden = sorted((depth, self.tokens(fact)) for depth, fact in facts)
        end = self.tokens(question)
        room = length - 1 - len(end) - sum(len(fact) for _, fact in hidden)
        if room < 0:
            raise ValueError(
                f"{name}: facts and question need {length - room} tokens, but the length is {length}; take a "
                "longer one."
            )
        start = int(rng.integers(len(self.ids_N)))
        text = np.take(self.ids_N, np.arange(start, start + room), mode="wrap").tolist()
        ids, done = [self.first], 0
        for depth, fact in hidden:
            at = round(depth * room)
            ids += text[done:at] + fact
            done = at
        return ids + text[done:] + end


def passkey(rng: np.random.Generator, haystack: Haystack, *, rows: int, length: int, depth: float) -> Prompts:
    prompts, candidates = [], []
    question = "\nWhat is the pass key? The pass key is"
    for _ in range(rows):
        keys = rng.choice(90_000, size=CANDIDATES, replace=False) + 10_000
        fact = f"\nThe pass key is {keys[0]}. Remember it. {keys[0]} is the pass key.\n"
        prompts.append(haystack.prompt(rng, [(depth, fact)], question, length, "passkey"))
        candidates.append([haystack.answer(question, f" {key}") for key in keys])
    return Prompts(torch.tensor(prompts), candidates)


def needle(rng: np.random.Generator, haystack: Haystack, *, rows: int, length: int, depth: float) -> Prompts:
    prompts, candidates = [], []
    for _ in range(rows):
        city = _CITIES[rng.integers(len(_CITIES))]
        deeds = rng.permutation(_DEEDS)
        question = f"\nThe best thing to do in {city} is"
        fact = f"\nThe best thing to do in {city} is {deeds[0]}.\n"
        prompts.append(haystack.prompt(rng, [(depth, fact)], question, length, "needle"))
        candidates.append([haystack.answer(question, f" {deed}") for deed in deeds])
    return Prompts(torch.tensor(prompts), candidates)


def key_values(rng: np.random.Generator, haystack: Haystack, *, rows: int, length: int, pairs: int) -> Prompts:
    if not 2 <= pairs <= MOST_PAIRS:
        raise ValueError(f"kv: {pairs} pairs; expected 2 to {MOST_PAIRS}.")
    prompts, candidates = [], []
    for _ in range(rows):
        names, words = rng.permutation(_NAMES)[:pairs], rng.permutation(_WORDS)[:pairs]
        facts = [
            (float(rng.random()), f"\nThe code word of {name} is {word}.\n")
            for name, word in zip(names, words, strict=True)
        ]
        question = f"\nThe code word of {names[0]} is"
        prompts.append(haystack.prompt(rng, facts, question, length, "kv"))
        candidates.append([haystack.answer(question, f" {word}") for word in words])
    return Prompts(torch.tensor(prompts), candidates)
