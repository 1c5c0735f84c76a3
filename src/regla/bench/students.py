"""`regla bench students`: one pretrained model converted in many ways at equal tokens, every student measured alike.

A case is a name and the options of `regla linearize` that make it. Each conversion is a process of its own, so that its
memory is free afterwards and its failure ends no other case. What comes out is scored here, in the same windows and the
same dtype for all: perplexity, recall by free generation, and tasks of lm-eval where some are named.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from regla.bench.measure import Case, Row
from regla.eval.measure import measure
from regla.eval.probes.command import pooled, probe
from regla.eval.probes.run import Plan
from regla.models.folders import load_model
from regla.runtime.device import pick_device
from regla.runtime.files import write_json
from regla.runtime.signals import Interrupted, Signals

BENCHMARK = "bench students"
_DISTILL: dict[str, Any] = {"keep": "none"}
_PAPER: dict[str, Any] = {"keep": "none", "preset": "paper"}

CASES: dict[str, dict[str, Any] | None] = {
    "original": None,
    "teacher, trained": {"keep": "all", "preset": "paper"},
    "pure": _DISTILL,
    "every-2": {"keep": "every-2"},
    "every-4": {"keep": "every-4"},
    "auto:25%": {"keep": "auto:25%"},
    "pure, paper preset": _PAPER,
    "pure, no transfer": {**_DISTILL, "transfer_tokens": 0},
    "pure, no calibration": {**_DISTILL, "calibration_tokens": 0},
    "pure, window and sinks": {**_DISTILL, "mixer": "window"},
    **{f"pure, {mixer}": {**_DISTILL, "mixer": mixer} for mixer in ("delta", "fast_decay", "relu")},
    **{
        f"table 5, {mixer}": {**_PAPER, "mixer": mixer}
        for mixer in ("relu", "hedgehog", "scalar", "fast_decay", "paper")
    },
}
"""By name, the options of `regla linearize`; None: the model is not converted."""

_UNTRAINED = ("window",)  # mixers that take no tokens
_PROBES, _DEPTHS, _PAIRS = ("passkey", "kv"), (0.0, 0.5, 1.0), (4,)
_LAST_LINES = 5  # of the log of a case that failed
_PAUSE = 0.1  # seconds between looks at a conversion


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all cases share."""

    model: str
    data: tuple[str, ...]
    valid: tuple[str, ...]
    unseen: tuple[str, ...]
    tokens: str
    seq_len: int
    batch_size: int
    lr: float
    seed: int
    device: str
    dtype: str
    tasks: Mapping[str, Any]
    """What `regla.eval.harness.load_tasks` gave; empty: none."""
    limit: int | None
    """Items of a task."""
    probe_lengths: tuple[int, ...]
    probe_limit: int
    """Sequences of a cell."""

    @property
    def name(self) -> str:
        return Path(self.model).name if Path(self.model).exists() else self.model

    def as_row(self) -> Row:
        """Without what is of this machine: of files the names alone."""
        files = {kind: [Path(file).name for file in getattr(self, kind)] for kind in ("data", "valid", "unseen")}
        numbers = ("tokens", "seq_len", "batch_size", "lr", "seed", "dtype", "limit", "probe_limit")
        lists = {"tasks": list(self.tasks), "probe_lengths": list(self.probe_lengths)}
        return {**files, **{name: getattr(self, name) for name in numbers}, **lists}

    def arguments(self, options: Mapping[str, Any]) -> list[str]:
        """Of `regla linearize` for a case with these options, less --out."""
        shared = ("seq_len", "batch_size", "lr", "seed", "device", "dtype")
        given = {name: getattr(self, name) for name in shared} | dict(options)
        given["valid_tokens"] = 64 * self.seq_len  # for the KL; perplexity is measured here
        if options.get("mixer") not in _UNTRAINED:
            given["tokens"] = self.tokens
        flags = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        return [self.model, *flags, "--data", *self.data, "--valid", *self.valid]


class CaseError(RuntimeError):
    """The conversion of a case failed; the last lines of its log."""


def cases(setting: Setting, work: Path, *, keep: bool, done: Sequence[Row], failures: dict[str, str]) -> list[Case]:
    """All of CASES.

    Args:
        work: folder for the converted models and the logs.
        keep: leave the models of finished cases there.
        done: rows of earlier runs; their cases are skipped.
        failures: gets the reason of every case that fails, by its name.
    """

    def rows(name: str) -> Iterator[Row | str]:
        if is_done(setting, name, done):
            yield f"{name}: measured before"
            return
        try:
            yield _identity(setting, name) | _measured(setting, name, work, keep=keep)
        except (ValueError, OSError, ArithmeticError, MemoryError, RuntimeError) as error:
            failures[name] = str(error)
            yield f"{name}: failed, the others go on"

    return [Case(name, partial(rows, name)) for name in CASES]


def is_done(setting: Setting, name: str, done: Sequence[Row]) -> bool:
    """Whether a row has this model, case and setting."""
    wanted = _identity(setting, name)
    return any(all(row.get(key) == value for key, value in wanted.items()) for row in done)


def _identity(setting: Setting, name: str) -> Row:
    row = {"benchmark": BENCHMARK, "model": setting.name, "case": name, "options": CASES[name] or {}}
    return row | {"setting": setting.as_row()}


def read_done(out: str | Path) -> list[Row]:
    """The rows of this benchmark in a file that may not be there yet; ValueError where a line is no row."""
    if not Path(out).is_file():
        return []
    try:
        rows = [json.loads(line) for line in Path(out).read_text(encoding="utf-8").splitlines()]
        return [row for row in rows if row["benchmark"] == BENCHMARK]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{out} has a line that is no row of a measurement; correct it or give another --out."
        ) from error


def check_conversion(setting: Setting, work: Path) -> None:
    """Find out what is wrong with the model, the texts and the numbers before anything is trained.

    Raises:
        ValueError: what `regla linearize --dry-run` says.
    """
    log = work / "dry-run.log"
    try:
        _linearize([*setting.arguments(_DISTILL), "--dry-run"], log)
    except CaseError as error:
        *_, last = str(error).splitlines()
        raise ValueError(last.removeprefix("regla: error: ")) from error


def _measured(setting: Setting, name: str, work: Path, *, keep: bool) -> Row:
    """Convert, and score what comes out."""
    options, stem = CASES[name], re.sub(r"[^\w.-]+", "-", name)
    log, folder = work / f"{stem}.log", work / stem
    found: Row = {"tokens": 0, "seconds": 0.0, "divergence": None, "transfer_error": None}
    if options is not None:
        _convert(setting.arguments(options), folder, log)
        found = _conversion(json.loads((folder / "linearize.json").read_text(encoding="utf-8")))
    model = setting.model if options is None else str(folder)
    with log.open("a", encoding="utf-8") as told, contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        found |= _scores(setting, model)
    if not keep:
        shutil.rmtree(folder, ignore_errors=True)
    return found


def _convert(arguments: Sequence[str], folder: Path, log: Path) -> None:
    """Make the student, go on with one that was begun, or take one that is there; a file beside it says from what."""
    made = folder.with_name(f"{folder.name}.json")
    if made.is_file() and json.loads(made.read_text(encoding="utf-8")) == list(arguments):
        return
    resume = ["--resume"] if folder.is_dir() and "--tokens" in arguments and not made.is_file() else []
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
    made.unlink(missing_ok=True)
    _linearize([*arguments, "--out", str(folder), *resume], log)
    write_json(made, list(arguments))


def _linearize(arguments: Sequence[str], log: Path) -> None:
    """`regla linearize` in a process of its own; its output goes to `log`. A signal ends it behind a checkpoint.

    Raises:
        CaseError: it failed.
        Interrupted: SIGINT or SIGTERM ended it.
    """
    command = [sys.executable, "-m", "regla", "linearize", *arguments]
    with log.open("w", encoding="utf-8") as told, Signals() as signals:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=told, stderr=told, start_new_session=True
        )  # in a session of its own, so that Ctrl-C reaches it once, from here
        try:
            while (code := process.poll()) is None:
                if signals.received is not None:
                    process.terminate()
                    process.wait()
                    raise Interrupted(signals.received)
                time.sleep(_PAUSE)
        finally:
            process.kill()
    if code:
        lines = re.split(r"[\r\n]+", log.read_text(encoding="utf-8", errors="replace").strip())
        ended = [f"ended by signal {-code}"] if code < 0 else []
        raise CaseError("\n".join([*lines[-_LAST_LINES:], *ended]))


def _conversion(summary: Mapping[str, Any]) -> Row:
    """What `linearize.json` says of the training."""
    stages, divergence = summary["stages"].values(), summary["divergence"]
    last = divergence.get("trained") or divergence.get("converted")
    return {
        "tokens": sum(stage["tokens"] for stage in stages),
        "seconds": sum(stage["seconds"] for stage in stages),
        "divergence": None if last is None else {name: last[name] for name in ("mean", "se")},
        "transfer_error": summary["transfer_error"],
    }


def _scores(setting: Setting, model: str) -> Row:
    """Size, perplexity, recall and tasks of a model."""
    where: dict[str, Any] = {"batch_size": setting.batch_size, "device": setting.device, "dtype": setting.dtype}
    loaded = load_model(model, pick_device(setting.device))
    config = loaded.config.get_text_config()
    size = {
        "parameters": loaded.num_parameters(),
        "layers": config.num_hidden_layers,
        "linear_layers": list(getattr(config, "linear_layers", None) or []),
        "windowed_layers": list((getattr(config, "windowed", None) or {}).get("layers", [])),
    }
    del loaded
    scores, _ = measure(model, data=[*setting.valid, *setting.unseen], seq_len=setting.seq_len, **where)
    texts = [
        {"name": Path(one.name).name, "tokens": one.tokens, "loss": one.loss, "perplexity": one.perplexity}
        for one in scores
    ]
    asked: dict[str, Any] = {"lengths": setting.probe_lengths, "limit": setting.probe_limit, "seed": setting.seed}
    plan = Plan(probes=_PROBES, depths=_DEPTHS, pairs=_PAIRS, **asked)
    records = probe([model], plan, **where)
    recall = []
    for kind in plan.probes:
        for length in plan.lengths:
            mean, se, n = pooled([one for one in records if (one.probe, one.length) == (kind, length)])
            recall.append({"probe": kind, "length": length, "value": mean, "stderr": se, "n": n})
    tasks = []
    if setting.tasks:
        from regla.eval.harness import score_tasks

        for score in score_tasks(model, setting.tasks, limit=setting.limit, **where):
            tasks.append({name: value for name, value in asdict(score).items() if name != "model"})
    split = len(setting.valid)
    return {**size, "valid": texts[:split], "unseen": texts[split:], "recall": recall, "tasks": tasks}
