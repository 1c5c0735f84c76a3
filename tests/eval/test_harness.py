"""lm-eval's tasks on our models: the scores of lm-eval's own model class, from whatever files and in however many
attempts."""

import csv
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval", reason="the package lm_eval is not installed: it is in regla's extra eval")
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from tests.eval.originals import write_originals
from transformers import LlamaConfig, LlamaForCausalLM

from regla.cli import main
from regla.data.embedded import embedded_text
from regla.data.tokenizer import load_tokenizer, train_tokenizer
from regla.eval import harness
from regla.eval.answers import Answers
from regla.eval.harness import PrefixLM, Remembering, evaluate_tasks
from regla.eval.local_tasks import LOCAL_TASKS
from regla.models import ReGLAConfig, ReGLAForCausalLM
from regla.models.folders import load_model
from regla.runtime import install

SHAPE = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.3,  # far from uniform predictions
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
KINDS = {
    "pure": lambda: ReGLAForCausalLM(ReGLAConfig(**SHAPE)),
    "hybrid": lambda: ReGLAForCausalLM(
        ReGLAConfig(**SHAPE, layer_types=["linear_attention", "full_attention"], linear_conv_kernel_dim=4)
    ),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_originals(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    tokenizer = train_tokenizer(embedded_text().documents[:3], 300)
    made = {}
    for kind, build in KINDS.items():
        torch.manual_seed(5)
        made[kind] = str(tmp_path_factory.mktemp("models") / kind)
        build().save_pretrained(made[kind])
        tokenizer.save_pretrained(made[kind])
    return made


def load(folder: str):
    return load_model(folder, torch.device("cpu")), load_tokenizer(folder)


def values(scores) -> dict:
    return {(score.task, score.metric): score.value for score in scores}


def prompts(task: str, data: Path, num_fewshot: int | None = None) -> list[list[tuple[str, str]]]:
    """The requests of every item, as lm-eval makes them."""
    (built,) = harness._load_task(task, [task], data, num_fewshot)["tasks"].values()
    built.set_fewshot_seed(1234)
    built.build_all_requests()
    items: dict[int, list[tuple[str, str]]] = {}
    for instance in built.instances:
        items.setdefault(instance.doc_id, []).append(instance.args)
    return list(items.values())


def test_prompts_are_lm_evals(data: Path) -> None:
    passage = "The river was built long ago, and it is said to be older than every other river."
    boolq = f"{passage}\nQuestion: is the river old?\nAnswer:"
    assert prompts("boolq", data)[0] == [(boolq, " no"), (boolq, " yes")]
    context = "Moving a river: A man looks at a river for a while. He"
    assert prompts("hellaswag", data)[0][1] == (context, " eats the river away.")
    assert prompts("winogrande", data)[0] == [
        (f"The river did not fit into the box because {option}", " was too large.")
        for option in ("the river", "the box")
    ]
    assert prompts("lambada_openai", data)[0] == [("She went to the river and came back with a", " river")]
    context, answer = prompts("truthfulqa_mc1", data)[0][2]
    assert context.startswith("Q: What is human life expectancy") and context.endswith(
        "\n\nQ: How old is the river?\nA:"
    )
    assert answer == " The river is number 2"
    copa = ["The river was closed because"] * 2  # lm-eval's answers begin with two spaces here
    assert prompts("copa", data)[0] == list(zip(copa, ["  it rained.", "  the man opened it."], strict=True))
    sciq = "Every river in the town is made of wood.\nQuestion: What is a river made of?\nAnswer:"
    assert prompts("sciq", data)[0][3] == (sciq, " wood")
    assert prompts("openbookqa", data)[0][1] == ("The river is made", " a river of wood")


@pytest.mark.parametrize("task", ["boolq", "lambada_openai", "arc_easy"])
def test_examples_leave_out_the_item_that_is_scored(task: str, data: Path) -> None:
    """As many examples as there are other items: each prompt holds every text but its own, whatever the split."""
    items = prompts(task, data, 0)
    with_examples = prompts(task, data, len(items) - 1)
    bare = [item[0][0] for item in items]
    for index, item in enumerate(with_examples):
        assert all(item[0][0].count(text) == 1 for text in bare), index
    assert with_examples == prompts(task, data, len(items) - 1)  # a fixed seed
    with pytest.raises(ValueError, match=rf"num_fewshot is {len(items)}, which needs {len(items) + 1} items to draw"):
        harness._load_task(task, [task], data, len(items))


def test_examples_come_from_a_train_file(data: Path, tmp_path: Path) -> None:
    (tmp_path / "boolq").mkdir()
    (tmp_path / "boolq/dev.jsonl").write_text((data / "boolq/dev.jsonl").read_text())
    (tmp_path / "boolq/train.jsonl").write_text((data / "boolq/dev.jsonl").read_text().replace("river", "planet"))
    assert all("planet" in item[0][0] or "stone" in item[0][0] for item in prompts("boolq", tmp_path, 5))
    assert not any(item[0][0].count("river old?") > 1 for item in prompts("boolq", tmp_path, 5))


@pytest.mark.parametrize(("kind", "num_fewshot"), [("pure", None), ("hybrid", 3), ("llama", 2)])
def test_scores_are_those_of_lm_evals_own_class(kind, num_fewshot, folders, data, tmp_path) -> None:
    """Every task, at another batch size than one."""
    scores = evaluate_tasks([folders[kind]], list(LOCAL_TASKS), num_fewshot=num_fewshot, data_dir=data, batch_size=5,
                            device="cpu", out=tmp_path / "out", compare_lm_eval=True)  # fmt: skip
    ours, theirs = (
        {key: score for score in scores if score.model == name for key in [(score.task, score.metric)]}
        for name in (folders[kind], f"{folders[kind]} (lm-eval)")
    )
    assert {task for task, _ in ours} == set(LOCAL_TASKS) and set(ours) == set(theirs)
    for key, score in ours.items():
        assert score.value == pytest.approx(theirs[key].value, rel=1e-4), key
        assert score.n == theirs[key].n and score.cut == theirs[key].cut == 0
    comparisons = json.loads((tmp_path / "out/results.json").read_text())["comparisons"]
    assert [comparison["task"] for comparison in comparisons] == list(LOCAL_TASKS)
    assert all(comparison["items_that_differ"] == 0 for comparison in comparisons)
    assert all(0 <= comparison["largest_difference"] < 1e-3 for comparison in comparisons)


@pytest.mark.parametrize("kind", ["pure", "hybrid"])
def test_a_saved_folder_scores_alike_in_plain_lm_eval_at_any_batch_size(kind, folders, data) -> None:
    """What `lm_eval --model hf --model_args pretrained=FOLDER,trust_remote_code=True` builds and runs."""
    names = ["boolq", "hellaswag", "lambada_openai"]
    tasks = {}
    for name in names:
        tasks |= harness._load_task(name, names, data, None)["tasks"]
    expected = values(evaluate_tasks([folders[kind]], names, data_dir=data, device="cpu"))
    for batch_size in (1, 3, 64):
        model = HFLM(pretrained=folders[kind], trust_remote_code=True, device="cpu", batch_size=batch_size)
        with harness._quiet():
            results = evaluate(model, {"tasks": tasks}, bootstrap_iters=0)["results"]
        for (task, metric), value in expected.items():
            assert results[task][f"{metric},none"] == pytest.approx(value, rel=1e-4), (batch_size, task)
    # Generation pads on the left.
    requests = [
        type("Request", (), {"args": (text, {"until": ["\n"], "max_gen_toks": 5})})()
        for text in ("It", "The long river")
    ]
    alone = [model.generate_until([request], disable_tqdm=True)[0] for request in requests]
    assert model.generate_until(requests, disable_tqdm=True) == alone


class Killed(BaseException):
    pass


def test_an_interrupted_run_goes_on_and_scores_nothing_twice(folders, data, tmp_path, monkeypatch) -> None:
    tasks, options = ["piqa", "hellaswag"], {"data_dir": data, "batch_size": 2, "device": "cpu"}
    expected = values(evaluate_tasks([folders["hybrid"]], tasks, **options))
    scored: list[str] = []
    add = Answers.__setitem__

    def kill_after(number: int):
        def remember(self, request, answer):
            assert request not in scored, "scored twice"
            add(self, request, answer)
            scored.append(request)
            if len(scored) == number:
                raise Killed

        return remember

    for number in (5, 17):  # within the first task and within the second
        monkeypatch.setattr(Answers, "__setitem__", kill_after(number))
        with pytest.raises(Killed):
            evaluate_tasks([folders["hybrid"]], tasks, out=tmp_path, **options)
        (file,) = (tmp_path / "answers").glob("*.jsonl")
        with file.open("ab") as broken:  # as a process that is killed while it writes leaves it
            broken.write(b'{"request": "half')
    assert {row["task"] for row in json.loads((tmp_path / "results.json").read_text())["scores"]} == {"piqa"}
    monkeypatch.setattr(Answers, "__setitem__", kill_after(-1))
    scores = evaluate_tasks([folders["hybrid"]], tasks, out=tmp_path, **options)
    assert values(scores) == expected
    assert len(scored) == len(set(scored)) == len(file.read_text().splitlines())
    monkeypatch.setattr(harness, "load_model", None)  # all is answered: no model is needed
    assert values(evaluate_tasks([folders["hybrid"]], tasks, out=tmp_path, **options)) == expected


def test_a_model_that_was_trained_again_is_scored_again(folders, data, tmp_path) -> None:
    folder = tmp_path / "model"
    KINDS["pure"]().save_pretrained(folder)
    train_tokenizer(["a text"], 300).save_pretrained(folder)

    def run() -> dict:
        return values(
            evaluate_tasks([str(folder)], ["lambada_openai"], data_dir=data, device="cpu", out=tmp_path / "out")
        )

    before = run()
    KINDS["pure"]().save_pretrained(folder)
    assert run() != before


def test_a_folder_of_something_else_is_refused(folders, data, tmp_path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"is not empty; give out a new folder"):
        evaluate_tasks([folders["pure"]], ["boolq"], data_dir=data, out=tmp_path)


def test_tables_of_several_models(folders, data, tmp_path, capsys) -> None:
    models = [folders["pure"], folders["llama"]]
    out = tmp_path / "out"
    arguments = ["eval", *models, "--tasks", "boolq,lambada_openai", "--data-dir", str(data), "--limit", "4",
                 "--out", str(out), "--device", "cpu"]  # fmt: skip
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed == (out / "results.md").read_text()
    header, _, *rows = printed.splitlines()
    assert header == f"| task | shots | metric | n | {models[0]} | {models[1]} |"
    assert [row.split(" | ")[:4] for row in rows] == [
        ["| boolq", "0", "acc", "4"],
        ["| lambada_openai", "0", "perplexity", "4"],
        ["| lambada_openai", "0", "acc", "4"],
    ]
    scores = json.loads((out / "results.json").read_text())["scores"]
    assert len(scores) == 6
    accuracy = scores[0]
    assert accuracy["stderr"] == pytest.approx((accuracy["value"] * (1 - accuracy["value"]) / 3) ** 0.5)  # n - 1
    with (out / "results.csv").open() as file:
        assert [float(row["value"]) for row in csv.DictReader(file)] == [score["value"] for score in scores]
    assert (out / "results.png").read_bytes().startswith(b"\x89PNG")


def test_long_prompts_are_cut_and_counted(folders, data, tmp_path, capsys) -> None:
    """From the left, as lm-eval does, with its scores; and said."""
    folder = tmp_path / "short"
    torch.manual_seed(5)
    LlamaForCausalLM(LlamaConfig(**SHAPE, max_position_embeddings=40)).save_pretrained(folder)
    train_tokenizer(embedded_text().documents[:3], 300).save_pretrained(folder)
    options = {"data_dir": data, "device": "cpu", "out": tmp_path / "out"}
    scores = evaluate_tasks([str(folder)], ["boolq", "copa"], compare_lm_eval=True, **options)
    assert [score.cut > 0 for score in scores if score.model == str(folder)] == [True, False]
    comparisons = json.loads((tmp_path / "out/results.json").read_text())["comparisons"]
    assert all(comparison["largest_difference"] < 1e-3 for comparison in comparisons)
    sentence = (
        f"{folder}, boolq: 12 prompts are longer than the model's context and were cut from the left, as lm-eval does."
    )
    assert sentence in capsys.readouterr().out
    again = evaluate_tasks([str(folder)], ["boolq"], **options)  # from the file
    assert again[0].cut == 12


def test_an_answer_longer_than_the_context_is_refused(folders) -> None:
    model, tokenizer = load(folders["llama"])
    lm = PrefixLM(model, tokenizer, batch_size=2, dtype="float32")
    lm._max_length = 8
    with pytest.raises(
        ValueError, match=r'The answer " long" has 9 tokens; expected at least one and at most the 8 of'
    ):
        lm._loglikelihood_tokens([(("a", " long"), [1], [2] * 9)])
    with pytest.raises(ValueError, match=r"The prompts hold id 300, but the model's vocab_size is 300"):
        lm._loglikelihood_tokens([(("a", "b"), [300], [2])])


def test_generated_and_rolling_answers_are_remembered(folders, tmp_path) -> None:
    model, tokenizer = load(folders["pure"])
    rolling = [type("Request", (), {"args": (text,)})() for text in ("It is a long river.", "It rained.")]
    generating = [type("Request", (), {"args": ("It", {"until": ["\n"], "max_gen_toks": 4})})()]
    with Answers(tmp_path / "answers.jsonl") as answers:
        lm = Remembering(lambda: PrefixLM(model, tokenizer, batch_size=2, dtype="float32"), answers)
        first = lm.loglikelihood_rolling(rolling), lm.generate_until(generating)
        expected = HFLM(model, tokenizer=tokenizer, batch_size=2).loglikelihood_rolling(rolling, disable_tqdm=True)
        assert first[0] == pytest.approx(expected, rel=1e-5)
    with Answers(tmp_path / "answers.jsonl") as answers:
        lm = Remembering(lambda: pytest.fail("a model was loaded"), answers)
        assert (lm.loglikelihood_rolling(rolling), lm.generate_until(generating)) == first


ERRORS = {
    "unknown task": (
        ["--tasks", "bolq"],
        r"--data-dir has no data for the task 'bolq' \(nearest: boolq\); with it give",
    ),
    "limit": (["--tasks", "boolq", "--limit", "0"], r"--limit is 0, expected a number above 0\."),
    "shots": (["--tasks", "boolq", "--num-fewshot", "-1"], r"--num-fewshot is -1, expected 0 or more\."),
    "batch": (["--tasks", "boolq", "--batch-size", "0"], r"--batch-size is 0, expected a number above 0\."),
    "no task": (["--tasks", ","], r"--tasks names no task; give some"),
    "no tasks": ([], r"--data-dir goes with --tasks; name some"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_bad_input_is_one_sentence(case, folders, data, capsys) -> None:
    arguments, message = ERRORS[case]
    assert main(["eval", folders["pure"], "--data-dir", str(data), "--device", "cpu", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("regla: error: ")
    assert re.search(message, error), error


def test_a_model_without_a_tokenizer(tmp_path, data) -> None:
    KINDS["pure"]().save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match=r"bare holds no readable tokenizer"):
        evaluate_tasks([str(tmp_path / "bare")], ["boolq"], data_dir=data, device="cpu")


def test_what_is_wrong_with_a_later_model_is_found_first(folders, data, tmp_path, capsys) -> None:
    with pytest.raises(ValueError, match=r"There is no tokenizer folder .*absent"):
        evaluate_tasks([folders["pure"], str(tmp_path / "absent")], ["copa"], data_dir=data, device="cpu")
    assert "copa" not in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"A model is named twice; name each once"):
        evaluate_tasks([folders["pure"]] * 2, ["copa"], data_dir=data, device="cpu")


def test_what_is_done_is_shown_when_a_later_model_fails(folders, data, tmp_path, capsys) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folders["pure"], broken)
    (broken / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"broken holds no readable model"):
        evaluate_tasks([folders["pure"], str(broken)], ["copa"], data_dir=data, device="cpu")
    assert "| copa | 0 | acc |" in capsys.readouterr().out


def test_a_tokenizer_without_a_first_token(tmp_path, data) -> None:
    KINDS["pure"]().save_pretrained(tmp_path / "model")
    tokenizer = train_tokenizer(["a text"], 300)
    tokenizer.bos_token = tokenizer.eos_token = tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"names neither a beginning- nor an end-of-text token"):
        evaluate_tasks([str(tmp_path / "model")], ["boolq"], data_dir=data, device="cpu")


@pytest.mark.slow  # lm-eval reads 14,000 files to list its tasks
def test_unknown_and_unreachable_tasks_of_the_hub(folders) -> None:
    with pytest.raises(ValueError, match=r"lm-eval has no task 'arc_eazy' \(nearest: arc_easy"):
        evaluate_tasks([folders["pure"]], ["arc_eazy"], device="cpu")


def test_data_that_cannot_be_loaded(folders) -> None:
    with pytest.raises(
        ValueError, match=r"The data of copa cannot be loaded from the hub \(.*\); check the connection"
    ):
        evaluate_tasks([folders["pure"]], ["copa"], device="cpu")


def test_lm_eval_that_is_not_installed(monkeypatch, capsys) -> None:
    monkeypatch.setattr(install, "installed", lambda package: package != "lm_eval")
    assert main(["eval", "model", "--tasks", "boolq"]) == 2
    assert capsys.readouterr().err == (
        "regla: error: Tasks of lm-eval need the package lm_eval, which is not installed; "
        'run `pip install "lm_eval>=0.4.13"`.\n'
    )
