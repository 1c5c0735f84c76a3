"""On which GPUs the kernels run, said in one sentence where they do not."""

from types import SimpleNamespace

import pytest
import torch

from regla.ops import dispatch
from regla.ops.triton import chip

H200 = {
    "name": "NVIDIA H200", "major": 9, "minor": 0, "multi_processor_count": 132,
    "shared_memory_per_block_optin": 232_448,
}  # fmt: skip


@pytest.fixture
def gpu(monkeypatch):
    """Makes torch see one."""
    for function in (chip._why_unsupported, chip.chip_of):
        function.cache_clear()

    def see(**changed):
        properties = SimpleNamespace(**{**H200, **changed})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        return torch.device("cuda", 0)

    yield see
    for function in (chip._why_unsupported, chip.chip_of):
        function.cache_clear()


def tensor_on(device, dtype=torch.bfloat16):
    """What the choice of a backend looks at."""
    return SimpleNamespace(device=device, is_cuda=True, is_cpu=False, dtype=dtype, shape=(1, 8, 1, 16))


def test_an_h200(gpu):
    assert chip.why_unsupported(gpu()) is None
    assert dispatch.why_not_triton(tensor_on(gpu()), tensor_on(gpu())) is None
    assert chip.chip_of(gpu()) == chip.HOPPER


def test_a_slice_of_one_has_its_own_multiprocessors(gpu):
    assert chip.chip_of(gpu(multi_processor_count=16)).multiprocessors == 16


UNSUPPORTED = [
    (
        {"name": "NVIDIA A100", "major": 8},
        "the kernels support GPUs of compute capability 9.0 (H100, H200), and NVIDIA A100 has 8.0",
    ),
    (
        {"name": "NVIDIA B200", "major": 10},
        "the kernels support GPUs of compute capability 9.0 (H100, H200), and NVIDIA B200 has 10.0",
    ),
    (
        {"shared_memory_per_block_optin": 101_376},
        "the kernels need 232,448 bytes of shared memory a CTA, and NVIDIA H200 gives 101,376",
    ),
]


@pytest.mark.parametrize(("changed", "reason"), UNSUPPORTED)
def test_another_gpu(gpu, changed, reason):
    """A sentence if the kernels are asked for, the chunked form with "auto"."""
    x = tensor_on(gpu(**changed))
    assert dispatch.why_not_triton(x, x) == reason
    assert dispatch.choose_backend("auto", x, x, None) == "chunked"
    with pytest.raises(ValueError, match="backend='triton' cannot run: the kernels"):
        dispatch.choose_backend("triton", x, x, None)


def test_a_gpu_of_amd(gpu, monkeypatch):
    device = gpu()
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert chip.why_unsupported(device) == "the GPU is one of AMD, and the kernels are written for NVIDIA's"
