"""How a call runs: one plan, made once and visibly. What is asked for and cannot run is an error that says why."""

from __future__ import annotations

import importlib.util
import os
from typing import NamedTuple

import torch
from torch import Tensor

from regla.ops.call import Call
from regla.ops.forward_mode import has_tangents
from regla.ops.native.build import why_missing
from regla.ops.triton.chip import why_unsupported

BACKENDS = ("recurrent", "chunked", "native", "triton")

#: Channels of a key or value that a program of the GPU's kernels holds in registers (of wider heads it takes slices);
#: those that one of the decode kernel does, which takes no slices.
WIDEST = 128
WIDEST_STEP = 256
WIDEST_CROWDED = 64  # more leaves no room in shared memory
#: Taps of a short convolution up to which a thread of its kernels holds all it needs in registers.
MOST_TAPS = 8

NOT_CAUSAL = "key_max is 'sequence', which is not causal, and the kernels run forward in time"
_INTERPRETED = (torch.float32,)  # what Triton's interpreter computes rightly
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_TRITON_IS_INSTALLED = importlib.util.find_spec("triton") is not None


class Plan(NamedTuple):
    """How a call of the additive rule runs."""

    backend: str
    """"recurrent", "chunked", "native" or "triton"."""
    is_step: bool = False
    """One token that needs no gradient: the decode kernel of `backend`, which overwrites a state."""
    takes_logits: bool = False
    """The kernels form features and gates themselves, and know masks; else they are given both, formed before."""
    normalises: bool = False
    """They normalise q and k, too, as `Call.qk_norm` says."""
    slices: int = 0
    """Channels of a key or value that the kernels take at once, of heads wider than that; 0: whole heads."""


def plan(call: Call, backend: str) -> Plan:
    """The plan of a call whose input has been checked.

    Raises:
        ValueError: an unknown backend, or one that is asked for and cannot run.
    """
    q, k, v, gates, _, key_max, _, cu_seqlens, *_ = call
    if has_tangents(call.tensors()):
        return Plan(for_forward_mode(backend))
    if key_max is not None and cu_seqlens is None and k.shape[1] == 1:
        engine = step_engine(backend, key_max, k, v, q, *gates[:4], call.S, *(call.qk_norm or ())[:2])
        if engine is not None:
            return Plan(engine, is_step=True)
    chosen = choose_backend(backend, k, v, cu_seqlens, key_max)
    if chosen == "native":
        return Plan(chosen, takes_logits=key_max is not None)
    if chosen != "triton":
        return Plan(chosen)
    most = widest(q, k, v, gates.gk, gates.gv)
    if max(k.shape[-1], v.shape[-1]) > most:
        return Plan(chosen, slices=most)
    return Plan(chosen, takes_logits=key_max is not None, normalises=key_max is not None)


def choose_backend(backend: str, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, key_max: str | None = "decay") -> str:
    """The backend that `backend` stands for: itself, or for "auto" kernels where they can run, on a GPU or a CPU; else
    the recurrence for one token and the chunked form for more. An empty batch has no chunks: the recurrence takes it.

    Raises:
        ValueError: an unknown name, or kernels that are asked for and cannot run.
    """
    if backend == "auto":
        if k.is_cpu and why_not_native(k, v, key_max) is None:
            return "native"
        if k.shape[1] == 1 and cu_seqlens is None:
            return "recurrent"
        backend = "triton" if k.is_cuda and why_not_triton(k, v, key_max) is None else "chunked"
    elif backend not in BACKENDS:
        names = ", ".join(map(repr, ("auto", *BACKENDS)))
        raise ValueError(f"backend is {backend!r}; expected one of {names}")
    elif backend in ("native", "triton"):
        native = backend == "native"
        reason = why_not_native(k, v, key_max) if native else why_not_triton(k, v, key_max)
        if reason is not None:
            raise ValueError(f"backend={backend!r} cannot run: {reason}; use 'auto' or 'chunked'")
    return "recurrent" if k.shape[0] == 0 and backend != "native" else backend


def step_engine(backend: str, key_max: str, k: Tensor, v: Tensor, *others: Tensor | None) -> str | None:
    """Whose decode kernel takes these inputs of `safe_exp_attention`, one token that needs no gradient: "native",
    "triton" or None."""
    if k.shape[1] != 1 or k.shape[0] == 0:
        return None
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (k, v, *others)):
        return None
    if backend in ("auto", "native") and k.is_cpu and why_not_native(k, v, key_max) is None:
        return "native"
    chosen = backend == "triton" or (backend == "auto" and k.is_cuda)
    if not chosen or max(k.shape[-1], v.shape[-1]) > WIDEST_STEP:
        return None
    return "triton" if why_not_triton(k, v, key_max) is None else None


def for_forward_mode(backend: str) -> str:
    """The recurrence, whose operations PyTorch differentiates in any mode."""
    if backend in ("auto", "recurrent"):
        return "recurrent"
    if backend not in BACKENDS:
        choose_backend(backend, torch.empty(0), torch.empty(0), None)
    raise ValueError(
        f"backend={backend!r} has no forward-mode derivative (torch.func.jvp, torch.autograd.forward_ad); use 'auto' "
        "or 'recurrent', or reverse mode"
    )


def widest(q: Tensor, k: Tensor, v: Tensor, gk: Tensor | None, gv: Tensor | None) -> int:
    """Channels of a key or value that the GPU's kernels take at once."""
    crowded = gk is not None and gv is not None and q.shape[2] > k.shape[2] and v.dtype == torch.float32
    return WIDEST_CROWDED if crowded else WIDEST


def why_not_native(k: Tensor, v: Tensor, key_max: str | None = "decay") -> str | None:
    """Why the C kernels cannot run on these tensors; None if they can. Compiles them where nobody has."""
    if key_max == "sequence":
        return NOT_CAUSAL
    if not k.is_cpu:
        return f"the tensors are on {k.device.type}, and the C kernels run on a CPU"
    if torch.float64 in (k.dtype, v.dtype):
        return "a tensor is float64, and the C kernels compute in float32"
    return why_missing()


def why_not_triton(k: Tensor, v: Tensor, key_max: str | None = "decay") -> str | None:
    """Why the GPU's kernels cannot run on these tensors; None if they can."""
    if not _TRITON_IS_INSTALLED:
        return "the package triton is not installed"
    if key_max == "sequence":
        return NOT_CAUSAL
    if not k.is_cuda and not _is_interpreted():
        return f"the tensors are on {k.device.type}, and the kernels need a CUDA GPU"
    if k.is_cuda and (reason := why_unsupported(k.device)) is not None:
        return reason
    if v.dtype not in (torch.bfloat16, torch.float32):
        return f"v is {v.dtype}, and the kernels take bfloat16 and float32"
    if not k.is_cuda and v.dtype not in _INTERPRETED:
        return "v is bfloat16, which Triton's interpreter multiplies as integers"
    return None


def output_norm_kernel_runs(backend: str, h: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None) -> bool:
    """Whether a kernel computes `regla.ops.output_norm` of these."""
    kinds = {x.dtype for x in (h, gate) if x is not None}
    if h.ndim != 4 or any(x is not None and x.device != h.device for x in (weight, bias, gate)):
        return False
    if has_tangents(x for x in (h, weight, bias, gate) if x is not None):
        return False
    (B, T, H, V), parameters = h.shape, [x for x in (weight, bias) if x is not None]
    if any(x.shape != (H, V) for x in parameters) or (gate is not None and gate.shape != (B, T, H * V)):
        return False
    if not _TRITON_IS_INSTALLED or h.numel() == 0 or not kinds <= set(_FLOATS):
        return False
    if backend == "triton" and not h.is_cuda:
        return _is_interpreted() and kinds <= set(_INTERPRETED)
    return h.is_cuda and backend in ("auto", "triton") and why_unsupported(h.device) is None


def short_convolution_kernel_runs(backend: str, x: Tensor, weight: Tensor, state: Tensor | None) -> bool:
    """Whether kernels compute `regla.ops.short_convolution` of these, whose shapes have been checked."""
    tensors = [t for t in (x, weight, state) if t is not None]
    if any(t.device != x.device or t.dtype not in _FLOATS for t in tensors) or has_tangents(tensors):
        return False
    if not _TRITON_IS_INSTALLED or x.numel() == 0 or weight.shape[0] > MOST_TAPS:
        return False
    if backend == "triton" and not x.is_cuda:
        return _is_interpreted() and all(t.dtype in _INTERPRETED for t in tensors)
    return x.is_cuda and backend in ("auto", "triton") and why_unsupported(x.device) is None


def _is_interpreted() -> bool:
    """Whether Triton's own interpreter runs the kernels, on a CPU and slowly: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"
