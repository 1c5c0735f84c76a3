"""A kernel that is launched directly is the one that Triton would have taken."""

import itertools

import pytest
import torch

pytest.importorskip("triton")

import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from regla.ops.triton import launch as module
from regla.ops.triton.launch import launch

GRID = (2, 3, 1)
CONSTANTS = {"num_warps": 4, "FLAG": True, "C": 32}


def signature(x_ptr, y_ptr, eps, n, length, C: tl.constexpr, FLAG: tl.constexpr):
    pass


class Kernel:
    """What Triton makes of the arguments of a launch, without a compilation."""

    def __init__(self):
        function = JITFunction(signature, do_not_specialize=["length"])
        backend = make_backend(GPUTarget("cuda", 90, 32))
        self.bind = create_function_from_signature(function.signature, function.params, backend)
        self.arg_names = function.arg_names
        self.compiled, self.launched = [], []

    def __getitem__(self, grid):
        def run(*arguments, **constants):
            _, specialisation, options = self.bind(*arguments, **constants)
            self.compiled.append((specialisation, options))
            return Compiled(self, specialisation)

        return run


class Compiled:
    def __init__(self, kernel, specialisation):
        self.kernel, self.specialisation = kernel, specialisation

    def __getitem__(self, grid):
        def run(*arguments):
            _, specialisation, _ = self.kernel.bind(*arguments)
            assert specialisation == self.specialisation
            self.kernel.launched.append((grid, arguments))

        return run


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(module, "_compiled", {})
    monkeypatch.setattr(module, "_direct", True)
    return Kernel()


def test_what_is_compiled_is_launched_directly(kernel):
    x, y = torch.zeros(64), torch.zeros(64)
    launch(kernel, GRID, (x, None), (0.5, 32, 7), **CONSTANTS)
    assert (len(kernel.compiled), kernel.launched) == (1, [])
    launch(kernel, GRID, (y[4:], None), (0.25, 48, 9), **CONSTANTS)
    assert len(kernel.compiled) == 1
    ((grid, (first, *others)),) = kernel.launched
    assert grid == GRID and first.data_ptr() == y[4:].data_ptr()
    assert others == [None, 0.25, 48, 9, 32, True]


TENSORS = {"x": torch.zeros(64), "unaligned": torch.zeros(64)[1:], "bfloat16": torch.zeros(64, dtype=torch.bfloat16)}
NUMBERS = (0, 1, 2, 16, 17, -1, -16, 2**31 - 1, 2**31, 2**31 + 1, 2**40 + 2, True, 1.0)


def launch_with(kernel, x=TENSORS["x"], y=None, n=16, **constants):
    launch(kernel, GRID, (x, y), (0.5, n, 7), **{**CONSTANTS, **constants})


@pytest.mark.parametrize(
    "changed",
    [
        {"y": TENSORS["x"]},
        {"x": TENSORS["unaligned"]},
        {"x": TENSORS["bfloat16"]},
        {"x": torch.zeros(64, device="meta")},
        {"n": 1},
        {"n": 17},
        {"n": 2**31},
        {"n": 16.0},
        {"C": 16},
        {"FLAG": False},
        {"num_warps": 8},
        {"maxnreg": 128},
    ],
    ids=lambda changed: "-".join(f"{name}={x.dtype if torch.is_tensor(x) else x}" for name, x in changed.items()),
)
def test_what_is_compiled_anew(changed, kernel):
    launch_with(kernel)
    launch_with(kernel, **changed)
    assert (len(kernel.compiled), kernel.launched) == (2, [])


def test_never_another_than_that_of_triton(kernel):
    """`Compiled` looks at every launch."""
    tensors = [(x, y) for x in TENSORS.values() for y in (None, *TENSORS.values())]
    for _ in range(2):
        for pair, n, length, C in itertools.product(tensors, NUMBERS, NUMBERS[:-2], (16, 32)):
            launch(kernel, GRID, pair, (0.5, n, length), FLAG=True, C=C)
    assert len(kernel.launched) > len(kernel.compiled)


def test_an_interpreted_kernel(kernel):
    calls = []

    class Interpreted:
        def __getitem__(self, grid):
            return lambda *arguments, **constants: calls.append((grid, arguments, constants))

    x, interpreted = torch.zeros(16), Interpreted()
    for _ in range(2):
        launch(interpreted, GRID, (x,), (1,), C=32)
    assert calls == [(GRID, (x, 1), {"C": 32})] * 2


def test_another_version_of_triton_launches_by_itself(kernel, monkeypatch):
    """What is not documented is used where tests have seen it work."""
    assert [module._is_tested(version) for version in ("3.6.0", "3.6.1+git", "3.5.1", "3.60.0", "4.0")] == [
        True, True, False, False, False,
    ]  # fmt: skip
    monkeypatch.setattr(module, "_direct", False)
    monkeypatch.setattr(Compiled, "__getitem__", None)
    for _ in range(2):
        launch_with(kernel)
    assert (len(kernel.compiled), kernel.launched, module._compiled) == (2, [], {})
