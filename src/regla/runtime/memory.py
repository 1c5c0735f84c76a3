"""How much memory this process uses."""

from __future__ import annotations

import os
from pathlib import Path

import torch


def memory_used(device: torch.device) -> int | None:
    """Bytes in use now: of tensors on a GPU, else of the process (its resident set); None where the system does not
    tell."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    except OSError:
        return None
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
