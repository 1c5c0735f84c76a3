"""The kernels compile for a GPU, also where there is none: the interpreter accepts what the compiler does not."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

HOPPER = 90
#: By minima, too, which way to compute a chunk, or hold what is no number (`tiles.finite`).
DECIDE = ("forward_kernel", "backward_kernel", "delta_prepare_kernel", "delta_gradient_kernel")
#: Hold all they need in registers, of which a thread has enough. A few predicates may spill.
IN_REGISTERS = ("short_convolution_kernel", "short_convolution_gradient_kernel", "short_convolution_step_kernel")


class NoGPU:
    """What Triton's launcher asks of a driver before it launches."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", HOPPER, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def compile_all(call, *arguments):
    """What `call` launches, with every launch stopped after its compilation."""
    import triton
    from triton.runtime.jit import JITFunction

    triton.runtime.driver.set_active(NoGPU())
    run = JITFunction.run

    def only_compile(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        hiding = re.findall(r"\b(?:max|min)(?:\.ftz)?\.f32\b", kernel.asm["ptx"])  # others have .NaN
        assert self.__name__ in DECIDE or not hiding, f"{self.__name__} drops a NaN in {len(hiding)} places"
        assert self.__name__ not in IN_REGISTERS or stack_bytes(kernel) <= 16, f"{self.__name__} spills registers"
        print(self.__name__)

    JITFunction.run = only_compile
    call(*arguments)


def stack_bytes(kernel):
    """Bytes a thread keeps in memory for want of registers."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(kernel.asm["cubin"])
        told = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    (found,) = re.findall(r"STACK:(\d+)", told)
    return int(found)


def launch_all_twice():
    """Forward, backward and the next token, by Triton's own launches and by direct ones, which must give a compiled
    kernel's launcher the same."""
    import triton
    from triton.compiler import CompiledKernel
    from triton.compiler.compiler import LazyDict
    from triton.runtime.jit import JITFunction

    triton.runtime.driver.set_active(NoGPU())
    launched, through_triton = [], []

    def no_handles(self):
        self.module, self.function = "module", self.metadata.name
        self._run = lambda *arguments: launched.append(arguments)

    run = JITFunction.run

    def counted(self, *args, **options):
        through_triton.append(self.__name__)
        return run(self, *args, **options)

    CompiledKernel._init_handles, JITFunction.run = no_handles, counted
    setting = "key", torch.bfloat16, False, 64, 1, 16, 16  # small heads compile fast
    call_all(*setting)
    call_all(*setting)
    assert through_triton == ["forward_kernel", "backward_kernel", *NORM, "decode_kernel"], through_triton
    assert len(launched) == 12

    def shown(x):
        if isinstance(x, LazyDict):  # for hooks
            return x.get()
        return (x.shape, x.dtype, x.stride()) if torch.is_tensor(x) else x

    for first, second in zip(launched[:6], launched[6:], strict=True):
        assert [shown(x) for x in first] == [shown(x) for x in second]
        assert any(torch.is_tensor(x) for x in first)


def call_all(axis, dtype, packed, T, HQ, K, V):
    """Forward and backward of the recurrence and of the norm of what it gives, and the next token."""
    from regla.ops.fused import Inputs, QKNorm
    from regla.ops.triton import operation, output_norm

    q = torch.zeros(1, T, HQ, K, dtype=dtype)
    k, gk, rk = (torch.zeros(1, T, 1, K, dtype=dtype) for _ in range(3))
    v, gv, rv = (torch.zeros(1, T, 1, V, dtype=dtype) for _ in range(3))
    gates = (*((None, None) if axis == "value" else (gk, rk)), *((None, None) if axis == "key" else (gv, rv)))
    cu_seqlens = torch.tensor([0, T]) if packed else None
    inputs = Inputs(q, k, v, *gates, None, cu_seqlens, None, None)
    o, final, _last, m, lower, states = operation.forward(inputs, 0.125, True, True, True)
    grads = [None if x is None else torch.empty_like(x) for x in inputs[:7]]
    operation.backward(o, None, inputs, m, lower, states, 0.125, True, True, grads, torch.empty_like(final))
    norm = QKNorm(torch.ones(K), torch.ones(K), 1e-6)
    operation.norm_gradient(q, k, norm, None, grads[0], grads[1], torch.empty(2, K))
    weight, gate, eps = torch.ones(HQ, V), torch.zeros(1, T, HQ * V, dtype=dtype), 1e-6
    bias = weight if axis == "key" else None
    activation = "silu" if axis == "key" else "sigmoid"
    gate = None if axis == "both" else gate
    output_norm.forward(o, weight, bias, gate, activation, eps, o)
    output_norm.backward(o, o, weight, bias, gate, activation, eps, o, o, weight, weight)
    if not packed:
        one = Inputs(*(None if x is None else x[:, :1] for x in inputs[:7]), None, None, None, None)
        operation.step(one, final, torch.zeros(1, 1), None, None, 0.125, True, 1e-6, torch.empty_like(o[:, :1]))


def call_delta(feature_map, dtype, HQ, K):
    """Forward and backward of the delta rule from logits, with a mask and a norm of q and k, and the next token."""
    from regla.ops.call import Call, Forms, Gates, HeadNorm, QKNorm
    from regla.ops.triton.delta_operation import triton_delta_step_, triton_gated_delta_rule

    q = torch.zeros(1, 64, HQ, K, dtype=dtype, requires_grad=True)
    k, v, g, r = (torch.zeros(1, 64, 1, K, dtype=dtype) for _ in range(4))
    norm = QKNorm(torch.ones(K), torch.ones(K), 1e-6)
    call = Call(q, k, v, Gates(g, r, write=torch.zeros(1, 64, 1)), 1.0, mask=torch.ones(1, 64) > 0, qk_norm=norm)
    forms = Forms(feature_map, 1.0)
    o, state = triton_gated_delta_rule(call, forms)
    (o.sum() + state.sum()).backward()
    one = Gates(g[:, :1], r[:, :1], write=torch.zeros(1, 1, 1))
    call = Call(q[:, :1].detach(), k[:, :1], v[:, :1], one, 1.0, qk_norm=norm)
    triton_delta_step_(call, forms, state.detach(), HeadNorm(torch.ones(HQ, K), None, 1e-6))


def call_convolution(dtype, C, taps, packed):
    """Forward and backward of the short convolution, with a state unless packed, and the next token."""
    from regla.ops.triton import short_convolution

    x, weight, after = torch.zeros(2, 64, C, dtype=dtype), torch.ones(taps, C), torch.zeros(2, taps - 1, C, dtype=dtype)
    state, ends = (None, torch.tensor([0, 64])) if packed else (after, None)
    short_convolution.forward(x, weight, state, ends, "silu", x, after)
    short_convolution.backward(x, None if packed else after, x, weight, state, ends, "silu", x, weight, after)
    short_convolution.step(x[:, :1], weight, after, after, torch.ones(2, 1) > 0, "sigmoid", x[:, :1])


LONG = 8 * 16 * 32  # in segments
NORM = ["norm_gradient_kernel", "output_norm_kernel", "output_norm_gradient_kernel"]
EVERY = ["state_kernel", "chain_kernel", "forward_kernel", "gradient_kernel", "chain_kernel", "backward_kernel"]
HEAD = (1, 64, 64)  # HQ, K, V
CASES = [
    ("key", "bfloat16", "whole", LONG, (1, 32, 32)),
    pytest.param("key", "bfloat16", "whole", LONG, HEAD, marks=pytest.mark.slow),
    pytest.param("key", "bfloat16", "whole", 64, (1, 128, 128), marks=pytest.mark.slow),  # states in slices
    pytest.param("key", "bfloat16", "whole", 64, (2, 128, 72), marks=pytest.mark.slow),
    pytest.param("value", "bfloat16", "whole", LONG, HEAD, marks=pytest.mark.slow),
    pytest.param("both", "bfloat16", "whole", LONG, HEAD, marks=pytest.mark.slow),
    pytest.param("value", "bfloat16", "packed", 64, HEAD, marks=pytest.mark.slow),
    pytest.param("both", "float32", "whole", 64, HEAD, marks=pytest.mark.slow),
]
CONVOLUTION_CASES = [
    ("bfloat16", 2304, 4, 1),
    ("float32", 2304, 4, 0),
    ("float32", 576, 8, 1),
    ("bfloat16", 45, 3, 0),
]
DELTA_CASES = [
    *(("unit_safe_exp", "bfloat16", *case) for case in ((1, 64), (1, 128), (2, 72))),
    ("unit_safe_exp", "float32", 1, 128),
    *(("unit_silu", *case) for case in (("bfloat16", 1, 64), ("bfloat16", 1, 128))),
]


@pytest.fixture
def kernels(tmp_path_factory):
    """A folder for compiled kernels, which the workers of this run of the tests share."""
    own = tmp_path_factory.getbasetemp()
    return (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "kernels"


def in_a_process_of_its_own(folder, *arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, __file__, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**environment, "TRITON_CACHE_DIR": str(folder)},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


@pytest.mark.parametrize(("axis", "dtype", "layout", "T", "head"), CASES)
def test_kernels_compile(axis, dtype, layout, T, head, kernels):
    expected = EVERY if T == LONG else ["forward_kernel", "backward_kernel"]
    found = in_a_process_of_its_own(kernels, axis, dtype, layout, T, *head)
    assert found == expected + NORM + ["decode_kernel"] * (layout == "whole")


@pytest.mark.parametrize(
    ("feature_map", "dtype", "HQ", "K"),
    [("unit_safe_exp", "bfloat16", 1, 32), *(pytest.param(*case, marks=pytest.mark.slow) for case in DELTA_CASES)],
)
def test_kernels_of_the_delta_rule_compile(feature_map, dtype, HQ, K, kernels):
    prepare, gradient = ["delta_prepare_kernel"] * 2, ["delta_gradient_kernel"] * 2
    forward = [*prepare, "delta_state_kernel", "delta_output_kernel"]
    backward = [*prepare, "delta_state_gradient_kernel", *gradient, "norm_gradient_kernel"]
    assert in_a_process_of_its_own(kernels, "delta", feature_map, dtype, HQ, K) == [
        *forward,
        *backward,
        "delta_decode_kernel",
    ]


@pytest.mark.parametrize(
    ("dtype", "C", "taps", "packed"),
    [("bfloat16", 2304, 4, 0), *(pytest.param(*case, marks=pytest.mark.slow) for case in CONVOLUTION_CASES)],
)
def test_kernels_of_the_short_convolution_compile_without_spills(dtype, C, taps, packed, kernels):
    assert in_a_process_of_its_own(kernels, "convolution", dtype, C, taps, packed) == list(IN_REGISTERS)


@pytest.mark.slow
def test_direct_launches_are_those_of_triton(kernels):
    assert in_a_process_of_its_own(kernels, "launch") == []


if __name__ == "__main__":
    if sys.argv[1] == "launch":
        launch_all_twice()
    elif sys.argv[1] == "delta":
        feature_map, dtype, *sizes = sys.argv[2:]
        compile_all(call_delta, feature_map, getattr(torch, dtype), *map(int, sizes))
    elif sys.argv[1] == "convolution":
        dtype, *sizes = sys.argv[2:]
        compile_all(call_convolution, getattr(torch, dtype), *map(int, sizes))
    else:
        axis, dtype, layout, *sizes = sys.argv[1:]
        compile_all(call_all, axis, getattr(torch, dtype), layout == "packed", *map(int, sizes))
