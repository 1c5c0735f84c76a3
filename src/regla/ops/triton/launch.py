"""Launches of the kernels. Triton looks at every argument, option and global of a kernel before each launch to find
what it has compiled, which takes as long as a short kernel runs: here a kernel that is known to be the right one is
launched directly.

That uses what Triton does not document: that `kernel[grid](...)` returns the compiled kernel, and that this one takes
the tensors, numbers and constexprs in their order. With a version of Triton for which no test says so (`TESTED`), every
launch is Triton's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

TESTED = ("3.6",)  # versions of Triton whose compiled kernels are launched directly, see tests/ops/test_compilation.py


def _is_tested(version: str) -> bool:
    return ".".join(version.split(".")[:2]) in TESTED


_direct = _is_tested(triton.__version__)
_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    tensors: Sequence[Tensor | None],
    numbers: Sequence[int | float],
    **constants: Any,
) -> None:
    """`kernel[grid](*tensors, *numbers, **constants)`, where `constants` are the constexprs and options, on the device
    of the tensors."""
    one = next(x for x in tensors if x is not None)
    if not _direct:
        with torch.cuda.device_of(one):
            kernel[grid](*tensors, *numbers, **constants)
        return
    key = (
        kernel,
        one.device,
        *[None if x is None else (x.dtype, x.data_ptr() % 16 == 0) for x in tensors],
        *map(_specialisation, numbers),
        *constants.items(),
    )
    known = _compiled.get(key)
    with torch.cuda.device_of(one):
        if known is not None:
            compiled, constexprs = known
            compiled[grid](*tensors, *numbers, *constexprs)
            return
        compiled = kernel[grid](*tensors, *numbers, **constants)
    if compiled is not None:  # None: of Triton's interpreter
        names = kernel.arg_names[len(tensors) + len(numbers) :]
        _compiled[key] = compiled, tuple(constants[name] for name in names)


@lru_cache(maxsize=4096, typed=True)
def _specialisation(x: int | float) -> Any:
    """What of a number Triton may compile a kernel for: its type (of integers 32 bits or 64), 1, multiples of 16."""
    return (type(x), x >> 31, x == 1, x % 16 == 0) if isinstance(x, int) else type(x)


# Triton's own functions of these are meant for kernels, and slow outside.
def power_of_2(n: int) -> int:
    """The least that is not below n."""
    return 1 << (n - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def token_step(x: Tensor | None) -> int:
    """Of x [B, T, ...] the distance from token to token; of one token a sequence, from sequence to sequence."""
    return 0 if x is None else x.stride(1 if x.shape[1] > 1 else 0)
