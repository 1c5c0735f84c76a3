"""Several processes as torchrun would start them, forked, so that they begin at once."""

import contextlib
import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch


class Ended(NamedTuple):
    """How a process ended: its exit code (negative: the signal), and what it wrote."""

    code: int | None
    out: str
    err: str


def skip_where_forks_cannot_train() -> None:
    """Where torch sees a GPU, any backward pass, also on the CPU, starts autograd's threads for it, and from then on
    autograd refuses to run in a fork."""
    if torch.cuda.is_available():
        pytest.skip("forks that train on the CPU, which torch refuses beside a GPU: set CUDA_VISIBLE_DEVICES=''")


def in_processes(
    count: int,
    run: Callable[[], int | None],
    folder: Any,
    *,
    seconds: float = 100,
    meanwhile: Callable[[list[Any]], None] = lambda processes: None,
) -> list[Ended]:
    """Call `run` in `count` processes, of each of which the environment says who it is, and here `meanwhile`; what they
    write is left in `folder`. Skips the test where `skip_where_forks_cannot_train` does."""
    skip_where_forks_cannot_train()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder.mkdir(exist_ok=True)
    started = [
        multiprocessing.get_context("fork").Process(target=_be, args=(rank, count, port, run, folder))
        for rank in range(count)
    ]
    for process in started:
        process.start()
    meanwhile(started)
    for process in started:
        process.join(seconds)
    stuck = [rank for rank, process in enumerate(started) if process.is_alive()]
    for process in started:
        process.kill()
        process.join()
    assert not stuck, f"processes {stuck} did not end in {seconds} seconds"
    written = [[(folder / f"{rank}.{name}").read_text() for name in ("out", "err")] for rank in range(count)]
    return [Ended(process.exitcode, *texts) for process, texts in zip(started, written, strict=True)]


def _be(rank: int, count: int, port: int, run: Callable[[], int | None], folder: Any) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    with (
        (folder / f"{rank}.out").open("w") as out,
        (folder / f"{rank}.err").open("w") as err,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        code = run()
    os._exit(code or 0)
