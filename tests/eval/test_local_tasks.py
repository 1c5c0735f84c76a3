"""Original files become the hub's columns; what is wrong with one is said in a sentence."""

import json
from pathlib import Path

import pytest
from tests.eval.originals import write_originals

from regla.eval.local_tasks import LOCAL_TASKS, local_splits


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_originals(tmp_path / "data")


def first(task: str, data: Path) -> dict:
    (rows,) = local_splits(task, data).values()
    return rows[0]


def test_every_set_is_read(data: Path) -> None:
    for task, described in LOCAL_TASKS.items():
        splits = local_splits(task, data)
        assert set(splits) == {described.scored[0]} and 6 <= len(splits[described.scored[0]]) <= 8, task


def test_columns_are_the_hubs(data: Path) -> None:
    """As `datasets.load_dataset` gives them."""
    passage = "The river was built long ago, and it is said to be older than every other river."
    assert first("boolq", data) == {"question": "is the river old", "passage": passage, "label": 1}
    assert first("piqa", data)["label"] == 0
    assert first("hellaswag", data)["label"] == "0"
    assert first("winogrande", data)["answer"] == "1"
    answers = ["The river is number 0", "The river is number 1", "The river is number 2"]
    assert first("truthfulqa_mc1", data)["mc1_targets"] == {"choices": answers, "labels": [1, 0, 0]}
    assert first("truthfulqa_mc2", data)["mc2_targets"]["labels"] == [1, 1, 0, 0]
    choices = {"text": ["a river at night", "a river of wood"], "label": ["A", "B"]}
    assert first("arc_easy", data) == {"question": "Which river is the oldest?", "choices": choices, "answerKey": "A"}
    expected = {"question_stem": "The river is made", "choices": choices, "answerKey": "A"}
    assert first("openbookqa", data) == expected
    assert first("sciq", data)["support"] == " Every river in the town is made of wood."
    assert first("copa", data)["label"] == 0


def test_a_title_stands_before_the_passage_as_in_superglue(data: Path) -> None:
    file = data / "boolq/dev.jsonl"
    record = json.loads(file.read_text().splitlines()[0])
    file.write_text(json.dumps(record | {"title": "River"}) + "\n")
    assert first("boolq", data)["passage"].startswith("River -- The river was built")


def test_a_train_file_gives_the_examples(data: Path) -> None:
    (data / "boolq/train.jsonl").write_text((data / "boolq/dev.jsonl").read_text())
    assert set(local_splits("boolq", data)) == {"validation", "train"}


CASES = {
    "no JSON": ("boolq", "boolq/dev.jsonl", 2, "{", r"dev.jsonl, line 3: expected one JSON object a line \(Expecting"),
    "no object": (
        "boolq",
        "boolq/dev.jsonl",
        0,
        "[1]",
        r"dev.jsonl, line 1: expected an object with the item's",
    ),
    "a field is missing": (
        "piqa",
        "piqa/valid.jsonl",
        1,
        '{"goal": "a", "sol1": "b"}',
        r"valid.jsonl, line 2: expected the field 'sol2' \(text\): it is missing; put the original file there\.",
    ),
    "another type": (
        "boolq",
        "boolq/dev.jsonl",
        1,
        '{"question": "a", "passage": "b", "answer": "yes"}',
        r"dev.jsonl, line 2: expected the field 'answer' \(true or false\): not \"yes\"",
    ),
    "a label that is none": (
        "piqa",
        "piqa/valid-labels.lst",
        3,
        "2",
        r"valid-labels.lst, line 4: expected a label 0 or",
    ),
    "an answer that is none": (
        "winogrande",
        "winogrande/dev.jsonl",
        0,
        '{"sentence": "a _ b", "option1": "c", "option2": "d", "answer": ""}',
        r'dev.jsonl, line 1: expected a sentence with the gap "_" and an answer "1" or "2"',
    ),
    "three endings": (
        "hellaswag",
        "hellaswag/hellaswag_val.jsonl",
        0,
        '{"activity_label": "a", "ctx": "b", "endings": ["c", "d", "e"], "label": 0}',
        r"hellaswag_val.jsonl, line 1: expected four endings \(text\) and a label from 0 to 3",
    ),
    "an unknown key": (
        "arc_easy",
        "arc/ARC-Easy/ARC-Easy-Test.jsonl",
        1,
        '{"question": {"stem": "a", "choices": [{"text": "b", "label": "A"}]}, "answerKey": "C"}',
        r"ARC-Easy-Test.jsonl, line 2: expected an answerKey among the labels of the choices, A",
    ),
    "a list that ends": ("sciq", "sciq/test.json", 0, "[1 2]", r"test.json, line 1: expected a JSON list of items"),
    "no list": ("sciq", "sciq/test.json", 0, "{}", r"test.json, line 1: expected a JSON list of items"),
    "an item": (
        "truthfulqa_mc1",
        "truthfulqa/mc_task.json",
        0,
        '[{"question": "a"}]',
        r"mc_task.json, item 1: expected",
    ),
    "one word": ("lambada_openai", "lambada/lambada_test.jsonl", 0, '{"text": "a"}', r"line 1: expected a text of two"),
    "no cause": (
        "copa",
        "copa/val.jsonl",
        0,
        '{"premise": "a", "choice1": "b", "choice2": "c", "question": "why", "label": 0}',
        r'val.jsonl, line 1: expected a question "cause" or "effect" and a label 0 or 1',
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_malformed_file_is_named_with_its_line(data: Path, case: str) -> None:
    task, name, line, text, message = CASES[case]
    lines = (data / name).read_text().splitlines()
    lines[line] = text
    (data / name).write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=message):
        local_splits(task, data)


def test_missing_and_unreadable_files(data: Path) -> None:
    (data / "copa/val.jsonl").unlink()
    with pytest.raises(ValueError, match=r"There is no file .*copa.val\.jsonl, which copa needs; put the original"):
        local_splits("copa", data)
    (data / "piqa/valid-labels.lst").write_text("0\n")
    with pytest.raises(ValueError, match=r"valid-labels.lst has 1 labels and .* items; expected one label for each"):
        local_splits("piqa", data)
    (data / "piqa/valid-labels.lst").unlink()
    with pytest.raises(ValueError, match=r"valid-labels.lst cannot be read \(No such file"):
        local_splits("piqa", data)
    (data / "boolq/dev.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"dev.jsonl is not UTF-8 text \(byte 0\)"):
        local_splits("boolq", data)
    (data / "boolq/dev.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"dev.jsonl holds no items"):
        local_splits("boolq", data)
