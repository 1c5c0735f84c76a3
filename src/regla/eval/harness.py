"""EleutherAI's lm-eval: its tasks, prompts and scores, with shared prefixes run once. The only importer of lm_eval.

`evaluate_tasks` scores models on tasks. Each answer of a model is written to OUT/answers as it comes, so that the same
command goes on after an interruption, and the tables are written again after each task of each model.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import torch
from lm_eval import tasks as lm_eval_tasks
from lm_eval.api.model import LM
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from regla.data.tokenizer import load_tokenizer
from regla.eval.answers import FOLDER, Answers, answers_file, request_key, samples
from regla.eval.local_tasks import LOCAL_TASKS, local_splits
from regla.eval.prefix import Answer, ContinuationScorer
from regla.models.folders import check_ids, load_model
from regla.report.evaluations import Comparison, TaskScore, plot, table, write_scores
from regla.runtime.device import float32_products, pick_device
from regla.runtime.errors import OptionError, check_count
from regla.runtime.files import alone_in, brief, check_new

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.tasks import TaskDict
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BOOTSTRAP = 1000  # resamples for the standard errors that have no formula: those of perplexities


class PrefixLM(HFLM):
    """lm-eval's own class for Hugging Face models, with log-likelihoods from `ContinuationScorer`.

    Contexts that with their continuation are longer than `max_length` are cut from the left, as in lm-eval.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int, dtype: str
    ) -> None:
        mixed = "bfloat16" if dtype == "bfloat16" else None  # of what is not a log-likelihood
        super().__init__(model, tokenizer=tokenizer, batch_size=batch_size, mixed_precision_dtype=mixed)
        self.scorer = ContinuationScorer(model, batch_size=batch_size, dtype=dtype)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[Answer]:
        """The answers of requests (strings, tokens of the context, tokens of the continuation); the hook of the cache
        gets each as it comes, with the number of tokens cut."""
        pairs, cuts = [], []
        for strings, context, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                raise ValueError(
                    f"The answer {_begin((strings or ('', ''))[1])} has {len(continuation)} tokens; expected at least "
                    f"one and at most the {self.max_length} of the model's context."
                )
            check_ids(self.model, (*context, *continuation), "The prompts")
            cut = max(0, len(context) + len(continuation) - self.max_length - 1)
            pairs.append((context[cut:], continuation))
            cuts.append(cut)
        answers: dict[int, Answer] = {}

        def done(index: int, answer: Answer) -> None:
            answers[index] = answer
            if (strings := requests[index][0]) is not None:  # None in parts of a rolling log-likelihood
                self.cache_hook.add_partial("loglikelihood", strings, (*answer, cuts[index]))
            bar.update()

        with tqdm(total=len(pairs), desc="requests", unit="", leave=False, disable=None) as bar:
            self.scorer.score(pairs, done)
        return [answers[index] for index in range(len(pairs))]


class Remembering(LM):
    """Takes answers from `answers` where it can; the model loads at the first request that is not there."""

    def __init__(self, load: Callable[[], HFLM], answers: Answers) -> None:
        super().__init__()
        self._load, self._answers = load, answers
        self.seconds = 0.0
        """Of computing answers, without loading the model."""

    def loglikelihood(self, requests: list[Instance]) -> list[Answer]:
        return [(answer[0], answer[1]) for answer in self._answer("loglikelihood", requests)]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        return self._answer("loglikelihood_rolling", requests)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        return self._answer("generate_until", requests)

    def _answer(self, kind: str, requests: list[Instance]) -> list[Any]:
        keys = [
            f"{index}" if samples(request.args) else request_key(kind, request.args)
            for index, request in enumerate(requests)
        ]
        missing = {key: request for key, request in zip(keys, requests, strict=True) if key not in self._answers.known}
        computed: dict[str, Any] = {}
        if missing:
            lm = self._load()
            lm.set_cache_hook(self._answers)  # type: ignore[arg-type]
            start = time.perf_counter()
            computed = dict(zip(missing, getattr(lm, kind)(list(missing.values()), disable_tqdm=True), strict=True))
            self.seconds += time.perf_counter() - start
        return [self._answers.known.get(key, computed.get(key)) for key in keys]


def evaluate_tasks(
    models: Sequence[str],
    tasks: Sequence[str],
    *,
    num_fewshot: int | None = None,
    data_dir: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    device: str = "auto",
    dtype: str = "float32",
    out: str | Path | None = None,
    compare_lm_eval: bool = False,
) -> list[TaskScore]:
    """Score models on lm-eval's tasks; print a table and, with `out`, write it.

    Args:
        models: folders, .gguf files or names on the hub.
        tasks: lm-eval's names of tasks, groups or tags.
        num_fewshot: examples in the prompt; None: the task's own number. Tasks that fix it at 0 keep it, as in lm-eval.
        data_dir: take the data from original files in there (see `regla.eval.local_tasks`), not from the hub.
        limit: the first so many items of every task.
        batch_size: sequences at a time.
        device: "auto", "cpu" or "cuda".
        dtype: "float32" or "bfloat16", of matrix products.
        out: folder for answers and results; the same call goes on where one was interrupted.
        compare_lm_eval: score everything with lm-eval's own model class, too, and say what differs.

    Raises:
        ValueError: an argument, a task, a data file, a model or its tokenizer is not what it should be.
    """
    check_count("limit", limit)
    check_count("num_fewshot", num_fewshot, least=0)
    check_count("batch_size", batch_size)
    if len(set(models)) < len(models):
        raise OptionError("A model is named twice; name each once.")
    where = pick_device(device)
    for model in models:
        _tokenizer(model)  # what is wrong with a later model is found before the first one is scored
    loaded = load_tasks(tasks, num_fewshot=num_fewshot, data_dir=data_dir)
    scores: list[TaskScore] = []
    comparisons: list[Comparison] = []
    with float32_products(), contextlib.nullcontext() if out is None else _resumable(out):
        try:
            for model in models:
                _score_model(model, loaded, where, limit, batch_size, dtype, out, compare_lm_eval, scores, comparisons)
        finally:  # what is done is shown, whatever happens to the rest
            if scores:
                print(table(scores))
                for line in [*_cut_lines(scores), *map(str, comparisons)]:
                    print(line)
        if out is not None:
            plot(scores, out)
    return scores


def load_tasks(
    tasks: Sequence[str], *, num_fewshot: int | None = None, data_dir: str | Path | None = None
) -> dict[str, TaskDict]:
    """Tasks with their data, by name; see `evaluate_tasks`.

    Raises:
        ValueError: no task; one that does not exist; data that are not there.
    """
    names = list(dict.fromkeys(name for entry in tasks for name in entry.split(",") if name))
    if not names:
        raise OptionError("{tasks} names no task; give some, as boolq piqa.")
    with _quiet():
        return {name: _load_task(name, names, data_dir, num_fewshot) for name in names}


def score_tasks(
    model: str, tasks: Mapping[str, TaskDict], *, limit: int | None, batch_size: int, device: str, dtype: str
) -> list[TaskScore]:
    """Score one model on tasks that `load_tasks` loaded; prints and writes nothing."""
    scores: list[TaskScore] = []
    with float32_products():
        _score_model(model, tasks, pick_device(device), limit, batch_size, dtype, None, False, scores, [])
    return scores


@contextlib.contextmanager
def _resumable(out: str | Path) -> Iterator[None]:
    """Hold a new folder, or one in which the same was begun."""
    if not (Path(out) / FOLDER).is_dir():
        check_new(out)
        (Path(out) / FOLDER).mkdir(parents=True)
    with alone_in(out, "evaluation"):
        yield


def _score_model(
    model: str,
    loaded: Mapping[str, TaskDict],
    where: torch.device,
    limit: int | None,
    batch_size: int,
    dtype: str,
    out: str | Path | None,
    compare_lm_eval: bool,
    scores: list[TaskScore],
    comparisons: list[Comparison],
) -> None:
    """Append the scores of one model on all tasks, and write them task by task."""
    load = functools.cache(lambda: (load_model(model, where), _tokenizer(model)))
    ours = functools.cache(lambda: PrefixLM(*load(), batch_size=batch_size, dtype=dtype))
    theirs = functools.cache(lambda: _hflm(*load(), batch_size, dtype))
    with contextlib.ExitStack() as files:
        answers = [
            files.enter_context(Answers(None if out is None else answers_file(out, model, dtype, kind)))
            for kind in ("", "lm-eval")[: 1 + compare_lm_eval]
        ]
        for name, task in loaded.items():
            first = _run(model, Remembering(ours, answers[0]), task, limit)
            scores.extend(first.scores)
            if compare_lm_eval:
                second = _run(f"{model} (lm-eval)", Remembering(theirs, answers[1]), task, limit)
                scores.extend(second.scores)
                comparisons.append(_compare(model, name, first, second, answers))
            if out is not None:
                write_scores(scores, out, comparisons)


def _hflm(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int, dtype: str) -> HFLM:
    """lm-eval's own class on a loaded model."""
    mixed = "bfloat16" if dtype == "bfloat16" else None
    return HFLM(model, tokenizer=tokenizer, batch_size=batch_size, mixed_precision_dtype=mixed)


@dataclass(frozen=True)
class _Run:
    scores: list[TaskScore]
    items: dict[tuple[str, int], dict[str, Any]]
    """What lm-eval says about each item, by task and number."""
    requests: list[str]
    seconds: float


def _run(model: str, lm: Remembering, task: TaskDict, limit: int | None) -> _Run:
    """One task (or group of tasks) of one model."""
    for each in task["tasks"].values():
        each.set_fewshot_seed(DEFAULT_OTHER_SEED)
    with _quiet():
        results: Any = evaluate(lm, task, limit=limit, bootstrap_iters=BOOTSTRAP)
    scores, requests = [], []
    for key, metrics in results["results"].items():
        keys = []
        if key in task["tasks"]:
            keys = [request_key(each.request_type, each.args) for each in task["tasks"][key].instances]
        requests += keys
        cut = sum(_is_cut(lm._answers.known.get(request)) for request in keys)
        for metric, value in metrics.items():
            what, comma, chosen = metric.partition(",")
            if not comma or what.endswith("_stderr"):
                continue
            error = metrics.get(f"{what}_stderr,{chosen}")
            scores.append(
                TaskScore(
                    model=model,
                    task=key,
                    num_fewshot=results["n-shot"].get(key),
                    metric=what if chosen == "none" else f"{what} ({chosen})",
                    higher_is_better=results["higher_is_better"].get(key, {}).get(what),
                    value=float(value),
                    stderr=float(error) if isinstance(error, int | float) else None,
                    n=results["n-samples"].get(key, {}).get("effective"),
                    cut=cut,
                )
            )
    items = {
        (key, sample["doc_id"]): {metric: sample[metric] for metric in sample["metrics"]}
        for key, samples in results["samples"].items()
        for sample in samples
    }
    return _Run(scores, items, requests, lm.seconds)


def _is_cut(answer: Any) -> bool:
    return isinstance(answer, list | tuple) and len(answer) == 3 and answer[2] > 0


def _compare(model: str, name: str, first: _Run, second: _Run, answers: Sequence[Answers]) -> Comparison:
    differ = 0
    for key, metrics in first.items.items():
        # Perplexity's parts are log-likelihoods, which have their own column.
        pairs = [(value, second.items[key][metric]) for metric, value in metrics.items() if metric != "perplexity"]
        differ += any(isinstance(one, int | float) and abs(one - other) > 1e-3 for one, other in pairs)
    known = [memory.known for memory in answers]
    likelihoods = [
        [k[request][0] for k in known] for request in first.requests if isinstance(known[0][request], list | tuple)
    ]
    largest = max((abs(one - other) for one, other in likelihoods), default=0.0)
    return Comparison(model, name, len(first.items), differ, largest, first.seconds, second.seconds)


def _cut_lines(scores: Sequence[TaskScore]) -> Iterator[str]:
    for model, task, cut in dict.fromkeys((score.model, score.task, score.cut) for score in scores):
        if cut:
            yield (
                f"{model}, {task}: {cut:,} prompts are longer than the model's context and were cut from the left, as "
                "lm-eval does."
            )


def _load_task(name: str, names: Sequence[str], data_dir: str | Path | None, num_fewshot: int | None) -> TaskDict:
    """One task, group or tag with its data."""
    if data_dir is not None and name not in LOCAL_TASKS:
        raise OptionError(
            "{data_dir} has no data for the task {name!r}{nearest}; with it give some of {known}, without it any task "
            "of lm-eval.",
            name=name,
            nearest=_nearest(name, LOCAL_TASKS),
            known=", ".join(LOCAL_TASKS),
        )
    manager = _task_manager(all(each in LOCAL_TASKS for each in names))
    if name not in manager.all_tasks:
        raise ValueError(
            f"lm-eval has no task {name!r}{_nearest(name, manager.all_tasks)}; `lm_eval ls tasks` lists them."
        )
    if data_dir is None:
        try:
            loaded = manager.load([name])
        except Exception as error:  # whatever a download raises
            raise OptionError(
                "The data of {name} cannot be loaded from the hub ({reason}); check the connection, or give {data_dir} "
                "with the original files.",
                name=name,
                reason=brief(error),
            ) from error
    else:
        loaded = manager.load({"group": f"local {name}", "task": [_local_config(name, data_dir)]})
        loaded = {"tasks": loaded["tasks"]}
    for task in loaded["tasks"].values():
        if task.config.num_fewshot == 0 or num_fewshot is None:
            task.set_config("num_fewshot", task.config.num_fewshot or 0)
            continue
        task.set_config("num_fewshot", num_fewshot)
        pool = len(task.sampler.fewshot_docs()) if num_fewshot else 0
        if num_fewshot >= max(pool, 1):
            raise OptionError(
                "{num_fewshot} is {value}, which needs {least} items to draw from, and {task} has {pool}; give a "
                "smaller number.",
                value=num_fewshot,
                least=num_fewshot + 1,
                task=task.task_name,
                pool=pool,
            )
    return loaded


@functools.cache
def _task_manager(known: bool) -> lm_eval_tasks.TaskManager:
    """lm-eval's index of tasks. It reads 14,000 files; for tasks that we know a few folders are enough."""
    home = Path(lm_eval_tasks.__file__).parent
    folders = sorted({home / task.definition for task in LOCAL_TASKS.values()})
    if known and all(folder.is_dir() for folder in folders):
        manager = lm_eval_tasks.TaskManager(include_defaults=False, include_path=folders)
        if all(name in manager.all_tasks for name in LOCAL_TASKS):
            return manager
    return lm_eval_tasks.TaskManager()


def _local_config(name: str, data_dir: str | Path) -> dict[str, Any]:
    """What of lm-eval's definition changes: where the data come from, and which splits there are."""
    splits = local_splits(name, data_dir)
    scored, _ = LOCAL_TASKS[name].scored
    data = datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split, rows in splits.items()})
    config = {
        "task": name,
        "custom_dataset": lambda **metadata: data,
        "training_split": "train" if "train" in splits else None,
        "validation_split": "validation" if scored == "validation" else None,
        "test_split": "test" if scored == "test" else None,
    }
    if scored == "test" and "train" not in splits:
        config["fewshot_split"] = "test"  # which makes lm-eval leave out the item that is scored
    return config


def _nearest(name: str, known: Sequence[str] | dict[str, Any]) -> str:
    near = difflib.get_close_matches(name, list(known), n=3)
    return f" (nearest: {', '.join(near)})" if near else ""


def _tokenizer(model: str) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(model)
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise ValueError(
            f"The tokenizer of {model} names neither a beginning- nor an end-of-text token, one of which lm-eval puts "
            "before a text without context; set its eos_token."
        )
    return tokenizer


def _begin(text: str) -> str:
    return json.dumps(text if len(text) <= 40 else text[:40] + "...", ensure_ascii=False)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without lm-eval's and datasets' remarks; standard output is for tables."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"  # lm-eval's bootstrap forks processes, also of one that uses a GPU
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before
