"""Where a command computes, and in which precision."""

from __future__ import annotations

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def pick_device(name: str) -> torch.device:
    """`auto` is the GPU if there is one; a GPU asked for and absent is an error, never a silent CPU run."""
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"Unknown device {name!r}; use auto, cpu or cuda.")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("CUDA was asked for, but this PyTorch sees no GPU; use --device cpu or auto.")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
    return torch.device(name)


def autocast(device: torch.device, dtype: str) -> torch.autocast:
    """Matrix products in `dtype` where that is safe; weights stay float32. For `float32` it does nothing."""
    if dtype not in DTYPES:
        raise ValueError(f"Unknown dtype {dtype!r}; use float32 or bfloat16.")
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16")
