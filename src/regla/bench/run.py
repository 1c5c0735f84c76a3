"""`regla bench`: measures case by case; each row is printed and appended to the file as soon as it is there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from regla.bench import cpu, data, decode, distributed, evaluation, ops, train
from regla.bench.measure import Case, Row, give_memory_back
from regla.bench.rows import write_rows
from regla.report.benches import lines
from regla.runtime.device import DTYPES, TF32_IN_TRAINING, float32_products, pick_device
from regla.runtime.distributed import processes
from regla.runtime.errors import check_number
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
    return run(data.cases(round(gigabytes * 1e9), folder), torch.device("cpu"), out=out, only=only)


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
    chosen = [case for case in cases if not only or any(fnmatchcase(case.name, glob) for glob in only)]
    if not chosen:
        raise ValueError(f"--only matches no case; their names are like {cases[-1].name!r}.")
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
