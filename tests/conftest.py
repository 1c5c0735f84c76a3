"""What every test starts from: a fixed seed, poisoned memory, no network."""

import importlib.util
import os
import random
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

# Read when huggingface_hub, tokenizers and cuBLAS (for its deterministic mode) are loaded, so they are set first.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():  # read when a kernel is defined
    os.environ.setdefault("TRITON_INTERPRET", "1")

SEED = 0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device", default="cpu", help="where tests of operations and layers make their tensors: cpu or cuda"
    )


@pytest.fixture(autouse=True)
def _device(request: pytest.FixtureRequest) -> Iterator[None]:
    """The default device of tests of operations and layers. Others choose their devices themselves: in a device context
    a CPU run beside a GPU run would not be one, and transformers and torch.compile do not see through it."""
    device = request.config.getoption("--device") if request.path.parent.name in ("ops", "layers") else "cpu"
    with nullcontext() if device == "cpu" else torch.device(device):  # the context itself disturbs torch.compile
        yield


@pytest.fixture(autouse=True)
def _seed() -> None:
    """A test draws the same numbers alone, in any order and on any worker."""
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)


@pytest.fixture(autouse=True)
def _poison_uninitialised_memory() -> Iterator[None]:
    """`torch.empty` and its relatives return NaN (integers: the largest value).

    Fresh memory is often zero by chance, which hides the read of an element that nothing wrote. PyTorch fills it only
    in deterministic mode; operations without a deterministic form warn there and run on.
    """
    was_on, was_warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    was_filling = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = was_filling
    torch.use_deterministic_algorithms(was_on, warn_only=was_warn_only)


@pytest.fixture(autouse=True)
def _float32_means_float32() -> Iterator[None]:
    """A GPU multiplies and convolves float32 in float32, and a test leaves that as it was."""
    from regla.runtime.device import float32_products  # not before the environment is set

    with float32_products():
        yield
        assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and torch sees none")


@pytest.fixture(autouse=True, scope="session")
def _interpret_quickly() -> Iterator[None]:
    """Triton's interpreter in a third of its time.

    It prepares its language again for every function that a kernel calls: here once for a kernel. And CPython takes
    memory for its frames from the system in pieces of 16 KiB, and gives a piece back as soon as its last frame is left:
    where a loop of the interpreter happens to call across the end of one, every call costs two system calls. A frame
    that asks for half a megabyte gets a piece with room for all that are called from it.
    """
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    prepare, run = interpreter._patch_lang, interpreter.GridExecutor.__call__

    def prepare_once(function: Any) -> Any:
        languages = [module for module in (tl, tl.core) if any(x is module for x in function.__globals__.values())]
        if any(tl.core.is_builtin(language.load) for language in languages):
            return prepare(function)
        return interpreter._LangPatchScope()

    def run_with_room(*arguments: Any, **options: Any) -> Any:
        return run(*arguments, **options)

    run_with_room.__code__ = run_with_room.__code__.replace(co_stacksize=2**16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", prepare_once)
        patch.setattr(interpreter.GridExecutor, "__call__", run_with_room)
        yield
