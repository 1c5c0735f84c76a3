"""One run of a study in a process of its own: `python -m regla.study FOLDER`.

FOLDER/run.json     what to train, and what its row begins with; the study writes it
FOLDER/model        checkpoints and log; a run that was cut off goes on from its last checkpoint
FOLDER/row.jsonl    the finished row; where it is there, the run is done

Standard input is a pipe from the study. It closes when the study dies in whatever way, and the run then ends as by
SIGTERM, with a checkpoint: no run outlives its study unseen.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from regla.bench.rows import surroundings
from regla.runtime.checkpoint import FOLDER as CHECKPOINTS
from regla.runtime.checkpoint import found_in
from regla.runtime.errors import told_in_flags
from regla.runtime.files import alone_in, write_json, write_text
from regla.runtime.log import FILE as LOG
from regla.study.measure import measure
from regla.train.config import TrainConfig
from regla.train.run import train

PLAN, MODEL, ROW, OUTPUT = "run.json", "model", "row.jsonl", "log.txt"
CURVE_POINTS = 40
_TUPLES = ("data", "valid", "pairs", "gaps")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0: the row is there, of a run that diverged, too; 1: failed; 128 + n: ended by signal n."""
    (folder,) = map(Path, sys.argv[1:] if arguments is None else arguments)
    threading.Thread(target=_end_with_the_study, daemon=True).start()
    with alone_in(folder, wait=True):  # until a run left over from a killed study has ended
        try:
            run(folder)
        except KeyboardInterrupt as error:
            return 128 + getattr(error, "signum", signal.SIGINT)
        except (ValueError, OSError, MemoryError) as error:
            print(f"regla: error: {told_in_flags(error)}", file=sys.stderr)
            return 1
    return 0


def write_plan(folder: Path, config: dict[str, Any], row: dict[str, Any]) -> None:
    """config: the fields of TrainConfig."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / PLAN, {"config": config, "row": row})


def run(folder: Path) -> None:
    """Train what FOLDER/run.json says, unless it is done, and write its row."""
    if (folder / ROW).is_file():
        return
    plan = json.loads((folder / PLAN).read_text(encoding="utf-8"))
    fields = plan["config"] | {
        name: tuple(plan["config"][name]) for name in _TUPLES if plan["config"][name] is not None
    }
    config = TrainConfig(**fields)
    if not found_in(Path(config.out) / CHECKPOINTS):
        shutil.rmtree(config.out, ignore_errors=True)  # a run killed before its first checkpoint begins again
    started = time.perf_counter()
    result: dict[str, Any]
    try:
        summary = train(config)
    except FloatingPointError as error:
        result = {"diverged": True, "reason": str(error).partition(";")[0], "curve": curve(Path(config.out) / LOG)}
    else:
        result = result_of(summary, curve(Path(config.out) / LOG))
        if not result["diverged"]:
            result |= measure(config, plan["row"])
    result["process_seconds"] = time.perf_counter() - started
    write_text(folder / ROW, json.dumps(plan["row"] | result | surroundings()) + "\n")


def result_of(summary: dict[str, Any], points: list[tuple[int, float]]) -> dict[str, Any]:
    """What a row takes from the summary of a complete run. A validation loss that is not finite is a divergence."""
    if not math.isfinite(summary["validation_loss"]):
        return {"diverged": True, "reason": "The validation loss is not finite.", "curve": points}
    kept = (
        *("parameters", "softmax_parameters", "intermediate_size", "steps", "tokens", "seconds", "tokens_per_second"),
        *("train_loss", "validation_loss", "validation_perplexity"),
    )
    sources = [
        {"name": Path(source["name"]).name} | {key: source[key] for key in ("tokens", "loss", "perplexity")}
        for source in summary["validation"]
    ]
    return (
        {"diverged": False}
        | {key: summary[key] for key in kept}
        | {
            "epochs": summary["tokens"] / summary["text_tokens"] if "text_tokens" in summary else None,
            "validation": sources,
            "transformers": summary["versions"]["transformers"],
            "curve": points,
        }
        | {name: summary[name] for name in ("by_position", "recall") if name in summary}
    )


def curve(log: Path) -> list[tuple[int, float]]:
    """The log's losses in at most CURVE_POINTS points: last step and mean loss of as many stretches."""
    if not log.is_file():
        return []
    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    records = [record for record in records if record["loss"] is not None]  # None: the step was skipped
    stretch = -(-len(records) // CURVE_POINTS)
    parts = [records[start : start + stretch] for start in range(0, len(records), stretch or 1)]
    return [(part[-1]["step"], round(sum(record["loss"] for record in part) / len(part), 4)) for part in parts]


def _end_with_the_study() -> None:
    os.read(0, 1)  # not sys.stdin, whose lock a daemon thread would hold when the interpreter ends
    os.kill(os.getpid(), signal.SIGTERM)
