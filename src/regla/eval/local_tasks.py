"""Evaluation sets in the files that their authors published, as the columns of the hub's data sets.

lm-eval's task definitions read columns of data sets of the Hugging Face hub. Here each set's original files become the
same columns, so that the same prompts and scores need no network:

    DIR/boolq/dev.jsonl -> {"validation": [{"passage": ..., "question": ..., "label": ...}, ...]}

A file is looked for in the set's folder and below it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regla.runtime.errors import OptionError

Row = dict[str, Any]
Place = tuple[Path, str]
"""A file, and what part of it: "line 3" or "item 3"."""


@dataclass(frozen=True)
class LocalTask:
    """Where one of lm-eval's tasks finds its data."""

    folder: str
    scored: tuple[str, str]
    """The split that lm-eval scores, and its file."""
    train: str | None
    """The file that examples of few-shot prompts come from, if it is there; else they come from the scored split."""
    read: Callable[[Path], list[Row]]
    definition: str
    """The folder of lm-eval's definition, below its own folder of tasks."""


def local_splits(task: str, data_dir: str | Path) -> dict[str, list[Row]]:
    """The scored split of a task and, if its file is there, "train".

    Raises:
        ValueError: no such task or file, or what a file holds is not what it should be, with file and line.
    """
    described = LOCAL_TASKS[task]
    split, name = described.scored
    file = _find(described, name, data_dir)
    if file is None:
        raise OptionError(
            "There is no file {file}, which {task} needs; put the original file there, or leave out {data_dir} to load "
            "it from the hub.",
            file=Path(data_dir) / described.folder / name,
            task=task,
        )
    splits = {split: described.read(file)}
    if described.train is not None and (train := _find(described, described.train, data_dir)) is not None:
        splits["train"] = described.read(train)
    return splits


def _find(task: LocalTask, name: str, data_dir: str | Path) -> Path | None:
    folder = Path(data_dir) / task.folder
    return next(iter(sorted(folder.rglob(name), key=lambda file: (len(file.parts), file))), None)


def _boolq(file: Path) -> list[Row]:
    def row(record: Row, place: Place) -> Row:
        passage = _get(record, place, "passage", str)
        if "title" in record:  # as SuperGLUE, whose copy the hub has, puts it before the passage
            passage = f"{_get(record, place, 'title', str)} -- {passage}"
        answer = _get(record, place, "answer", bool)
        return {"question": _get(record, place, "question", str), "passage": passage, "label": int(answer)}

    return _rows(_lines(file), row)


def _piqa(file: Path) -> list[Row]:
    labels_file = file.with_name(f"{file.stem}-labels.lst")
    labels, records = _text(labels_file).split(), _lines(file)
    if len(labels) != len(records):
        raise ValueError(
            f"{labels_file} has {len(labels)} labels and {file} {len(records)} items; expected one label for each item."
        )
    for number, label in enumerate(labels, start=1):
        if label not in ("0", "1"):
            raise _malformed((labels_file, f"line {number}"), f"a label 0 or 1, not {label!r}")
    rows = _rows(records, lambda record, place: {name: _get(record, place, name, str) for name in _PIQA_TEXTS})
    return [row | {"label": int(label)} for row, label in zip(rows, labels, strict=True)]


def _hellaswag(file: Path) -> list[Row]:
    def row(record: Row, place: Place) -> Row:
        endings = _get(record, place, "endings", list)
        label = _get(record, place, "label", int)
        if len(endings) != 4 or not all(isinstance(ending, str) for ending in endings) or not 0 <= label <= 3:
            raise _malformed(place, "four endings (text) and a label from 0 to 3")
        texts = {name: _get({name: ""} | record, place, name, str) for name in ("ctx_a", "ctx_b")}
        return texts | {
            "activity_label": _get(record, place, "activity_label", str),
            "ctx": _get(record, place, "ctx", str),
            "endings": endings,
            "label": str(label),
        }

    return _rows(_lines(file), row)


def _winogrande(file: Path) -> list[Row]:
    def row(record: Row, place: Place) -> Row:
        fields = {name: _get(record, place, name, str) for name in ("sentence", "option1", "option2", "answer")}
        if fields["answer"] not in ("1", "2") or "_" not in fields["sentence"]:
            raise _malformed(place, 'a sentence with the gap "_" and an answer "1" or "2"')
        return fields

    return _rows(_lines(file), row)


def _truthfulqa(file: Path) -> list[Row]:
    def targets(record: Row, place: Place, name: str) -> Row:
        labels = _get(record, place, name, dict)
        values = list(labels.values())
        if not all(value in (0, 1) for value in values) or 1 not in values:
            raise _malformed(place, f"{name} of answers with labels 0 or 1, one of them 1")
        return {"choices": list(labels), "labels": values}

    def row(record: Row, place: Place) -> Row:
        one = targets(record, place, "mc1_targets")
        if one["labels"][0] != 1 or sum(one["labels"]) != 1:
            raise _malformed(place, "mc1_targets whose first answer alone is labelled 1")
        question = _get(record, place, "question", str)
        return {"question": question, "mc1_targets": one, "mc2_targets": targets(record, place, "mc2_targets")}

    return _rows(_items(file), row)


def _lambada(file: Path) -> list[Row]:
    def row(record: Row, place: Place) -> Row:
        text = _get(record, place, "text", str)
        if " " not in text:
            raise _malformed(place, "a text of two words or more, whose last one is asked for")
        return {"text": text}

    return _rows(_lines(file), row)


def _choices(question: Row, place: Place) -> Row:
    choices = _get(question, place, "choices", list)
    for choice in choices:
        if not isinstance(choice, dict):
            raise _malformed(place, "choices with the fields text and label")
    return {name: [_get(choice, place, name, str) for choice in choices] for name in ("text", "label")}


def _question(record: Row, place: Place) -> tuple[str, Row, str]:
    """Stem, choices and answer key of ARC and OpenBookQA."""
    question = _get(record, place, "question", dict)
    choices, key = _choices(question, place), _get(record, place, "answerKey", str)
    if key.strip() not in choices["label"]:
        raise _malformed(place, f"an answerKey among the labels of the choices, {', '.join(choices['label'])}")
    return _get(question, place, "stem", str), choices, key


def _arc(file: Path) -> list[Row]:
    def row(record: Row, place: Place) -> Row:
        stem, choices, key = _question(record, place)
        return {"question": stem, "choices": choices, "answerKey": key.strip()}

    return _rows(_lines(file), row)


def _openbookqa(file: Path) -> list[Row]:
    def row(record: Row, place: Place) -> Row:
        stem, choices, key = _question(record, place)
        return {"question_stem": stem, "choices": choices, "answerKey": key}

    return _rows(_lines(file), row)


def _sciq(file: Path) -> list[Row]:
    fields = ("question", "support", "distractor1", "distractor2", "distractor3", "correct_answer")
    return _rows(_items(file), lambda record, place: {name: _get(record, place, name, str) for name in fields})


def _copa(file: Path) -> list[Row]:
    def row(record: Row, place: Place) -> Row:
        fields = {name: _get(record, place, name, str) for name in ("premise", "choice1", "choice2", "question")}
        label = _get(record, place, "label", int)
        if fields["question"] not in ("cause", "effect") or label not in (0, 1):
            raise _malformed(place, 'a question "cause" or "effect" and a label 0 or 1')
        return fields | {"label": label}

    return _rows(_lines(file), row)


def _rows(records: Sequence[tuple[Any, Place]], row: Callable[[Row, Place], Row]) -> list[Row]:
    rows = []
    for record, place in records:
        if not isinstance(record, dict):
            raise _malformed(place, "an object with the item's fields")
        rows.append(row(record, place))
    return rows


def _lines(file: Path) -> list[tuple[Any, Place]]:
    """The records of a file with one JSON object a line."""
    records = []
    for number, line in enumerate(_text(file).split("\n"), start=1):
        if line.strip():
            place = (file, f"line {number}")
            try:
                records.append((json.loads(line), place))
            except ValueError as error:
                raise _malformed(place, f"one JSON object a line ({error})") from error
    if not records:
        raise ValueError(f"{file} holds no items; expected one JSON object a line.")
    return records


def _items(file: Path) -> list[tuple[Any, Place]]:
    """The records of a file that is one JSON list."""
    try:
        items = json.loads(_text(file))
    except json.JSONDecodeError as error:
        raise _malformed((file, f"line {error.lineno}"), f"a JSON list of items ({error.msg})") from error
    if not isinstance(items, list) or not items:
        raise _malformed((file, "line 1"), "a JSON list of items")
    return [(item, (file, f"item {number}")) for number, item in enumerate(items, start=1)]


def _text(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror}); put the original file there.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text (byte {error.start}); put the original file there.") from error


_PIQA_TEXTS = ("goal", "sol1", "sol2")
_KINDS = {str: "text", int: "a whole number", bool: "true or false", list: "a list", dict: "an object"}


def _get(record: Row, place: Place, name: str, kind: type) -> Any:
    value = record.get(name)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        found = "it is missing" if name not in record else f"not {json.dumps(value)[:40]}"
        raise _malformed(place, f"the field {name!r} ({_KINDS[kind]}): {found}")
    return value


def _malformed(place: Place, expected: str) -> ValueError:
    file, part = place
    return ValueError(f"{file}, {part}: expected {expected}; put the original file there.")


LOCAL_TASKS = {
    "boolq": LocalTask("boolq", ("validation", "dev.jsonl"), "train.jsonl", _boolq, "super_glue/boolq"),
    "piqa": LocalTask("piqa", ("validation", "valid.jsonl"), "train.jsonl", _piqa, "piqa"),
    "hellaswag": LocalTask(
        "hellaswag", ("validation", "hellaswag_val.jsonl"), "hellaswag_train.jsonl", _hellaswag, "hellaswag"
    ),
    "winogrande": LocalTask("winogrande", ("validation", "dev.jsonl"), "train_xl.jsonl", _winogrande, "winogrande"),
    "truthfulqa_mc1": LocalTask("truthfulqa", ("validation", "mc_task.json"), None, _truthfulqa, "truthfulqa"),
    "truthfulqa_mc2": LocalTask("truthfulqa", ("validation", "mc_task.json"), None, _truthfulqa, "truthfulqa"),
    "lambada_openai": LocalTask("lambada", ("test", "lambada_test.jsonl"), None, _lambada, "lambada"),
    "arc_easy": LocalTask("arc", ("test", "ARC-Easy-Test.jsonl"), "ARC-Easy-Train.jsonl", _arc, "arc"),
    "arc_challenge": LocalTask("arc", ("test", "ARC-Challenge-Test.jsonl"), "ARC-Challenge-Train.jsonl", _arc, "arc"),
    "openbookqa": LocalTask("openbookqa", ("test", "test.jsonl"), "train.jsonl", _openbookqa, "openbookqa"),
    "sciq": LocalTask("sciq", ("test", "test.json"), "train.json", _sciq, "sciq"),
    "copa": LocalTask("copa", ("validation", "val.jsonl"), "train.jsonl", _copa, "super_glue/copa"),
}
