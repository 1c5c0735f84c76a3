"""`regla bench`: measures case by case; each row is printed and appended to the file as soon as it is there."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import mkdtemp

import torch

from regla.bench import cpu, decode, distributed, evaluation, ops, students, train
from regla.bench import data as data_bench
from regla.bench.measure import Case, Row, give_memory_back
from regla.bench.rows import write_rows
from regla.data.selection import read_sources
from regla.report.benches import lines
from regla.runtime.device import DTYPES, TF32_IN_TRAINING, float32_products, pick_device
from regla.runtime.distributed import processes
from regla.runtime.errors import OtherProcessError, check_count, check_number
from regla.runtime.install import require
from regla.train.model import read_overrides


def bench_ops(
    *,
    out: str | None = None,
    only: Sequence[str] = (),
    device: str = "auto",
    dtype: str | None = None,
    quick: bool = False,
) -> list[Row]:
    """Time the operations against their peers; see `regla.bench.ops`. The rows."""
    where = pick_device(device)
    kind = _dtype(dtype, where)
    with _as_in_training(kind):
        return run(ops.cases(where, kind, quick=quick), where, out=out, only=only)


def bench_decode(
    *,
    out: str | None = None,
    only: Sequence[str] = (),
    device: str = "auto",
    dtype: str | None = None,
    quick: bool = False,
    eager: bool = False,
    config: str | None = None,
) -> list[Row]:
    """Time `model.generate` at long contexts; see `regla.bench.decode`. The rows."""
    where = pick_device(device)
    own = None if config is None else read_overrides(config)
    kind = _dtype(dtype, where)
    with _as_in_training(kind):
        cases = decode.cases(where, kind, quick=quick, eager=eager, overrides=own)
        return run(cases, where, out=out, only=only)


def bench_train(
    *,
    out: str | None = None,
    only: Sequence[str] = (),
    device: str = "auto",
    dtype: str | None = None,
    quick: bool = False,
    eager: bool = False,
    config: str | None = None,
    lengths: Sequence[int] = (),
    profile: bool = False,
) -> list[Row]:
    """Time training steps; see `regla.bench.train`. The rows."""
    where = pick_device(device)
    if any(length <= 0 for length in lengths):
        raise ValueError(f"--lengths has {min(lengths)}, expected numbers of tokens above 0.")
    own = None if config is None else read_overrides(config)
    kind = _dtype(dtype, where)
    with _as_in_training(kind):
        cases = train.cases(where, kind, quick=quick, eager=eager, overrides=own, lengths=lengths, profile=profile)
        return run(cases, where, out=out, only=only)


def bench_eval(
    *,
    out: str | None = None,
    only: Sequence[str] = (),
    device: str = "auto",
    dtype: str | None = None,
    quick: bool = False,
) -> list[Row]:
    """Time the scoring of answers behind shared prefixes; see `regla.bench.evaluation`. The rows."""
    where = pick_device(device)
    kind = dtype or ("bfloat16" if where.type == "cuda" else "float32")
    return run(evaluation.cases(where, kind, quick=quick), where, out=out, only=only)


def bench_distributed(
    *,
    out: str | None = None,
    only: Sequence[str] = (),
    device: str = "auto",
    dtype: str | None = None,
    quick: bool = False,
    eager: bool = False,
) -> list[Row]:
    """Compare several processes, which torchrun has started, with one; see `regla.bench.distributed`. The rows."""
    with processes(pick_device(device)) as (started, where):
        if started.is_alone:
            raise ValueError(
                "regla bench distributed runs in several processes; start it with `torchrun --nproc-per-node 2 -m "
                "regla bench distributed`."
            )
        cases = distributed.cases(started, where, _dtype(dtype, where), quick=quick, eager=eager)
        return run(cases, where, out=out if started.is_first else None, only=only)


def bench_cpu(*, out: str | None = None, only: Sequence[str] = (), threads: int = 2) -> list[Row]:
    """Measure what the CPU path promises; see `regla.bench.cpu`. The rows."""
    if threads <= 0:
        raise ValueError(f"--threads is {threads}, expected a number above 0.")
    torch.set_num_threads(threads)
    return run(cpu.cases(), torch.device("cpu"), out=out, only=only)


def bench_data(
    *, out: str | None = None, only: Sequence[str] = (), gigabytes: float = 1.0, folder: str | None = None
) -> list[Row]:
    """Measure what text at scale takes of memory; see `regla.bench.data`. The rows."""
    check_number("gigabytes", gigabytes)
    if folder is not None and not Path(folder).is_dir():
        raise ValueError(f"There is no folder {folder}; give --dir one that exists.")
    return run(data_bench.cases(round(gigabytes * 1e9), folder), torch.device("cpu"), out=out, only=only)


def bench_students(
    model: str,
    *,
    data: Sequence[str],
    valid: Sequence[str],
    unseen: Sequence[str] = (),
    tokens: str | None = None,
    seq_len: int | None = None,
    batch_size: int | None = None,
    lr: float = 1e-3,
    tasks: Sequence[str] = (),
    data_dir: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    out: str | None = None,
    work: str | None = None,
    only: Sequence[str] = (),
    device: str = "auto",
    dtype: str | None = None,
    quick: bool = False,
) -> list[Row]:
    """Convert a model in many ways and measure every student; see `regla.bench.students`. The new rows.

    Raises:
        ValueError: what is wrong with the input, before anything is trained.
        OtherProcessError: cases failed, which stderr names; the others are done.
    """
    if out is not None:
        _check_file(out)
    chosen = [case.name for case in _matching([Case(name, lambda: iter(())) for name in students.CASES], only)]
    for name, value in (("limit", limit), ("seq_len", seq_len), ("batch_size", batch_size)):
        check_count(name, value)
    read_sources([*data, *valid, *unseen])
    loaded = {}
    if tasks:
        require("lm_eval", "Tasks of lm-eval need", "accelerate")
        from regla.eval.harness import load_tasks

        loaded = load_tasks(tasks, data_dir=data_dir)
    where = pick_device(device)
    setting = students.Setting(
        model=model,
        data=tuple(data),
        valid=tuple(valid),
        unseen=tuple(unseen),
        tokens=tokens or ("4k" if quick else "10M"),
        seq_len=seq_len or (64 if quick else 512),
        batch_size=batch_size or (4 if quick else 16),
        lr=lr,
        seed=seed,
        device=where.type,
        dtype=dtype or ("bfloat16" if where.type == "cuda" else "float32"),
        tasks=loaded,
        limit=limit or (4 if quick else None),
        probe_lengths=(128,) if quick else (128, 256),
        probe_limit=2 if quick else 40,
    )
    done = [] if out is None else students.read_done(out)
    place = Path(mkdtemp(prefix="regla-students-")) if work is None else Path(work)
    place.mkdir(parents=True, exist_ok=True)
    failures: dict[str, str] = {}
    try:
        if not all(students.is_done(setting, name, done) for name in chosen):
            students.check_conversion(setting, place)
        cases = students.cases(setting, place, keep=work is not None, done=done, failures=failures)
        rows = run(cases, where, out=out, only=only)
    finally:
        if work is None and not failures:
            shutil.rmtree(place)
    if failures:
        for name, reason in failures.items():
            print(f"{name} failed:\n{reason}", file=sys.stderr)
        print(f"{len(failures)} of {len(chosen)} cases failed; their logs are in {place}.", file=sys.stderr)
        raise OtherProcessError(f"{len(failures)} cases failed")
    return rows


def run(
    cases: Sequence[Case],
    device: torch.device,
    *,
    out: str | None,
    only: Sequence[str] = (),
    show: Callable[[str], None] = lambda text: print(text, flush=True),
) -> list[Row]:
    """The rows of the cases that match a glob of `only` (none: all), shown and appended to the file `out` one by one.

    A row gets `against`: by the subject of each earlier row of the same setting, how often its time is this one's.
    Raises ValueError where nothing matches, or `out` cannot be written.
    """
    chosen = _matching(cases, only)
    if out is not None:
        _check_file(out)
    rows: list[Row] = []
    remarks: set[str] = set()
    for case in chosen:
        for found in case.measure():
            if isinstance(found, str):
                if found not in remarks:  # many cases may have the same
                    show(found)
                remarks.add(found)
                continue
            row = _with_ratios(found, rows)
            if out is not None:
                write_rows(out, [row], device)
            titles, text = lines(row)
            if titles and not rows:
                show(titles)
            show(text)
            rows.append(row)
        give_memory_back(device)
    return rows


def _matching(cases: Sequence[Case], only: Sequence[str]) -> list[Case]:
    chosen = [case for case in cases if not only or any(fnmatchcase(case.name, glob) for glob in only)]
    if not chosen:
        raise ValueError(f"--only matches no case; their names are like {cases[-1].name!r}.")
    return chosen


def _with_ratios(row: Row, earlier: Sequence[Row]) -> Row:
    if "p50_us" not in row:
        return row
    peers = [other for other in earlier if other["setting"] == row["setting"] and "p50_us" in other]
    return row | {"against": {other["subject"]: other["p50_us"] / row["p50_us"] for other in peers}}


def _check_file(out: str) -> None:
    """Find out before anything is measured, not after."""
    path = Path(out)
    if path.suffix != ".jsonl":
        raise ValueError(f"--out is {out}, expected a file that ends in .jsonl; its rows are added to.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a", encoding="utf-8").close()
    except OSError as error:
        raise ValueError(f"{out} cannot be written ({error.strerror}); give --out another file.") from error


def _as_in_training(dtype: torch.dtype) -> AbstractContextManager[None]:
    """What training in `dtype` leaves in float32 is computed as there."""
    return float32_products(tf32=any(DTYPES[name] == dtype for name in TF32_IN_TRAINING))


def _dtype(name: str | None, device: torch.device) -> torch.dtype:
    return DTYPES[name or ("bfloat16" if device.type == "cuda" else "float32")]
