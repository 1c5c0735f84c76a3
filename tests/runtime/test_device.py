"""What a command computes in is its own, and is restored after it."""

from pathlib import Path

import pytest
import torch

from regla.cli import main
from regla.runtime.device import float32_products, out_of_memory, pick_device, precision


def state() -> tuple[str, bool]:
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32


def test_picking_a_device_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = state()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda")
    assert state() == before == ("highest", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="this PyTorch sees no GPU; use device cpu or auto"):
        pick_device("cuda")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_evaluation_leaves_nothing_to_tf32(dtype: str) -> None:
    x = torch.ones(2, 2)
    with float32_products(tf32=True):
        with precision(torch.device("cpu"), dtype):
            assert state() == ("highest", False)
            assert str((x @ x).dtype) == f"torch.{dtype}"
        assert state() == ("high", True)
        with pytest.raises(RuntimeError, match="inside"), precision(torch.device("cpu"), dtype):
            raise RuntimeError("inside")
        assert state() == ("high", True)


def test_a_command_restores_what_its_caller_had_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training, evaluation and generation, the last two in IEEE float32."""
    from regla.models import ReGLAForCausalLM

    seen = []
    forward = ReGLAForCausalLM.forward

    def look(model: ReGLAForCausalLM, *arguments, **options):
        seen.append((model.training, state()))
        return forward(model, *arguments, **options)

    monkeypatch.setattr(ReGLAForCausalLM, "forward", look)
    text = tmp_path / "text.txt"
    text.write_text("".join(f"Line {number} of the text says {number % 7}.\n" for number in range(200)))
    out = str(tmp_path / "run")
    sizes = "--vocab-size 300 --hidden-size 16 --layers 1 --heads 2 --seq-len 16 --batch-size 2 --steps 2"
    with float32_products(tf32=True):
        for dtype, training in (("float32", ("highest", False)), ("bfloat16", ("high", True))):
            where = ["--device", "cpu", "--dtype", dtype]
            assert main(["train", "--out", out + dtype, "--data", str(text), *sizes.split(), *where]) == 0
            assert main(["eval", out + dtype, "--data", str(text), *where]) == 0
            assert {found for trains, found in seen if trains} == {training}
            assert {found for trains, found in seen if not trains} == {("highest", False)}
            assert state() == ("high", True)
            seen.clear()
        assert main(["generate", out + "float32", "--prompt", "Line", "--max-new-tokens", "2", "--device", "cpu"]) == 0
        assert {found for _, found in seen} == {("highest", False)} and state() == ("high", True)


def test_settings_of_single_operations_are_no_obstacle() -> None:
    """PyTorch then refuses to name the setting of all."""
    matmul = torch.backends.cuda.matmul
    try:
        matmul.fp32_precision = "tf32"
        with float32_products():
            assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_full_memory_is_told_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**58)
    assert out_of_memory(caught.value) and out_of_memory(MemoryError()) and out_of_memory(torch.OutOfMemoryError())
    assert not out_of_memory(RuntimeError("shapes")) and not out_of_memory(ValueError("can't allocate memory"))
