"""Which backend runs: chosen once, visibly. One that is asked for and cannot run is an error that says why."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

BACKENDS = ("recurrent", "chunked", "triton")

#: Channels of a key or value that the kernels hold in registers; those that the decode kernel does.
WIDEST = 128
WIDEST_STEP = 256
WIDEST_CROWDED = 64  # more leaves no room in shared memory

_TRITON_IS_INSTALLED = importlib.util.find_spec("triton") is not None


def choose_backend(
    backend: str,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    key_max: str = "decay",
    *,
    crowded: bool = False,
) -> str:
    """The backend that `backend` stands for: itself, or for "auto" the recurrence for one token, the kernels where they
    can run on a GPU, else the chunked form.

    Raises:
        ValueError: an unknown name, or "triton" where the kernels cannot run.
    """
    if backend == "auto":
        if k.shape[1] == 1 and cu_seqlens is None:
            return "recurrent"
        return "triton" if k.is_cuda and why_not_triton(k, v, key_max, crowded=crowded) is None else "chunked"
    if backend not in BACKENDS:
        names = ", ".join(map(repr, ("auto", *BACKENDS)))
        raise ValueError(f"backend is {backend!r}; expected one of {names}")
    if backend == "triton":
        reason = why_not_triton(k, v, key_max, crowded=crowded)
        if reason is not None:
            raise ValueError(f"backend='triton' cannot run: {reason}; use 'auto' or 'chunked'")
    return backend


def runs_decode_kernel(backend: str, key_max: str, k: Tensor, v: Tensor, *others: Tensor | None) -> bool:
    """Whether the decode kernel takes these inputs of `safe_exp_attention`: one token, no gradient needed, "triton"
    asked for. "auto" takes the recurrence until the kernel has been measured on a GPU."""
    return (
        k.shape[1] == 1
        and backend == "triton"
        and not (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (k, v, *others)))
        and why_not_triton(k, v, key_max, WIDEST_STEP) is None
    )


def why_not_triton(
    k: Tensor, v: Tensor, key_max: str = "decay", most: int = WIDEST, *, crowded: bool = False
) -> str | None:
    """Why the kernels, for heads of at most `most` channels, cannot run on these tensors; None if they can.

    `crowded`: both axes decay, and several query heads share a state.
    """
    if not _TRITON_IS_INSTALLED:
        return "the package triton is not installed"
    if not k.is_cuda and not _is_interpreted():
        return f"the tensors are on {k.device.type}, and the kernels need a CUDA GPU"
    if v.dtype not in (torch.bfloat16, torch.float32):
        return f"v is {v.dtype}, and the kernels take bfloat16 and float32"
    if not k.is_cuda and v.dtype == torch.bfloat16:
        return "v is bfloat16, which Triton's interpreter multiplies as integers"
    if key_max == "sequence":
        return "key_max is 'sequence', which is not causal, and the kernels run forward in time"
    widest = max(k.shape[-1], v.shape[-1])
    if widest > most:
        return f"a head has {widest} channels, and the kernels hold at most {most}"
    if crowded and v.dtype == torch.float32 and widest > WIDEST_CROWDED:
        return (
            f"a head has {widest} channels in float32, both axes decay and several query heads share a state, and then "
            f"the kernels hold at most {WIDEST_CROWDED}"
        )
    return None


def _is_interpreted() -> bool:
    """Whether Triton's own interpreter runs the kernels, on a CPU and slowly: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"
