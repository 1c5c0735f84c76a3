"""Where a command computes, and in which precision.

float32 means IEEE float32 on every device, in training, evaluation and conversion. bfloat16 is autocast: matrix
products in bfloat16 where that is safe; weights, states and the loss stay float32. Training in bfloat16 lets a GPU
compute the products that autocast leaves in float32 in TF32. All of it holds for the run alone and is restored after
it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from regla.runtime.errors import OptionError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TF32_IN_TRAINING = ("bfloat16",)
"""The dtypes whose training computes what they leave in float32 in TF32."""


def pick_device(name: str) -> torch.device:
    """`auto` is the GPU if there is one; a GPU asked for and absent is an error, never a silent CPU run."""
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"Unknown device {name!r}; use auto, cpu or cuda.")
    if name == "cuda" and not torch.cuda.is_available():
        raise OptionError("CUDA was asked for, but this PyTorch sees no GPU; use {device} cpu or auto.")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def autocast(device: torch.device, dtype: str) -> torch.autocast:
    """Matrix products in `dtype` where that is safe; weights stay float32. For `float32` it does nothing."""
    if dtype not in DTYPES:
        raise ValueError(f"Unknown dtype {dtype!r}; use float32 or bfloat16.")
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16")


@contextmanager
def float32_products(*, tf32: bool = False) -> Iterator[None]:
    """Within the context a GPU multiplies and convolves float32 in float32, or in TF32; then as before."""
    matmul, conv = _matmul_precision(), _conv_in_tf32()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        if matmul is not None:
            torch.set_float32_matmul_precision(matmul)
        if conv is not None:
            torch.backends.cudnn.allow_tf32 = conv


@contextmanager
def precision(device: torch.device, dtype: str) -> Iterator[None]:
    """Evaluation in `dtype`: `autocast`, and float32 where it leaves float32."""
    with float32_products(), autocast(device, dtype):
        yield


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of the device is full."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def _matmul_precision() -> str | None:
    """None where settings of single operations contradict each other: PyTorch then names no common one."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


def _conv_in_tf32() -> bool | None:
    try:
        return torch.backends.cudnn.allow_tf32
    except RuntimeError:
        return None
