"""`regla doctor`: what this machine offers, which backend would run, and why. It changes nothing and never fails."""

from __future__ import annotations

import json
import os
import platform
from typing import Any

import torch

from regla.ops.dispatch import choose_backend, why_not_native, why_not_triton
from regla.runtime.install import PACKAGES, install_line, installed
from regla.runtime.versions import package_version, versions

_REQUIRED = ("torch", "transformers", "tokenizers", "safetensors", "huggingface-hub", "numpy", "matplotlib")
_MODULES = {"huggingface-hub": "huggingface_hub"}


def doctor(*, as_json: bool = False) -> dict[str, Any]:
    """Print what `examine` finds, as text or JSON, and return it."""
    found = examine()
    print(json.dumps(found, indent=2) if as_json else describe(found))
    return found


def examine() -> dict[str, Any]:
    """Versions, devices, backends by use and optional packages, in JSON's types."""
    return {
        "regla": versions()["regla"],
        "python": versions()["python"],
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _REQUIRED},
        "cuda": torch.version.cuda,
        "devices": _devices(),
        "default_device": "cuda" if torch.cuda.is_available() else "cpu",
        "backends": _backends(),
        "optional": {name: {"version": _version(name), "for": use} for name, use in PACKAGES.items()},
    }


def describe(found: dict[str, Any]) -> str:
    """The findings as text."""
    lines = [
        f"regla {found['regla']}, Python {found['python']}, {found['platform']}",
        "",
        "Packages",
        *(f"  {name:<16} {version or 'missing'}" for name, version in found["packages"].items()),
        f"  {'CUDA':<16} {found['cuda'] or 'none: this PyTorch is built without it'}",
        "",
        "Devices (--device auto takes " + found["default_device"] + ")",
    ]
    for device in found["devices"]:
        bf16 = "supported" if device["bfloat16"] else "not supported in hardware"
        lines.append(f"  {device['name']:<5} {device['description']}; bfloat16 {bf16}")
    lines += ["", "Backends (what backend='auto' runs here)"]
    for row in found["backends"]:
        lines.append(f"  {row['use']:<27} {row['backend']:<10} {row['why']}")
    lines += ["", "Optional packages"]
    for name, row in found["optional"].items():
        absent = "" if row["version"] else f"; `{install_line(name)}`"
        lines.append(f"  {name:<12} {row['version'] or 'absent':<12} {row['for']}{absent}")
    return "\n".join(lines)


def _version(package: str) -> str | None:
    """Of an installed package that can be imported; None for want of one. Nothing is imported."""
    if not installed(_MODULES.get(package, package)):
        return None
    return package_version(package)


def _devices() -> list[dict[str, Any]]:
    cores = os.cpu_count()
    capabilities = torch.cpu.get_capabilities()
    name = capabilities.get("cpu_name") or platform.machine()
    rows: list[dict[str, Any]] = [
        {
            "name": "cpu",
            "description": f"{name}, {cores} cores, {torch.get_num_threads()} threads",
            # Without such instructions bfloat16 works, slowly.
            "bfloat16": any(bool(value) for key, value in capabilities.items() if "bf16" in key),
        }
    ]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            memory = f"{properties.total_memory / 2**30:.0f} GiB"
            capability = f"compute capability {properties.major}.{properties.minor}"
            rows.append(
                {
                    "name": f"cuda:{index}",
                    "description": f"{properties.name}, {memory}, {capability}",
                    "bfloat16": properties.major >= 8,  # the first generation with bfloat16 matrix units
                }
            )
    return rows


def _backends() -> list[dict[str, str]]:
    """What runs for what, on the default device; and whether the kernels can run, those in C on the CPU."""
    why = {
        "native": "kernels in C",
        "triton": "fused kernels",
        "chunked": "many tokens at once: matrix products over chunks of tokens",
        "recurrent": "a single token is one step of the recurrence",
    }
    rows = []
    for use, length in (("training, reading a prompt", 2), ("decoding token by token", 1)):
        backend = chosen_backend(length)
        rows.append({"use": use, "backend": backend, "why": why[backend]})
    x_BTHK, on_cpu_BTHK = _example(2), _example(2).cpu()
    for kernels, reason in (
        ("native", why_not_native(on_cpu_BTHK, on_cpu_BTHK)),
        ("triton", why_not_triton(x_BTHK, x_BTHK)),
    ):
        backend = "none" if reason else kernels
        rows.append({"use": f"backend={kernels!r}", "backend": backend, "why": reason or why[kernels]})
    return rows


def chosen_backend(length: int) -> str:
    """The backend that "auto" runs for sequences of `length` tokens on the default device."""
    x_BTHK = _example(length)
    return choose_backend("auto", x_BTHK, x_BTHK, None)


def _example(length: int) -> torch.Tensor:
    return torch.ones(1, length, 1, 16, device="cuda" if torch.cuda.is_available() else "cpu")
