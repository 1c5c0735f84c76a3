"""Compiles `kernels.c` and `delta.c` with the machine's C compiler, once, and loads it.

The compiled file lies in the user's cache folder under a name that says what went into it: the source, the options and
what the compiler knows of the processor. One that is there is loaded without a question, in milliseconds.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

_SOURCES = ("kernels.c", "delta.c")
_HEADERS = ("token.h", "rows.h", "threads.h", "vector.h")
#: Nothing that changes what a number is: no -ffast-math. The two only say that nobody looks at errno and traps.
_OPTIONS = ("-std=gnu11", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared")


@torch.compiler.assume_constant_result
def why_missing() -> str | None:
    """Why there is no library; None if there is. torch.compile asks once and does not look inside."""
    library = load()
    return library if isinstance(library, str) else None


@functools.lru_cache(maxsize=1)
def load() -> ctypes.CDLL | str:
    """The library, or why there is none. Compiles it where no earlier process has: some seconds."""
    try:
        return _load()
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        return f"the C kernels did not compile here: {said[-1] if said else type(error).__name__}"


def _load() -> ctypes.CDLL | str:
    if sys.platform not in ("linux", "darwin"):
        return f"the C kernels are for Linux and macOS, and this is {sys.platform}"
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    if compiler is None:
        return "there is no C compiler (cc, gcc or clang) to make the C kernels with: install one, or set CC"
    command = [*compiler.split(), *_options_for(compiler)]
    here = Path(__file__).parent
    digest = hashlib.sha256(" ".join(command).encode())
    digest.update(_run([*command, "-dM", "-E", "-x", "c", os.devnull]).encode())  # the processor, and the compiler
    for name in _SOURCES + _HEADERS:
        digest.update((here / name).read_bytes())
    path = _cache() / f"kernels-{digest.hexdigest()[:16]}.so"
    if not path.exists():
        _compile(command, path)
    try:
        return ctypes.CDLL(str(path))
    except OSError:  # a crash or a full disk damaged it, or from that folder nothing may be run
        _compile(command, path)
        return ctypes.CDLL(shutil.copy(path, _temporary_folder().name))


def _compile(command: list[str], path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder, "kernels.so")
        sources = [str(Path(__file__).parent / name) for name in _SOURCES]
        _run([*command, *sources, "-o", str(made), "-lm", "-lpthread"])
        made.replace(path)  # whole or not at all, whoever else is at it


def _options_for(compiler: str) -> list[str]:
    """All that this processor has; without that where a compiler does not know the option."""
    for native in (["-march=native", "-mprefer-vector-width=512"], ["-march=native"], ["-mcpu=native"]):
        try:
            _run([*compiler.split(), *native, "-E", "-x", "c", os.devnull])
        except subprocess.CalledProcessError:
            continue
        return [*_OPTIONS, *native]
    return list(_OPTIONS)


def _run(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def _cache() -> Path:
    """A folder to write to: the user's cache, or where that is closed one for this process."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "regla")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, RuntimeError):  # the latter from a user without a home
        return Path(_temporary_folder().name)


@functools.lru_cache(maxsize=1)
def _temporary_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="regla-")  # removed at the process's end
