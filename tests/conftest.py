"""What every test starts from: a fixed seed, poisoned memory, no network."""

import os
import random
from collections.abc import Iterator
from contextlib import nullcontext

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
    parser.addoption("--device", default="cpu", help="where tests of the operations make their tensors: cpu or cuda")


@pytest.fixture(autouse=True)
def _device(request: pytest.FixtureRequest) -> Iterator[None]:
    device = request.config.getoption("--device")
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


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and torch sees none")
