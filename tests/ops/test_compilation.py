"""The kernels compile for a GPU, also where there is none: the interpreter accepts what the compiler does not."""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

HOPPER = 90


class NoGPU:
    """What Triton's launcher asks of a driver before it launches."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", HOPPER, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def compile_all(axis, dtype, packed, T):
    """Forward, backward and the next token, with every launch stopped after its compilation."""
    import triton
    from triton.runtime.jit import JITFunction

    from regla.ops.fused import Inputs
    from regla.ops.triton import operation

    triton.runtime.driver.set_active(NoGPU())
    run = JITFunction.run

    def only_compile(self, *args, grid, warmup, **options):
        run(self, *args, grid=grid, warmup=True, **options)
        print(self.__name__)

    JITFunction.run = only_compile
    q, k, v, gk, rk, gv, rv = (torch.zeros(1, T, 1, 64, dtype=dtype) for _ in range(7))
    gates = (*((None, None) if axis == "value" else (gk, rk)), *((None, None) if axis == "key" else (gv, rv)))
    cu_seqlens = torch.tensor([0, T]) if packed else None
    inputs = Inputs(q, k, v, *gates, None, cu_seqlens, None, None)
    o, final, _last, m, lower, states = operation.forward(inputs, 0.125, True, True, True)
    grads = [None if x is None else torch.empty_like(x) for x in inputs[:7]]
    operation.backward(o, None, inputs, m, lower, states, 0.125, True, True, grads, torch.empty_like(final))
    if not packed:
        one = Inputs(*(None if x is None else x[:, :1] for x in inputs[:7]), None, None, None, None)
        operation.step(one, final, torch.zeros(1, 1), None, None, 0.125, True, 1e-6, torch.empty_like(v[:, :1]))


LONG = 8 * 16 * 32  # in segments
EVERY = ["state_kernel", "chain_kernel", "forward_kernel", "gradient_kernel", "chain_kernel", "backward_kernel"]
CASES = [
    ("key", "bfloat16", "whole", LONG),
    pytest.param("value", "bfloat16", "whole", LONG, marks=pytest.mark.slow),
    pytest.param("both", "bfloat16", "whole", LONG, marks=pytest.mark.slow),
    pytest.param("value", "bfloat16", "packed", 64, marks=pytest.mark.slow),
    pytest.param("both", "float32", "whole", 64, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("axis", "dtype", "layout", "T"), CASES)
def test_kernels_compile(axis, dtype, layout, T, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, __file__, axis, dtype, layout, str(T)],
        capture_output=True,
        text=True,
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
    )
    assert result.returncode == 0, result.stderr
    expected = EVERY if T == LONG else ["forward_kernel", "backward_kernel"]
    assert result.stdout.split() == expected + ["decode_kernel"] * (layout == "whole")


if __name__ == "__main__":
    compile_all(sys.argv[1], getattr(torch, sys.argv[2]), sys.argv[3] == "packed", int(sys.argv[4]))
