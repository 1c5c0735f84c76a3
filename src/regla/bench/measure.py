"""How the benchmarks time and weigh a call, on a GPU or a CPU."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

Row = dict[str, Any]
"""One measurement. `subject` is what was measured; rows of one run whose `setting` is the same can be compared."""

Call = Callable[[], Sequence[Tensor]]


class Case(NamedTuple):
    """One measurement to come: its name, which `--only` selects by, and what yields its rows, or remarks as text."""

    name: str
    measure: Callable[[], Iterator[Row | str]]


@dataclass(frozen=True)
class Timing:
    """Quantiles over the repeats of a call, in microseconds."""

    p20_us: float
    p50_us: float
    p80_us: float
    repeats: int
    timing: str
    """How it was timed: "CUDA graph" or "events", both with a cold L2 cache, or "clock"."""

    def as_row(self) -> Row:
        return asdict(self)


def quantiles(seconds: Sequence[float], timing: str) -> Timing:
    p20, p50, p80 = (float(x) * 1e6 for x in np.quantile(seconds, [0.2, 0.5, 0.8]))
    return Timing(p20, p50, p80, len(seconds), timing)


def time_call(call: Call, device: torch.device, *, seconds: float) -> Timing:
    """Time `call`, which must have run before, for about `seconds`: 3 to 200 repeats.

    On a GPU each repeat is the replay of a CUDA graph between two events, so that what is timed is the kernels and not
    their launches from Python; where the call cannot be captured, the events enclose the call itself. A buffer larger
    than the L2 cache is read before each repeat: inputs come from memory, and nothing that something else has written
    has to go there first.
    """
    if device.type == "cpu":
        return quantiles(_repeat(lambda: _clock(call), seconds), "clock")
    replay, timing = _captured(call)
    flush = torch.zeros(2**26, dtype=torch.int32, device=device)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def once() -> float:
        flush.max()
        start.record()
        replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return quantiles(_repeat(once, seconds), timing)


def _repeat(once: Callable[[], float], seconds: float) -> list[float]:
    once()
    first = time.perf_counter()
    taken = [once()]
    each = time.perf_counter() - first
    return taken + [once() for _ in range(min(200, max(3, int(seconds / each))) - 1)]


def _captured(call: Call) -> tuple[Callable[[], object], str]:
    """(what replays `call`, how): a CUDA graph if it can be captured, else the call."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # capturing wants what was set up on a stream that is not the default
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:  # it waits for the device, or a graph of its own needs too much memory
        torch.cuda.synchronize()
        return call, "events"
    return graph.replay, "CUDA graph"


def seconds_of(call: Call, device: torch.device) -> float:
    """Seconds of one call, launches included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _clock(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def peak_extra_bytes(call: Call, device: torch.device) -> int | None:
    """Peak GPU memory of a call beyond what was there before it and what it returns; None on a CPU."""
    if device.type == "cpu":
        return None
    gc.collect()  # what was freed during the call would make it take less than it does
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    returned = sum(tensor.numel() * tensor.element_size() for tensor in call())
    return torch.cuda.max_memory_allocated() - before - returned


def copy_rate(device: torch.device, *, quick: bool = False) -> float:
    """Bytes per second that a copy of 512 MiB (`quick`: 4) reads and writes: the memory's speed, as any call can have
    it."""
    size, seconds = (2**22, 0.02) if quick else (2**29, 0.2)
    source = torch.arange(size // 8, device=device)
    target = torch.empty_like(source)

    def call() -> Sequence[Tensor]:
        return (target.copy_(source),)

    call()
    return 2 * size / time_call(call, device, seconds=seconds).p50_us * 1e6


def floor_columns(moved: int, rate: float, p50_us: float) -> Row:
    """What a time of `p50_us` is worth where no version can move less than `moved` bytes at `rate` bytes a second."""
    floor_us = moved / rate * 1e6
    return {
        "floor_bytes": moved,
        "copy_gb_per_s": rate / 1e9,
        "floor_us": floor_us,
        "gb_per_s": moved / p50_us / 1e3,
        "of_floor": floor_us / p50_us,
    }


def give_memory_back(device: torch.device) -> None:
    """Make what nobody holds any more free for the next case, where memory is scarce: on a GPU."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def normal(*shape: int, seed: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers, from a generator of their own: a failed capture leaves the default one unusable."""
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device, dtype=dtype)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
