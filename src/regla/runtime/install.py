"""How to install regla and what it does not install by itself: one home for those lines."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json

EXTRAS: dict[str, tuple[str, ...]] = {
    "data": ("datasets>=4", "pyarrow>=18"),
    "eval": ("accelerate>=1.10", "lm_eval>=0.4.13"),
    "gguf": ("accelerate>=1.10", "gguf>=0.10"),
    "lora": ("peft>=0.18",),
    "tensorboard": ("tensorboard>=2.18",),
}
"""What the extras of pyproject.toml install."""

PACKAGES = {
    "accelerate": "loads GGUF files; lm-eval needs it; runs transformers' Trainer",
    "datasets": "reads data sets of Hugging Face (`regla train --dataset`)",
    "gguf": "reads GGUF files (`regla linearize`, `eval` and `generate` of model.gguf)",
    "lm_eval": "tasks, prompts and scores of `regla eval --tasks`",
    "peft": "fine-tunes with adapters (LoRA; `regla linearize --preset lora`)",
    "pyarrow": "reads .parquet files",
    "tensorboard": "writes logs that TensorBoard shows (`regla train --tensorboard`)",
    "triton": "GPU kernels, and torch.compile on a GPU",
}
"""Optional packages and what each enables."""


def install_line(*packages: str) -> str:
    """The command that installs optional packages, at the versions that the extras ask for."""
    ranges = {need.partition(">")[0]: need for extra in EXTRAS.values() for need in extra}
    return "pip install " + " ".join(f'"{ranges.get(package, package)}"' for package in packages)


def require(package: str, what: str, *more: str) -> None:
    """Raise ValueError, one sentence with the line that helps, unless every package can be imported.

    Args:
        package: name of an optional package.
        what: who needs it, such as "a.parquet needs"; the sentence begins with it.
        more: further packages needed for the same.
    """
    missing = [name for name in (package, *more) if not installed(name)]
    if missing:
        names = " and ".join(missing)
        verb, noun = ("is", "package") if len(missing) == 1 else ("are", "packages")
        raise ValueError(f"{what} the {noun} {names}, which {verb} not installed; run `{install_line(*missing)}`.")


def installed(package: str) -> bool:
    """Whether a package can be imported; nothing is imported."""
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):  # ValueError: a module put into sys.modules by hand
        return False


def install_regla() -> str:
    """A command that installs this package elsewhere: from the git address that it was installed from, or a checkout.

    The package is on no index. The address is known where pip installed it from one (PEP 610).
    """
    address = _git_address()
    return f'pip install "regla @ {address}"' if address else "pip install .  # in a checkout of regla"


def _git_address() -> str | None:
    try:
        origin = importlib.metadata.distribution("regla").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return None
    found = json.loads(origin) if origin else {}
    version, url = found.get("vcs_info", {}), found.get("url", "")
    if not url.startswith(("https://", "ssh://")) or "commit_id" not in version:
        return None
    return f"{version['vcs']}+{url}@{version['commit_id']}"
