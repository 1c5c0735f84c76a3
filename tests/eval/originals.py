"""A few items of each evaluation set, in the format and under the names in which their authors published them."""

import json
from pathlib import Path
from typing import Any

WORDS = ("river", "stone", "garden", "engine", "letter", "window", "paper", "market")


def write_originals(folder: Path) -> Path:
    for number, (name, records) in enumerate(RECORDS.items()):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        items = [records(word, index) for index, word in enumerate(WORDS[: 6 + number % 3])]
        text = json.dumps(items) if name.endswith(".json") else "".join(json.dumps(item) + "\n" for item in items)
        file.write_text(text, encoding="utf-8")
    labels = [str(index % 2) for index in range(len((folder / "piqa/valid.jsonl").read_text().splitlines()))]
    (folder / "piqa/valid-labels.lst").write_text("\n".join(labels) + "\n", encoding="utf-8")
    return folder


def _choices(word: str) -> list[dict[str, str]]:
    return [{"text": f"a {word} {end}", "label": label} for end, label in (("at night", "A"), ("of wood", "B"))]


def _arc(word: str, index: int) -> dict[str, Any]:
    question = {"stem": f"Which {word} is the oldest?", "choices": _choices(word)}
    return {"id": f"q{index}", "question": question, "answerKey": "AB"[index % 2]}


def _targets(word: str, count: int) -> dict[str, int]:
    return {f"The {word} is number {answer}": int(answer == 0) for answer in range(count)}


RECORDS = {
    "boolq/dev.jsonl": lambda word, index: {
        "question": f"is the {word} old",
        "answer": index % 3 == 0,
        "passage": f"The {word} was built long ago, and it is said to be older than every other {word}.",
    },
    "piqa/valid.jsonl": lambda word, index: {
        "goal": f"How do I paint a {word} that stands in the rain?",
        "sol1": f"Wait until the {word} is dry.",
        "sol2": f"Put the {word} into the sea.",
    },
    "hellaswag/hellaswag_val.jsonl": lambda word, index: {
        "ind": index,
        "activity_label": f"Moving a {word}",
        "ctx_a": f"A man looks at a {word} for a while.",
        "ctx_b": "he",
        "ctx": f"A man looks at a {word} for a while. he",
        "endings": [f"{verb} the {word} [step] away." for verb in ("takes", "eats", "sings", "reads")],
        "label": index % 4,
        "split": "val",
    },
    "winogrande/dev.jsonl": lambda word, index: {
        "sentence": f"The {word} did not fit into the box because _ was too large.",
        "option1": f"the {word}",
        "option2": "the box",
        "answer": str(1 + index % 2),
    },
    "truthfulqa/mc_task.json": lambda word, index: {
        "question": f"How old is the {word}?",
        "mc0_targets": _targets(word, 2),
        "mc1_targets": _targets(word, 3),
        "mc2_targets": {f"It is a {word}": 1, **_targets(word, 3)},
    },
    "lambada/lambada_test.jsonl": lambda word, index: {"text": f"She went to the {word} and came back with a {word}"},
    "arc/ARC-Easy/ARC-Easy-Test.jsonl": _arc,
    "arc/ARC-Challenge/ARC-Challenge-Test.jsonl": _arc,
    "openbookqa/Data/Main/test.jsonl": lambda word, index: (
        _arc(word, index) | {"question": {"stem": f"The {word} is made", "choices": _choices(word)}}
    ),
    "sciq/test.json": lambda word, index: {
        "question": f"What is a {word} made of?",
        "distractor3": "air",
        "distractor1": "glass",
        "distractor2": "light",
        "correct_answer": "wood",
        "support": f" Every {word} in the town is made of wood.",
    },
    "copa/val.jsonl": lambda word, index: {
        "premise": f"The {word} was closed.",
        "choice1": "It rained.",
        "choice2": "The man opened it.",
        "question": ("cause", "effect")[index % 2],
        "label": index % 2,
        "idx": index,
    },
}
