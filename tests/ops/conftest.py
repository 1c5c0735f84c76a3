"""Where the kernels run at all, and what a GPU does that Triton's interpreter by itself does not.

Bfloat16: the interpreter keeps it as unsigned integers, which it multiplies as such, and cuts off what it should round.
NaN: of NaN and a number, a GPU's maximum and minimum are the number, unless told otherwise; the interpreter's are NaN.
"""

import os
from functools import partialmethod

import numpy as np
import pytest
import torch

from regla.ops import dispatch


@pytest.fixture
def operation():
    """The launches of the kernels, where Triton runs them: on a GPU, or through its interpreter."""
    x = torch.ones(1, 1, 1, 16)
    reason = dispatch.why_not_triton(x, x)
    if reason is not None:
        pytest.skip(reason)
    from regla.ops.triton import operation

    return operation


@pytest.fixture(autouse=True)
def _interpret_as_a_gpu_computes(monkeypatch):
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    language = interpreter.tl
    cast = interpreter.InterpreterBuilder.cast_impl

    def widened(x):
        return (x.data.astype(np.uint32) << 16).view(np.float32) if x.dtype.scalar == language.bfloat16 else x.data

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        product = np.matmul(widened(a), widened(b), dtype=d.data.dtype)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    def cast_impl(self, src, dst_type):
        kinds = src.dtype.scalar, dst_type.scalar
        if kinds == (language.bfloat16, language.float32):
            return interpreter.TensorHandle(widened(src), language.float32)
        if kinds == (language.float32, language.bfloat16):
            rounded = torch.from_numpy(np.array(src.data, dtype=np.float32)).to(torch.bfloat16)
            return interpreter.TensorHandle(rounded.view(torch.uint16).numpy(), language.bfloat16)
        return cast(self, src, dst_type)

    for name, function in (("create_maxnumf", np.fmax), ("create_minnumf", np.fmin)):
        method = partialmethod(interpreter.InterpreterBuilder.binary_op, op=function)
        monkeypatch.setattr(interpreter.InterpreterBuilder, name, method)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "cast_impl", cast_impl)
    monkeypatch.setattr(dispatch, "_INTERPRETED", (torch.float32, torch.bfloat16))
