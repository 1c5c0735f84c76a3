"""The queue of a study: a process for each trial, one or several at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from regla.runtime.log import FILE as LOG
from regla.runtime.signals import Interrupted, Signals
from regla.study.trials import Trial
from regla.study.worker import OUTPUT, ROW, write_plan

COMMAND = (sys.executable, "-m", "regla.study")
"""What runs a trial, given its folder."""

_UNBUFFERED = {"PYTHONUNBUFFERED": "1"}  # so that the last line of the output is what was said last
_POLL_SECONDS = 0.1
_TAIL_BYTES = 4096

Place = Mapping[str, str]
"""Environment variables that put a process on its device."""


class Estimate:
    """How long a trial will take, from the mean duration per token of those that are finished."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._tokens = 0

    def add(self, seconds: float, tokens: int) -> None:
        self._seconds += seconds
        self._tokens += tokens

    def seconds(self, tokens: int) -> float:
        """0 while nothing is known."""
        return self._seconds / self._tokens * tokens if self._tokens else 0.0


@dataclass
class _Running:
    trial: Trial
    place: Place
    process: subprocess.Popen[bytes]
    started: float
    step: int = 0
    loss: float | None = None

    def look(self) -> None:
        """Read step and loss from the end of the run's log."""
        with suppress(OSError, ValueError, KeyError), open(Path(self.trial.config.out) / LOG, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            record = json.loads(file.read().rpartition(b"\n")[0].rpartition(b"\n")[2])
            self.step, self.loss = record["step"], record["loss"]

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()

    @property
    def tokens(self) -> int:
        return min(self.trial.tokens, self.step * self.trial.config.tokens_per_step)


def work(
    trials: Sequence[Trial],
    *,
    out: Path,
    places: Sequence[Place],
    seconds: float | None,
    estimate: Estimate,
    finished: Callable[[Trial, str], None],
    failed: Callable[[Trial, str], None],
) -> list[Trial]:
    """Run `trials` in order, as many at a time as there are places; those that were left out for want of time.

    A place that is given several times takes as many at once.
    seconds: no trial starts that would not be done in this time from now, by `estimate`. `finished(trial, line)`
    receives the row of a trial as a JSON line, `failed(trial, reason)` the last line of its output.
    On Ctrl-C or SIGTERM the running ones are told to save a checkpoint and end, and Interrupted is raised.
    """
    began = time.perf_counter()
    waiting, free = list(trials), list(places)
    running: list[_Running] = []
    left: list[Trial] = []
    done_tokens = 0
    shown_every = 0.5 if sys.stderr.isatty() else 10.0  # seconds; a log file wants few lines
    with (
        Signals() as signals,
        tqdm(
            total=sum(trial.tokens for trial in trials),
            unit="tok",
            unit_scale=True,
            mininterval=shown_every,
            bar_format="{desc} {percentage:3.0f}%|{bar:20}| [{elapsed}<{remaining}]{postfix}",
        ) as bar,
    ):
        try:
            while waiting or running:
                while waiting and free and signals.received is None:
                    trial = waiting.pop(0)
                    needed = time.perf_counter() - began + estimate.seconds(trial.tokens)
                    if seconds is not None and needed > seconds:
                        left.append(trial)
                    else:
                        running.append(_start(trial, out, free.pop(0)))
                time.sleep(_POLL_SECONDS)
                for run in list(running):
                    run.look()
                    if run.process.poll() is None:
                        continue
                    run.close()
                    running.remove(run)
                    free.append(run.place)
                    folder = out / "runs" / run.trial.id
                    if (folder / ROW).is_file():  # whatever happened to the process after it
                        line = (folder / ROW).read_text(encoding="utf-8")
                        if not json.loads(line)["diverged"]:  # that is over too soon to tell anything
                            estimate.add(time.perf_counter() - run.started, run.trial.tokens)
                        finished(run.trial, line)
                    elif signals.received is None:
                        failed(run.trial, _last_line(folder / OUTPUT, run.process.returncode))
                    done_tokens += run.trial.tokens
                if signals.received is not None:
                    for run in running:
                        run.process.terminate()
                    for run in running:
                        run.process.wait()
                    raise Interrupted(signals.received)
                over = len(trials) - len(waiting) - len(running) - len(left)
                bar.set_description_str(f"{over}/{len(trials)} runs", refresh=False)
                bar.set_postfix_str("; ".join(map(_in_words, running)), refresh=False)
                bar.update(done_tokens + sum(run.tokens for run in running) - bar.n)
        finally:
            for run in running:  # after an error, or a second Ctrl-C
                if run.process.poll() is None:
                    run.process.kill()
                    run.process.wait()
    return left


def _start(trial: Trial, out: Path, place: Place) -> _Running:
    folder = out / "runs" / trial.id
    write_plan(folder, asdict(trial.config), trial.row)
    with (folder / OUTPUT).open("ab") as output:
        process = subprocess.Popen(
            [*COMMAND, str(folder)],
            stdin=subprocess.PIPE,  # never written to; it closes when this process dies
            stdout=output,
            stderr=output,
            env={**os.environ, **place, **_UNBUFFERED},
            start_new_session=True,  # Ctrl-C reaches the study alone, which tells its runs once
        )
    return _Running(trial, place, process, time.perf_counter())


def _in_words(run: _Running) -> str:
    loss = "" if run.loss is None else f" loss {run.loss:.3f}"
    return f"{run.trial.name}: step {run.step}/{run.trial.config.total_steps}{loss}"


def _last_line(output: Path, code: int) -> str:
    """What a run that failed said last."""
    if code < 0:
        return f"it was ended by signal {-code}"  # 9 is often the system's, for want of memory
    lines = output.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").splitlines()
    said = [line.strip() for line in lines if line.strip()]
    return said[-1] if said else f"it ended with exit code {code} and said nothing"
