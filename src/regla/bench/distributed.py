"""Training in several processes beside training in one, from the parts that `regla train` runs on; under torchrun.

losses      steps in float32: the largest difference from the losses of one process; what a process holds and what all
            of them send, beside the formulas of docs/scaling.md
throughput  tokens per second, every process with as many sequences as one process alone has
length      one long sequence, its tokens shared: time of a step, memory, bytes that a layer sends
kill        `regla train`, one process of which is killed: how it ends, and how one process goes on

What the others are compared with the first process measures alone, while they wait.
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from regla.bench.measure import Case, Row, dtype_name, give_memory_back
from regla.bench.models import build, configs
from regla.data.embedded import embedded_text
from regla.runtime.checkpoint import FOLDER, found_in
from regla.runtime.device import float32_products
from regla.runtime.distributed import Processes, local
from regla.runtime.log import read_log
from regla.runtime.progress import Progress
from regla.train.config import LoopConfig
from regla.train.loop import optimise
from regla.train.model import count_parameters
from regla.train.parallel import PARALLEL, Parallel, SequenceParallel

if TYPE_CHECKING:
    from regla.models import ReGLAConfig

BENCHMARK = "bench distributed"
_PATIENCE = 240.0  # seconds for a command of the case `kill`
_SMALL = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "layer_types": ["linear_attention"] * 8,
}
_ON_A_CPU = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "layer_types": ["linear_attention"] * 4,
}
_VOCABULARY = {"vocab_size": 16384}  # else the logits of a long sequence would be most of its memory


class Ran(NamedTuple):
    """Figures of a run: the loss of every step, seconds of each behind the third, tokens per second; the most that a
    process holds in weights, gradients and optimiser, and the peak memory of its device; the bytes that all processes
    together sent from layer to layer, and, over the loopback device of the machine, in a step."""

    losses: list[float]
    seconds: list[float]
    tokens_per_second: float
    state_bytes: int
    peak_bytes: int | None
    sent_bytes: int
    wire_bytes: float | None


class Bench(NamedTuple):
    """What the cases have in common."""

    processes: Processes
    device: torch.device
    dtype: str
    compiled: bool
    quick: bool

    def setting(self, measure: str, config: LoopConfig, **more: Any) -> dict[str, Any]:
        return {
            "measure": measure,
            "processes": self.processes.count,
            "length": config.seq_len,
            "batch": config.batch_size,
            "dtype": config.dtype,
            "compiled": config.compile,
            **more,
        }

    def run(self, kind: str | None, model: ReGLAConfig, config: LoopConfig, *, wait: bool = False) -> Ran | None:
        """`optimise` on bytes of text. kind: None is the first process alone, whose figures all get, or None where its
        memory is too small. wait: for the device behind every step, whose time is then exact."""
        if kind is None:
            ran = None
            if self.processes.is_first:
                with suppress(torch.OutOfMemoryError):
                    ran = self._optimise(Parallel(), model, config, wait)
            return self.processes.value_of_first(ran)
        ran = self._optimise(PARALLEL[kind](self.processes), model, config, wait)
        sent = torch.tensor(float(ran.sent_bytes), dtype=torch.float64, device="cpu")
        peak = None if ran.peak_bytes is None else self.processes.largest(ran.peak_bytes)
        return ran._replace(
            state_bytes=self.processes.largest(ran.state_bytes),
            peak_bytes=peak,
            sent_bytes=round(float(self.processes.mean(sent)) * self.processes.count),
        )

    def _optimise(self, parallel: Parallel, model: ReGLAConfig, config: LoopConfig, wait: bool) -> Ran:
        cuda = self.device.type == "cuda"
        give_memory_back(self.device)
        if config.compile:
            torch.compiler.reset()
        built, progress = build(model, self.device, torch.float32), Progress()
        ends: list[float] = []
        wire: list[int] = []
        held: list[int] = []

        def weigh(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            if not held:
                held.append(_held_bytes(optimizer))

        def stop() -> bool:
            if wait and cuda:
                torch.cuda.synchronize()
            ends.append(time.perf_counter())
            if not cuda:
                wire.append(_loopback_bytes())
            return False

        if cuda:
            torch.cuda.reset_peak_memory_stats()
        weighing = register_optimizer_step_post_hook(weigh)
        try:
            with float32_products():
                optimise(built, _tokens(self.device), config, progress=progress, stop=stop, parallel=parallel)
        finally:
            weighing.remove()
        rate = progress.tokens_per_second(config.tokens_per_step)
        assert rate is not None
        return Ran(
            losses=progress.losses,
            seconds=[end - start for start, end in pairwise(ends)][2:],
            tokens_per_second=rate,
            state_bytes=held[0],
            peak_bytes=torch.cuda.max_memory_allocated() if cuda else None,
            sent_bytes=parallel.exchange.sent if isinstance(parallel, SequenceParallel) else 0,
            wire_bytes=None if cuda else (wire[-1] - wire[0]) / (len(wire) - 1),
        )


def cases(
    processes: Processes, device: torch.device, dtype: torch.dtype, *, quick: bool = False, eager: bool = False
) -> list[Case]:
    """As the module says, of each kind of parallelism that a measure concerns."""
    bench = Bench(processes, device, dtype_name(dtype), device.type == "cuda" and not eager, quick)
    one = cache(partial(_one, bench))
    return [
        *(Case(f"losses/{kind}", partial(_losses, bench, one, kind)) for kind in PARALLEL),
        *(Case(f"throughput/{kind}", partial(_throughput, bench, one, kind)) for kind in ("ddp", "fsdp")),
        Case("length/sequence", partial(_length, bench)),
        Case("kill/fsdp", partial(_kill, bench)),
    ]


def _one(bench: Bench, measure: str) -> Ran | None:
    """What one process does, measured once."""
    model, config = _of(measure, bench, processes=1)
    return bench.run(None, model, config)


def _of(measure: str, bench: Bench, *, processes: int) -> tuple[ReGLAConfig, LoopConfig]:
    """The model and the run of `losses` and `throughput`."""
    if measure == "losses":
        small = bench.device.type == "cpu"
        length, steps = (64, 10) if bench.quick else (128, 50) if small else (1024, 100)
        config = LoopConfig(steps=steps, seq_len=length, batch_size=8, lr=1e-3)
        own = {} if bench.quick else _ON_A_CPU if small else _SMALL
    else:
        length, batch, steps = (64, 2, 15) if bench.quick else (2048, 16, 60)
        config = LoopConfig(
            steps=steps, seq_len=length, batch_size=batch * processes, dtype=bench.dtype, compile=bench.compiled
        )
        own = {}
    return configs(max_length=length, quick=bench.quick, overrides=own)["regla"], config


def _losses(bench: Bench, one: Any, kind: str) -> Iterator[Row | str]:
    alone = one("losses")
    assert alone is not None
    model, config = _of("losses", bench, processes=bench.processes.count)
    ran = bench.run(kind, model, config)
    assert ran is not None
    parameters = count_parameters(model)
    yield {
        "benchmark": BENCHMARK,
        "subject": kind,
        "setting": bench.setting("losses", config, steps=config.total_steps),
        "parameters": parameters,
        "state_bytes": ran.state_bytes,
        "formula_state_bytes": 16 * parameters / (bench.processes.count if kind == "fsdp" else 1),
        "wire_bytes_of_a_step": ran.wire_bytes,
        "formula_wire_bytes_of_a_step": wire_bytes(
            kind, model, config, processes=bench.processes.count, gloo=bench.device.type == "cpu"
        ),
        "largest_difference": max(abs(a - b) for a, b in zip(ran.losses, alone.losses, strict=True)),
        "first_loss": ran.losses[0],
        "last_loss": ran.losses[-1],
        "last_loss_of_one": alone.losses[-1],
    }


def _throughput(bench: Bench, one: Any, kind: str) -> Iterator[Row | str]:
    alone = one("throughput")
    assert alone is not None
    model, config = _of("throughput", bench, processes=bench.processes.count)
    ran = bench.run(kind, model, config)
    assert ran is not None
    yield {
        "benchmark": BENCHMARK,
        "subject": kind,
        "setting": bench.setting("throughput", config),
        "tokens_per_second": ran.tokens_per_second,
        "tokens_per_second_of_one": alone.tokens_per_second,
        "times_one": ran.tokens_per_second / alone.tokens_per_second,
        "peak_bytes": ran.peak_bytes,
        "peak_bytes_of_one": alone.peak_bytes,
    }


def _length(bench: Bench) -> Iterator[Row | str]:
    """With activation checkpointing where one process has not enough memory without."""
    small = bench.device.type == "cpu"
    length = 128 if bench.quick else 4096 if small else 131072
    model = long_model(bench, length)
    for checkpointing in (False, True):
        config = LoopConfig(
            steps=9,
            seq_len=length,
            batch_size=1,
            dtype=bench.dtype,
            compile=bench.compiled,
            activation_checkpointing=checkpointing,
        )
        alone = bench.run(None, model, config, wait=True)
        if alone is not None:
            break
        yield f"length {length:,} without activation checkpointing: out of memory in one process"
    ran = bench.run("sequence", model, config, wait=True)
    assert ran is not None
    seconds = statistics.median(ran.seconds)
    row = {
        "benchmark": BENCHMARK,
        "subject": "sequence",
        "setting": bench.setting("length", config, activation_checkpointing=config.activation_checkpointing),
        "step_seconds": seconds,
        "peak_bytes": ran.peak_bytes,
        "sent_bytes_of_a_layer": ran.sent_bytes / _exchanges(bench, model, config),
        "formula_bytes_of_a_layer": sent_bytes(model, batch_size=1, dtype=bench.dtype),
    }
    if alone is not None:
        of_one = statistics.median(alone.seconds)
        row |= {
            "step_seconds_of_one": of_one,
            "times_one": of_one / seconds,
            "peak_bytes_of_one": alone.peak_bytes,
            "largest_difference": max(abs(a - b) for a, b in zip(ran.losses, alone.losses, strict=True)),
        }
    yield row


def long_model(bench: Bench, length: int) -> ReGLAConfig:
    overrides = {} if bench.quick else _ON_A_CPU if bench.device.type == "cpu" else _VOCABULARY
    return configs(max_length=length, quick=bench.quick, overrides=overrides)["regla"]


def sent_bytes(config: ReGLAConfig, *, batch_size: int, dtype: str) -> int:
    """Bytes that a linear layer sends over each boundary between processes in a step: S, m and the convolution's last
    inputs forward, the gradients of S and of those inputs back (docs/scaling.md)."""
    assert config.head_dim is not None and config.num_key_value_heads is not None
    H, K = config.num_key_value_heads, config.head_dim
    V = config.value_head_dim or K
    channels = config.num_attention_heads * K + H * (K + V)
    halo = max(0, config.linear_conv_kernel_dim - 1) * channels * (2 if dtype == "bfloat16" else 4)
    return batch_size * (2 * (4 * H * config.num_features * V + halo) + 4 * H)


def wire_bytes(kind: str, model: ReGLAConfig, config: LoopConfig, *, processes: int, gloo: bool) -> int:
    """Bytes that all processes together send in a step (docs/scaling.md): of ddp and sequence gradients all-reduced;
    of fsdp, for each batch, two gathers of the blocks and one of what is outside of them, and a reduce-scatter of all,
    which gloo makes of an all-reduce."""
    around = 4 * (processes - 1)  # a number of everything once around a ring
    parameters = count_parameters(model)
    if kind == "fsdp":
        outside = model.hidden_size * (model.vocab_size * (1 if model.tie_word_embeddings else 2) + 1)
        gathers = 2 * (parameters - outside) + outside
        return around * config.accumulate * (gathers + (2 if gloo else 1) * parameters)
    state = sent_bytes(model, batch_size=config.batch_size, dtype=config.dtype) if kind == "sequence" else 0
    return around * 2 * parameters + (processes - 1) * model.num_hidden_layers * config.accumulate * state


def _held_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of the weights, their gradients and what the optimiser keeps, this process's part."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    kept = [entry for parameter in parameters for entry in optimizer.state[parameter].values()]
    gradients = [parameter.grad for parameter in parameters]
    tensors = [local(x) for x in (*parameters, *gradients, *kept) if isinstance(x, Tensor)]
    return sum(x.numel() * x.element_size() for x in tensors)


def _loopback_bytes() -> int:
    """Sent over the loopback device so far, by whatever runs on this machine (Linux)."""
    for line in Path("/proc/net/dev").read_text(encoding="ascii").splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == "lo":
            return int(counts.split()[8])
    return 0


def _exchanges(bench: Bench, model: ReGLAConfig, config: LoopConfig) -> int:
    """How many times a layer's state crossed a boundary."""
    return (bench.processes.count - 1) * model.num_hidden_layers * config.total_steps * config.accumulate


def _kill(bench: Bench) -> Iterator[Row | str]:
    """A run of its own, started by the first process here; one of its processes is killed behind its first checkpoint,
    and one process goes on. Beside it, undisturbed, runs the same in one process."""
    row = None
    if bench.processes.is_first:
        with tempfile.TemporaryDirectory() as folder:
            row = _killed(Path(folder), bench)
    yield bench.processes.value_of_first(row)


def _killed(folder: Path, bench: Bench) -> Row:
    steps, every = (40, 10) if bench.quick else (60, 20) if bench.device.type == "cpu" else (300, 50)
    shape = {"hidden-size": 32, "layers": 2, "heads": 2, "seq-len": 32} if bench.quick else {"seq-len": 256}
    options: dict[str, Any] = {"steps": steps, "save-every": every, "device": bench.device.type, "vocab-size": 300}
    options |= {"batch-size": 2 * bench.processes.count, "lr": 1e-3} | shape
    train = ["regla", "train", *(str(part) for name, value in options.items() for part in ("--" + name, value))]
    whole, out = folder / "whole", folder / "run"
    several = ["torch.distributed.run", "--standalone", f"--nproc-per-node={bench.processes.count}", "-m"]
    undisturbed = _start([*train, "--out", str(whole)], folder / "whole.txt")
    run = _start([*several, *train, "--out", str(out), "--parallel", "fsdp"], folder / "run.txt")
    try:
        _await(lambda: bool(found_in(out / FOLDER)) or run.poll() is not None)
        os.kill(_children(run.pid)[-1], signal.SIGKILL)
        killed = time.perf_counter()
        run.wait(_PATIENCE)
        seconds = time.perf_counter() - killed
        left = found_in(out / FOLDER)[-1].name
        resumed = _start([*train, "--out", str(out), "--resume"], folder / "resumed.txt")
        codes = [process.wait(_PATIENCE) for process in (resumed, undisturbed)]
    finally:
        for process in (run, undisturbed):
            process.kill()
    texts = [(folder / name).read_text(errors="replace") for name in ("run.txt", "resumed.txt", "whole.txt")]
    if codes != [0, 0]:
        raise RuntimeError(f"Runs of the case kill ended with exit codes {codes}: {texts[1][-999:]} {texts[2][-999:]}")
    ours, theirs = ([record["loss"] for record in read_log(path)] for path in (out, whole))
    return {
        "benchmark": BENCHMARK,
        "subject": "fsdp",
        "setting": {"measure": "kill", "processes": bench.processes.count, "steps": steps},
        "exit_code": run.returncode,
        "seconds_to_end": seconds,
        "says": [x.replace(f"{folder}{os.sep}", "") for x in texts[0].splitlines() if x.startswith("regla: error")],
        "resumed_from": left,
        "records": len(ours),
        "largest_difference": max(abs(a - b) for a, b in zip(ours, theirs, strict=True)),
    }


def _start(arguments: list[str], file: Path) -> subprocess.Popen[bytes]:
    """A module with arguments, outside of this run's processes; what it writes goes to the file."""
    mine = ("RANK", "WORLD_SIZE", "GROUP_", "ROLE_", "LOCAL_", "MASTER_", "TORCHELASTIC_", "TORCH_NCCL_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(mine)}
    with file.open("wb") as written:
        return subprocess.Popen(
            [sys.executable, "-m", *arguments], stdout=written, stderr=subprocess.STDOUT, env=environment
        )


def _await(ready: Callable[[], bool]) -> None:
    end = time.perf_counter() + _PATIENCE
    while not ready():
        if time.perf_counter() > end:
            raise TimeoutError(f"A run of the case kill has no checkpoint after {_PATIENCE:.0f} seconds.")
        time.sleep(0.01)


def _children(pid: int) -> list[int]:
    """The processes that process `pid` started (Linux)."""
    found = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        found += [int(child) for child in file.read_text().split()]
    return sorted(found)


def _tokens(device: torch.device) -> Tensor:
    """Bytes of text, all below 128."""
    text = "\n".join(embedded_text().documents).encode("ascii", "ignore")
    return torch.from_numpy(np.frombuffer(text, np.uint8).astype(np.int32)).to(device)
