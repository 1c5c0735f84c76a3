"""The common ground of the tests does what it promises."""

import random

import numpy as np
import pytest
import torch

from .ranks import in_processes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "allocate",
    [
        lambda dtype: torch.empty(3, 5, dtype=dtype),
        lambda dtype: torch.empty_like(torch.zeros(3, 5, dtype=dtype)),
        lambda dtype: torch.zeros(1, dtype=dtype).new_empty(3, 5),
        lambda dtype: torch.empty_strided((3, 5), (1, 3), dtype=dtype),
        lambda dtype: torch.nn.Linear(5, 3, bias=False, device="meta", dtype=dtype).to_empty(device="cpu").weight,
    ],
    ids=["empty", "empty_like", "new_empty", "empty_strided", "to_empty"],
)
def test_uninitialised_memory_is_nan(allocate, dtype):
    assert allocate(dtype).isnan().all()


def test_a_forgotten_write_reaches_the_result():
    def running_sum(x, steps):
        out = torch.empty_like(x)
        for t in range(steps):
            out[t] = x[: t + 1].sum()
        return out

    x = torch.ones(6)
    assert running_sum(x, 6).isfinite().all()
    assert not running_sum(x, 5).isfinite().all()


@pytest.mark.parametrize("_", ["first", "second"])
def test_every_test_starts_from_the_same_seed(_):
    expected = torch.rand((), device="cpu", generator=torch.Generator("cpu").manual_seed(0))
    assert torch.rand((), device="cpu") == expected
    assert random.random() == random.Random(0).random()
    assert np.random.rand() == np.random.RandomState(0).rand()


def test_forked_processes_are_skipped_beside_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(pytest.skip.Exception, match="refuses beside a GPU: set CUDA_VISIBLE_DEVICES=''"):
        in_processes(1, lambda: 0, tmp_path / "written")


@pytest.mark.gpu
def test_gpu_tests_run_only_where_there_is_one():
    assert torch.cuda.is_available()
