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

#: Through the interpreter a case takes seconds. Of these tests the cases for which a function here is true show what
#: another case shows: the same path of a kernel on another axis, or a milder input. There they are slow ones.
COVERED = {
    "test_lengths_gates_and_outliers": lambda T, axis, scenario, **_: (
        (T <= 2 and (axis != "both" or scenario == "plain"))
        or (T > 2 and scenario == "plain" and (T > 37 or axis == "both"))
        or (T > 2 and axis != "both" and (scenario != "extreme" or T > 37 or axis == "value"))
    ),
    "test_shapes_with_initial_state": lambda shape, axis: (
        AXES[sum(shape) % 3] != axis or shape in ((3, 3, 48, 80), (9, 9, 16, 8), (12, 12, 8, 16))
    ),
    "test_no_bit_of_the_past_changes": lambda kind, axis, **_: kind in ("noise", "open") or axis != "both",
    "test_no_bit_of_the_past_changes_in_bfloat16": lambda kind, axis: (
        kind in ("noise", "open") or (kind == "outlier") != (axis == "both")
    ),
    "test_fast_gates_in_bfloat16": lambda most, outlier, axis: (
        (most, outlier, axis) not in [(30.0, None, "key"), (10.0, 100.0, "both")]
    ),
    "test_tiny_values_in_bfloat16": lambda size, axis: size == 1e-22 and axis != "key",
    "test_groups_and_masks_in_bfloat16": lambda most, axis: most == 4.0 and axis != "key",
    "test_bfloat16": lambda axis, scenario="none", depth=None, engine="triton", **_: (
        engine == "triton"
        and (axis != "both" if scenario == "none" and depth is None else axis != "key" and scenario != "extreme")
    ),
    "test_bfloat16_behind_a_norm": lambda axis: axis == "value",
    "test_equal_to_the_definition": lambda scenario, axis, **_: (
        scenario == "plain" or (scenario == "outliers") != (axis == "key")
    ),
    "test_what_is_left_behind_an_outlier": lambda at, axis: at == 125 and axis != "key",
    "test_a_slowly_forgotten_outlier": lambda axis: axis == "value",
    "test_wide_heads_in_slices": lambda axis, **_: axis == "value",
    "test_packing_equals_separate_sequences": lambda axis: axis == "value",
    "test_masks_with_nothing_in_the_padding": lambda backend, K, axis: (
        backend == "triton" and (K == 160 or axis == "value")
    ),
    "test_inside_is_before": lambda axis, backend: backend == "triton" and axis == "value",
    "test_masks_anywhere": lambda axis: axis != "key",
    "test_any_strides": lambda axis: axis != "key",
    "test_in_groups": lambda axis: axis != "key",
    "test_sequences_in_segments": lambda axis: axis != "key",
    "test_heads_and_groups": lambda shape, scenario: scenario == "plain" or (scenario == "outliers") != (shape[0] == 1),
    "test_large_gradients_of_what_is_forgotten": lambda axis, dtype, heads, **_: (
        heads == 1 if axis == "both" else heads == 2 or (dtype == torch.bfloat16) == (axis == "value")
    ),
    "test_infinite_gate_logits": lambda backend, refine, axis, T: (
        backend == "triton"
        and (axis == "value" or refine == "ordinary" or (T == 1 and (axis, refine) != ("both", "inf")))
    ),
    "test_gated_linear_attention": lambda decays, backend="triton", **_: (
        backend == "triton" and decays in ("value", "scalar value", "scalar key")
    ),
}
AXES = ("value", "key", "both")
OF_KERNELS = {
    *("test_triton.py", "test_segments.py", "test_qk_norm.py", "test_wide_heads.py"),
    *("test_forgetting.py", "test_edges.py", "test_decode.py"),
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    for item in items:
        if (
            item.path.name in OF_KERNELS
            and item.originalname in COVERED
            and hasattr(item, "callspec")
            and COVERED[item.originalname](**item.callspec.params)
        ):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(params=["recurrent", "chunked", "native", "triton"])
def backend(request):
    """Of tests that do not name them: every backend, where it runs."""
    x = torch.ones(1, 1, 1, 16)
    why_not = {"native": dispatch.why_not_native, "triton": dispatch.why_not_triton}.get(request.param)
    reason = why_not and why_not(x, x)
    if reason is not None:
        pytest.skip(reason)
    return request.param


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
