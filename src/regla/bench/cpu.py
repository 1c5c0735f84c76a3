"""What the CPU path promises, measured: `regla bench cpu --out benchmarks/cpu.jsonl`.

forms   native and chunked against the recurrence, forward and backward
delta   the same of the delta rule
decode  time per generated token and bytes of cache, early and late in a sequence
memory  peak memory of a forward pass against its length
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from regla.bench.measure import Case, Row
from regla.ops import gated_delta_attention, gated_linear_attention, regla_attention
from regla.ops.dispatch import why_not_native


def cases() -> list[Case]:
    """By the name of the benchmark."""

    def case(name: str, measure: Callable[[], list[Row]]) -> Case:
        def rows() -> Iterator[Row | str]:
            yield from measure()

        return Case(name, rows)

    of_rules = [case("forms", measure_forms), case("delta", measure_delta)]
    return [*of_rules, case("decode", measure_decode), case("memory", measure_memory)]


def measure_forms(
    B: int = 4, T: int = 2048, H: int = 12, K: int = 64, V: int = 64, *, axis: str = "value", turns: int = 5
) -> list[dict[str, Any]]:
    """Seconds of forward and backward of both operations of the additive rule by each backend there is; medians."""
    q, k, v, gate, refine = (torch.randn(B, T, H, d, requires_grad=True) for d in (K, K, V, V, V))
    decay = (-torch.rand(B, T, H, V if axis == "value" else K)).requires_grad_()
    decays: dict[str, Any] = {"gv" if axis == "value" else "gk": decay}
    operations: dict[str, tuple[_Operation, tuple[torch.Tensor, ...]]] = {
        "gated_linear_attention": (
            lambda backend: gated_linear_attention(q, k, v, **decays, backend=backend)[0],
            (q, k, v, decay),
        ),
        "regla_attention": (
            lambda backend: regla_attention(q, k, v, gate, refine, gate_axis=axis, backend=backend)[0],
            (q, k, v, gate, refine),
        ),
    }
    rows = []
    for name, (operation, leaves) in operations.items():
        rows += _against_recurrence("forms", name, axis, operation, leaves, turns)
    return rows


def measure_delta(
    shapes: Sequence[tuple[int, ...]] = ((1, 1024, 4, 64, 64), (1, 2048, 12, 64, 64)), turns: int = 5
) -> list[dict[str, Any]]:
    """Seconds of forward and backward of the delta rule with decays per channel, by each backend there is; medians."""
    rows = []
    for B, T, H, K, V in shapes:
        keys = torch.nn.functional.normalize(torch.randn(B, T, H, K), dim=-1)
        made = torch.randn(B, T, H, K), keys, torch.randn(B, T, H, V), torch.rand(B, T, H), -torch.rand(B, T, H, K)
        leaves = tuple(x.requires_grad_() for x in made)

        def operation(backend: str, leaves: tuple[torch.Tensor, ...] = leaves) -> torch.Tensor:
            return gated_delta_attention(*leaves, backend=backend)[0]

        rows += _against_recurrence("delta", "gated_delta_attention", "key", operation, leaves, turns)
    return rows


_Operation = Callable[[str], torch.Tensor]


def _against_recurrence(
    benchmark: str, name: str, axis: str, operation: _Operation, leaves: tuple[torch.Tensor, ...], turns: int
) -> list[dict[str, Any]]:
    """Rows of forward and backward by each backend there is; medians.

    In a turn the recurrence runs once, and then every other backend again and again for as long: so that what else the
    machine does meets all of them alike."""
    _q, k, v, *_ = leaves
    load = os.getloadavg()[0]
    d_o = torch.randn_like(v)
    backends = ["chunked"] if why_not_native(k, v) else ["native", "chunked"]
    seconds: dict[str, list[float]] = {backend: [] for backend in ("recurrent", *backends)}
    for backend in backends:  # the first calls compile and fill caches
        torch.autograd.grad(operation(backend), leaves, d_o)
    for _ in range(turns):
        at_least = 0.0
        for backend in ("recurrent", *backends):
            spent: list[float] = []
            while not spent or sum(spent) < at_least:
                start = time.perf_counter()
                torch.autograd.grad(operation(backend), leaves, d_o)
                spent.append(time.perf_counter() - start)
            at_least = at_least or spent[0]
            seconds[backend] += spent
    median = {backend: statistics.median(taken) for backend, taken in seconds.items()}
    (B, T, H, K), V = k.shape, v.shape[-1]
    return [
        {
            "benchmark": benchmark,
            "operation": name,
            "backend": backend,
            "shape": {"B": B, "T": T, "H": H, "K": K, "V": V},
            "axis": axis,
            "dtype": "float32",
            "seconds": median[backend],
            "recurrent_seconds": median["recurrent"],
            "ratio": median["recurrent"] / median[backend],
            "load_before": round(load, 2),
        }
        for backend in backends
    ]


@torch.no_grad()
def measure_decode(early: int = 128, late: int = 8192, steps: int = 300) -> list[dict[str, Any]]:
    """Median seconds per generated token at two positions, taken in turn, and bytes of cache at each."""
    from transformers import DynamicCache

    from regla.models import ReGLAConfig, ReGLAForCausalLM
    from regla.models.cache import cache_bytes

    config = ReGLAConfig(
        vocab_size=1024, hidden_size=256, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4
    )
    model = ReGLAForCausalLM(config).eval()
    token = torch.zeros(1, 1, dtype=torch.long)
    caches = {position: DynamicCache(config=config) for position in (early, late)}
    for position, cache in caches.items():
        model(torch.randint(1024, (1, position)), past_key_values=cache, logits_to_keep=1)
    seconds: dict[int, list[float]] = {position: [] for position in caches}
    for _ in range(steps):
        for position, cache in caches.items():
            start = time.perf_counter()
            model(token, past_key_values=cache)
            seconds[position].append(time.perf_counter() - start)
    median = {position: statistics.median(taken) for position, taken in seconds.items()}
    return [
        {
            "benchmark": "decode",
            "position": position,
            "seconds_per_token": median[position],
            "ratio_to_early": median[position] / median[early],
            "cache_bytes": cache_bytes(cache),
        }
        for position, cache in caches.items()
    ]


def measure_memory(lengths: tuple[int, ...] = (8192, 16384, 32768)) -> list[dict[str, Any]]:
    """Peak resident bytes of a chunked forward pass, each length in a process of its own (B1 H4 K=V=64).

    glibc would keep freed memory of up to 32 MiB at a time for itself, more or less of it from run to run. With a fixed
    threshold it gives every tensor's memory back, and the peak is that of the tensors.
    """
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    rows = []
    for T in lengths:
        program = f"from regla.bench.cpu import _forward_peak; print(_forward_peak({T}))"
        taken = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment
        )
        rows.append({"benchmark": "memory", "T": T, "peak_bytes": int(taken.stdout)})
    return rows


def _forward_peak(T: int) -> int:
    """Resident bytes that inputs, forward pass and output add at their peak, in a process that has run a short one."""

    def run(length: int) -> None:
        q, k, v, gate, refine = (torch.randn(1, length, 4, 64) for _ in range(5))
        with torch.no_grad():
            regla_attention(q, k, v, gate, refine, backend="chunked")

    run(512)
    before = _peak_bytes()
    run(T)
    return _peak_bytes() - before


def _peak_bytes() -> int:
    """Peak resident memory of this process (Linux). `getrusage` would also count what the parent had."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM; the memory benchmark needs Linux")
