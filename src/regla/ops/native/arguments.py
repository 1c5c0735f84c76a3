"""What a call hands to the C kernels: a structure of sizes and of addresses of tensors."""

from __future__ import annotations

import ctypes
import itertools
from typing import Any

import torch
from torch import Tensor

from regla.ops.checks import check_bounds
from regla.ops.native.build import load

#: Tokens from one state that is kept for the backward pass to the next.
CHUNK = 64

WIDEST = 16  # vectors of the kernels have at most that many numbers, and rows are padded to whole ones

INT, FLOAT, POINTER = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


class Rows(ctypes.Structure):
    """rows.h: Rows."""

    _fields_ = (("at", POINTER), ("step", INT))


class Arguments:
    """A problem, and the tensors that it points to. The sizes and the places of the sequences are filled in here.

    Args:
        problem: a structure whose fields begin with sequences, heads, queries, K, V, chunk and threads, and that has
            the fields bounds and first_chunk.
        q, k, v: [B, T, HQ or H, K or V].
        cu_seqlens: [N + 1] or None.
    """

    def __init__(self, problem: Any, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None):
        B, T, H, K = k.shape
        self.problem = problem
        self.held: list[Any] = []
        problem.heads, problem.queries, problem.K, problem.V = H, q.shape[2] // H, K, v.shape[-1]
        problem.chunk, problem.threads = CHUNK, torch.get_num_threads()
        bounds = [n * T for n in range(B + 1)] if cu_seqlens is None else cu_seqlens.tolist()
        if cu_seqlens is not None:
            check_bounds(bounds, T)  # even unasked: the kernels would write anywhere
        chunks = [-((begin - end) // CHUNK) for begin, end in itertools.pairwise(bounds)]
        problem.sequences = len(chunks)
        for name, numbers in (("bounds", bounds), ("first_chunk", [0, *itertools.accumulate(chunks)])):
            array = (INT * len(numbers))(*numbers)
            self.held.append(array)
            setattr(problem, name, ctypes.addressof(array))

    def points(self, **tensors: Tensor | None) -> None:
        """Fields that are the address of a tensor's first number."""
        for name, x in tensors.items():
            if x is not None:
                x = x.contiguous()
                self.held.append(x)
                setattr(self.problem, name, x.data_ptr())

    def rows(self, name: str, x: Tensor | None) -> None:
        """A field that is a tensor [B, T, heads, channels] as `regla.ops.fused.rows` leaves it."""
        if x is not None:
            self.held.append(x)
            setattr(self.problem, name, Rows(x.data_ptr(), x.stride(1 if x.shape[1] > 1 else 0)))

    def run(self, function: str) -> None:
        library = load()
        assert isinstance(library, ctypes.CDLL), library
        if library[function](ctypes.byref(self.problem)):
            raise MemoryError("no memory for the buffers of the C kernels: close other programs, or use fewer threads")


def chunks_of(k: Tensor, cu_seqlens: Tensor | None) -> int:
    """How many states a call keeps for each head, one before every chunk; with packing a bound."""
    B, T = k.shape[:2]
    return B * ((T + CHUNK - 1) // CHUNK) if cu_seqlens is None else T // CHUNK + cu_seqlens.numel() - 1


def padded(channels: int) -> int:
    """Numbers that a row of `channels` of a kept state may take."""
    return (channels + WIDEST - 1) // WIDEST * WIDEST


def in_float32(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().float()
