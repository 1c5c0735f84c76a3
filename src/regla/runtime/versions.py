"""What a figure depends on besides the options: versions, commit, device."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch

import regla


def versions() -> dict[str, str | None]:
    """Of what decides the numbers of a model: regla, Python, PyTorch, transformers."""
    return {
        "regla": regla.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": package_version("transformers"),
    }


def package_version(name: str) -> str | None:
    """Of an installed package; None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def device_name(device: torch.device | None = None) -> str:
    """The GPU, or the processor and its number of cores. device: None is the GPU if there is one."""
    cuda = torch.cuda.is_available() if device is None else device.type == "cuda"
    return torch.cuda.get_device_name(device) if cuda else _cpu_name()


def commit() -> str | None:
    """The commit of the checkout this code runs from, with "+" if it has changes; None outside of one."""
    here = Path(regla.__file__).parent
    try:
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True)
        changes = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no", "--", "."],
            cwd=here,
            capture_output=True,
            text=True,
        )
    except OSError:
        return None
    if head.returncode:
        return None
    return head.stdout.strip() + ("+" if changes.stdout.strip() else "")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {len(names)} cores"
