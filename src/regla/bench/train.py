"""Tokens per second of training, end to end: forward, backward and AdamW, from the parts that `regla train` runs on.

Models of one shape at several sequence lengths, with the same number of tokens in every step: softmax attention
(PyTorch's SDPA), ReGLA at equal parameters, and that model without its recurrence: with values for outputs, all
projections in place, and with every mixer replaced by the identity. Weights are float32, products run under autocast.
Tokens are random. A model's FLOP utilisation is its floating point operations a second (`regla.bench.flops`) over those
of a large product of matrices, measured in the same run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.nn.functional import rms_norm

from regla.bench.flops import matrix_rate, training_flops
from regla.bench.measure import Case, Row, Timing, dtype_name, give_memory_back, quantiles
from regla.bench.models import build, configs
from regla.layers.norms import norm_and_gate
from regla.report.tables import plain
from regla.runtime.device import autocast
from regla.train.loop import make_optimizer, next_token_loss
from regla.train.regions import compiled_blocks

if TYPE_CHECKING:
    from regla.layers.recurrence import Output, Past, Tokens
    from regla.models import ReGLAForCausalLM
    from regla.ops.call import Gates

BENCHMARK = "bench train"
LENGTHS = (2048, 8192, 32768)
TOKENS = 32768  # of a step
_WARM_UP, _REPEATS, _STEPS = 3, 8, 4  # steps, turns, steps of a turn
_PROFILED, _NAME = 25, 90  # kernels of a profile, characters of a name


class IdentityMixer(nn.Module):
    """Stands where a linear mixer stood and returns its input."""

    def forward(self, x: Tensor, **_: Any) -> tuple[Tensor, None]:
        return x, None


class ValuesForOutputs(nn.Module):
    """Stands where a mixer's update rule stood: h [B, T, HQ, V] = v + 0 (q + k + gates), v [B, T, H, V] repeated for
    the query heads of a group, so that every projection, the norm and the output gate are still at work."""

    def gates(self, gates: Gates, x: Tensor) -> Gates:
        return gates

    def forms_features(self, feature_map: nn.Module) -> bool:
        """It reads logits, and needs no features of them."""
        return True

    def forward(self, feature_map: nn.Module, x: Tokens, past: Past, output: Output) -> tuple[Tensor, None]:
        q, k, v, gates, qk_norm, *_ = x
        if qk_norm is not None:
            q, k = (rms_norm(y, w.shape, w.to(y.dtype), qk_norm.eps) for y, w in ((q, qk_norm.q), (k, qk_norm.k)))
        others = torch.stack([y.flatten(2).sum(-1) for y in (q, k, *gates[:5]) if y is not None]).sum(0)
        h = v.repeat_interleave(q.shape[2] // v.shape[2], 2)
        h = h + 0.0 * others[..., None, None].to(h.dtype)
        return norm_and_gate(output.norm, h, output.gate, output.activation, "auto"), None


def cases(
    device: torch.device,
    dtype: torch.dtype,
    *,
    quick: bool = False,
    eager: bool = False,
    overrides: Mapping[str, Any] | None = None,
    lengths: Sequence[int] = (),
    profile: bool = False,
) -> list[Case]:
    """Every length with softmax, the identity, values for outputs and ReGLA; `overrides` as in `configs`.

    lengths: of sequences, in place of the usual ones. A step has TOKENS tokens, or one sequence where that is longer.
    profile: say behind each row which kernels take the time of a step.
    """
    configs(max_length=1, quick=quick, overrides=overrides)  # what does not fit is found before anything is measured
    usual, tokens = ((16, 64), 64) if quick else (LENGTHS, TOKENS)
    compiled = device.type == "cuda" and not eager
    rate = cache(partial(matrix_rate, device, dtype, quick=quick))
    found = []
    for length in lengths or usual:
        batch = max(1, tokens // length)
        for model in ("softmax", "identity", "values", "regla"):
            measure = partial(_measure, model, length, batch, device, dtype, compiled, quick, overrides, profile, rate)
            found.append(Case(f"{model}/length{length}", measure))
    return found


def _measure(
    name: str,
    length: int,
    batch: int,
    device: torch.device,
    dtype: torch.dtype,
    compiled: bool,
    quick: bool,
    overrides: Mapping[str, Any] | None,
    profile: bool,
    rate: Callable[[], float],
) -> Iterator[Row | str]:
    """A row; where memory runs out, one that says so and another with activation checkpointing."""
    setting = {"length": length, "batch": batch, "dtype": dtype_name(dtype), "compiled": compiled}
    for checkpointing in (False, True):
        row: Row = {
            "benchmark": BENCHMARK,
            "subject": name,
            "setting": setting,
            "activation_checkpointing": checkpointing,
        }
        if overrides and name != "softmax":
            row["overrides"] = dict(overrides)
        try:
            measured, kernels = _train(
                name, length, batch, device, dtype, compiled, checkpointing, quick, overrides, profile
            )
        except torch.OutOfMemoryError:
            yield row | {"out_of_memory": True}
        else:
            done = measured["flops_per_token"] * measured["tokens_per_second"]
            yield row | measured | {"matrix_flops_per_second": rate(), "utilisation": done / rate()}
            if kernels is not None:
                yield kernels
            return
        give_memory_back(device)


def _train(
    name: str,
    length: int,
    batch: int,
    device: torch.device,
    dtype: torch.dtype,
    compiled: bool,
    checkpointing: bool,
    quick: bool,
    overrides: Mapping[str, Any] | None,
    profile: bool,
) -> tuple[Row, str | None]:
    """Figures of a number of steps, and their profile. All that it holds is free when it returns."""
    if compiled:
        torch.compiler.reset()  # else a second length makes the compiler give up fixed shapes
    model = _model(name, length, device, quick, overrides)
    timing, peak, kernels = _time_steps(model, length, batch, dtype, compiled, checkpointing, quick, profile)
    tokens_per_second = length * batch / timing.p50_us * 1e6
    return {
        "parameters": model.num_parameters(),
        **timing.as_row(),
        "tokens_per_second": tokens_per_second,
        "flops_per_token": training_flops(model, length),
        "peak_bytes": peak,
    }, kernels


def _model(
    name: str, length: int, device: torch.device, quick: bool, overrides: Mapping[str, Any] | None = None
) -> ReGLAForCausalLM:
    """Float32, in training mode."""
    both = configs(max_length=length, quick=quick, overrides=overrides)
    model = build(both["softmax" if name == "softmax" else "regla"], device, torch.float32).train()
    for layer in model.model.layers:
        if name == "identity":
            layer.self_attn = IdentityMixer()
        elif name == "values":
            layer.self_attn.rule = ValuesForOutputs()
    return model


def _time_steps(
    model: ReGLAForCausalLM,
    length: int,
    batch: int,
    dtype: torch.dtype,
    compiled: bool,
    checkpointing: bool,
    quick: bool,
    profile: bool,
) -> tuple[Timing, int | None, str | None]:
    """(time of an optimiser step, peak memory of the device in bytes or None, `_profile` of some steps or None)."""
    device = model.device
    cuda = device.type == "cuda"
    optimizer = make_optimizer(model, weight_decay=0.1, device=device)
    if checkpointing:
        # Newer transformers warn about the second name, older ones lack the first.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
    generator = torch.Generator(device).manual_seed(0)
    crop_BL = torch.randint(model.config.vocab_size, (batch, length + 1), generator=generator, device=device)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    with compiled_blocks(model) if compiled else nullcontext():
        loss_of = torch.compile(next_token_loss, dynamic=False) if compiled else next_token_loss

        def turn(steps: int) -> float:
            """Seconds of one step, of several that wait for the device at the end alone, as in training."""
            if cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(steps):
                with autocast(device, dtype_name(dtype)):
                    loss = loss_of(model, crop_BL)
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            if cuda:
                torch.cuda.synchronize()
            return (time.perf_counter() - start) / steps

        turn(1 if quick else _WARM_UP)
        seconds = [turn(1 if quick else _STEPS) for _ in range(3 if quick else _REPEATS)]
        kernels = _profile(turn, 1 if quick else _STEPS, cuda) if profile else None
    return quantiles(seconds, "clock"), torch.cuda.max_memory_allocated() if cuda else None, kernels


def _profile(turn: Callable[[int], float], steps: int, cuda: bool) -> str:
    """A table of what takes the time of a step, of several profiled."""
    activities = [torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profiler:
        seconds = turn(steps)
    return _profile_table(profiler.key_averages(), steps, seconds, cuda)


def _profile_table(events: Iterable[Any], steps: int, seconds: float, cuda: bool) -> str:
    """Kernels on a GPU, operators on a CPU, longest first; events: the profiler's averages over all steps."""
    if cuda:  # what launches kernels counts their time again, and so do named ranges around them
        events = [event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
    entries = [
        (str(event.key), event.self_device_time_total if cuda else event.self_cpu_time_total, event.count)
        for event in events
    ]
    entries.sort(key=lambda entry: -entry[1])
    busy, listed = sum(us for _, us, _ in entries), sum(us for _, us, _ in entries[:_PROFILED])
    rows = [
        [name[:_NAME], f"{count / steps:,.0f}", f"{us / steps:,.0f}", f"{us / busy:.1%}"]
        for name, us, count in entries[:_PROFILED]
    ]
    rows.append(["all others", "", f"{(busy - listed) / steps:,.0f}", f"{(busy - listed) / busy:.1%}"])
    shown = plain(["kernel" if cuda else "operator", "calls", "us a step", "share"], rows)
    return f"Busy {busy / steps / 1e3:.2f} of {seconds * 1e3:.2f} ms a step, profiled.\n{shown}"
