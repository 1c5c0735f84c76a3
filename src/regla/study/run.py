"""`regla study`: train a grid of runs, keep a row of each, and write tables and a plot of them."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from regla.data.records import TEXT_FIELD
from regla.data.tokenizer import load_tokenizer, vocabulary_size
from regla.report.studies import row_name, variant_scores
from regla.report.tables import plain
from regla.runtime.errors import OptionError, check_count, check_number
from regla.runtime.files import alone_in
from regla.runtime.processes import check_one_process
from regla.study.data import of_task, prepare
from regla.study.grid import Study, in_order, matches, read_study, sweep_of
from regla.study.page import write_page
from regla.study.queue import Estimate, Place, work
from regla.study.rows import append_line, drop_unfinished_line, read_study_rows
from regla.study.trials import Trial, check_variants, make_trials
from regla.study.worker import ROW
from regla.train.config import DEFAULT_VOCAB_SIZE

ROWS = "rows.jsonl"


def study(
    name_or_file: str,
    *,
    out: str | Path | None = None,
    data: Sequence[str] = (),
    valid: Sequence[str] = (),
    text_field: str = TEXT_FIELD,
    tokenizer: str | None = None,
    device: str = "auto",
    devices: int = 1,
    runs_per_device: int = 1,
    minutes: float | None = None,
    only: Sequence[str] = (),
    sets: Sequence[str] = (),
    rows_file: str | Path | None = None,
    keep_models: bool = False,
    dry_run: bool = False,
    report: bool = False,
) -> list[str]:
    """Train what is left of a study, and write OUT/rows.jsonl, OUT/NAME.md and OUT/NAME.png; the ids that failed.

    name_or_file: a study that is shipped, or the path of a YAML file (see `regla.study.grid`). OUT is `out`, by default
    runs/NAME. Trials whose rows are in
    OUT/rows.jsonl or `rows_file` are done; one that was cut off goes on from its last checkpoint. `minutes` starts no
    trial that would not be done by then. `report` only writes the page, from rows; `dry_run` only prints the grid.

    Raises ValueError for any input that does not fit, before anything trains; Interrupted on Ctrl-C and SIGTERM.
    """
    check_one_process("study")
    check_count("devices", devices)
    check_count("runs_per_device", runs_per_device)
    check_number("minutes", minutes)
    plan = read_study(name_or_file, sets, only)
    out = Path(out or f"runs/{plan.name}")
    if dry_run:
        _print_grid(plan, tokenizer)
        return []
    if report:
        for one in (plan, *([] if plan.sweep is None else [sweep_of(plan)])):
            rows = read_study_rows(out / ROWS if rows_file is None else rows_file, one.name)
            rows = [row for row in rows if matches(row_name(row), only)]
            if rows or one is plan:
                write_page(one, rows, out)
        return []
    vocab_size = None if tokenizer is None else vocabulary_size(load_tokenizer(tokenizer))
    for one in (plan, *([] if plan.sweep is None else [sweep_of(plan)])):
        check_variants(one, one.variants, vocab_size=vocab_size)
    task = _task(plan)
    if task is not None and "inspect" in plan.measured:
        raise ValueError(f"`inspect` of {plan.name} is for models of text, but it trains on the task {task}.")
    for option, given in (("--data", data), ("--valid", valid), ("--tokenizer", tokenizer)):
        if task is not None and given:
            raise ValueError(f"{option} is given, but {plan.name} trains on the task {task}, which has no text.")
    places = _places(device, devices) * runs_per_device
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(
            "{folder} cannot be created ({reason}); give {out} a place you may write to.",
            folder=out,
            reason=error.strerror,
        ) from error
    with alone_in(out, "study"):
        if task is None:
            folder = out / "data"
            tokens = prepare(
                folder,
                data=data,
                valid=valid,
                text_field=text_field,
                tokenizer=tokenizer,
                vocab_size=plan.vocab_size,
            )
        else:
            tokens = of_task(task, plan.vocab_size)
        began = time.perf_counter()

        def train(one: Study) -> tuple[list[str], list[dict[str, Any]]]:
            return _train(
                one,
                make_trials(one, tokens, out=out, device=device),
                out=out,
                places=places,
                minutes=minutes,
                spent=time.perf_counter() - began,
                known=[] if rows_file is None else read_study_rows(rows_file, one.name),
                keep_models=keep_models,
            )

        if plan.sweep is None:
            return train(plan)[0]
        sweep = sweep_of(plan)
        failures, rows = train(sweep)
        if len(rows) < len(in_order(sweep)):
            print(f"{plan.name} itself waits for the runs that are left of its sweep.")
            return failures
        return train(replace(plan, rates=best_rates(rows)))[0]


def _train(
    plan: Study,
    trials: Sequence[Trial],
    *,
    out: Path,
    places: Sequence[Place],
    minutes: float | None,
    spent: float,
    known: Sequence[dict[str, Any]],
    keep_models: bool,
) -> tuple[list[str], list[dict[str, Any]]]:
    """What failed, and the rows of all trials that are done. spent: seconds of `minutes` that are over."""
    drop_unfinished_line(out / ROWS)
    (out / ROWS).touch()
    rows = {row["id"]: row for row in (*known, *read_study_rows(out / ROWS, plan.name))}
    waiting = [trial for trial in trials if trial.id not in rows]
    estimate = Estimate()
    for trial in trials:
        if trial.id in rows and not rows[trial.id]["diverged"]:
            estimate.add(rows[trial.id]["process_seconds"], trial.tokens)
    print(
        f"{plan.name}: {len(plan.variants)} variants, {len(trials)} runs, of them {len(trials) - len(waiting)} done; "
        f"{sum(trial.tokens for trial in waiting):,} tokens to train on"
    )
    failures: list[str] = []

    def finished(trial: Trial, line: str) -> None:
        append_line(out / ROWS, line)
        rows[trial.id] = json.loads(line)
        if not keep_models:
            shutil.rmtree(trial.config.out, ignore_errors=True)

    def failed(trial: Trial, reason: str) -> None:
        failures.append(f"{trial.id} failed: {reason}")

    for trial in waiting:  # a run that ended after its study had been killed
        if (out / "runs" / trial.id / ROW).is_file():
            finished(trial, (out / "runs" / trial.id / ROW).read_text(encoding="utf-8"))
    left: list[Trial] = []
    try:
        left = work(
            [trial for trial in waiting if trial.id not in rows],
            out=out,
            places=places,
            seconds=None if minutes is None else 60 * minutes - spent,
            estimate=estimate,
            finished=finished,
            failed=failed,
        )
    finally:
        done = [rows[trial.id] for trial in trials if trial.id in rows]
        if done:
            write_page(plan, done, out)
    if left:
        print(f"{len(left)} of {len(trials)} runs are left, which --minutes {minutes:g} gave no time for.")
    for failure in failures:
        print(f"regla: {failure}", file=sys.stderr)
    if failures:
        print(f"regla: {len(failures)} runs failed; their output is in {out / 'runs'}/*/log.txt", file=sys.stderr)
    return failures, [rows[trial.id] for trial in trials if trial.id in rows]


def best_rates(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """By variant, the learning rate with the lowest loss, the lowest rate where all diverged."""
    lowest = min(row["lr"] for row in rows)
    return {score.name: score.best_lr or lowest for score in variant_scores(rows)}


def _task(plan: Study) -> str | None:
    """What the study trains on in place of text; all variants on the same."""
    tasks = {variant.settings.get("task") for variant in plan.variants}
    if len(tasks) > 1:
        raise ValueError(f"Some variants of {plan.name} train on text and some on a task; set `task` in its base.")
    return tasks.pop()


def _places(device: str, number: int) -> list[Place]:
    """Where the processes run: a GPU each, or a share of the cores."""
    import torch

    from regla.runtime.device import pick_device

    if pick_device(device).type == "cuda":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        gpus = visible.split(",")
        if number > len(gpus):
            raise OptionError(
                "{devices} is {number}, but this PyTorch sees {found} GPUs; ask for at most these.",
                number=number,
                found=len(gpus),
            )
        return [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus[:number]]
    place = {"CUDA_VISIBLE_DEVICES": ""}  # so that the rows name the CPU
    if number > 1:
        place["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // number))
    return [dict(place) for _ in range(number)]


def _print_grid(plan: Study, tokenizer: str | None) -> None:
    vocab_size = vocabulary_size(load_tokenizer(tokenizer)) if tokenizer is not None else None
    sizes, _ = check_variants(plan, plan.variants, vocab_size=vocab_size)
    body = [
        [name, *(f"{number:,}" for number in (size.parameters, size.steps, size.tokens))]
        for name, size in sizes.items()
    ]
    print(f"{plan.title}\n")
    print(plain(["variant", "parameters", "steps", "tokens of a run"], body))
    print()
    rates = ", ".join(f"{lr:g}" for lr in plan.lrs)
    if plan.sweep is not None:
        sweep = sweep_of(plan)
        print(f"{len(plan.variants)} variants at lr {rates} in the sweep: {_amount(sweep, vocab_size)}")
        plan = replace(plan, rates={variant.name: plan.lrs[0] for variant in plan.variants})  # one, whichever it is
        rates = "as the sweep says"
    seeds = sorted({seed for _, _, seed in in_order(plan)})
    named = ", ".join(map(str, seeds)) + (" (the latter of some variants)" if plan.more_seeds else "")
    print(f"{len(plan.variants)} variants at lr {rates} with seeds {named}: {_amount(plan, vocab_size)}")
    if tokenizer is None:
        print(f"Parameters are those with a vocabulary of {plan.vocab_size or DEFAULT_VOCAB_SIZE:,}.")


def _amount(plan: Study, vocab_size: int | None) -> str:
    sizes, _ = check_variants(plan, plan.variants, vocab_size=vocab_size)
    trials = in_order(plan)
    return f"{len(trials)} runs, {sum(sizes[variant.name].tokens for variant, _, _ in trials):,} tokens"
