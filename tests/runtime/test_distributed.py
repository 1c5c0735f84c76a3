"""What the processes of a run agree on, over gloo."""

import os
from pathlib import Path

import pytest
import torch

from regla.runtime.distributed import ALONE, Processes, local, processes, whole
from regla.runtime.errors import LostProcessError, OtherProcessError

from ..ranks import in_processes

CPU = torch.device("cpu")


def test_one_process_agrees_with_itself() -> None:
    with processes(CPU) as (found, device):
        assert found is ALONE and device == CPU
    assert ALONE.is_first and ALONE.is_alone and ALONE.largest(3) == 3 and ALONE.value_of_first("x") == "x"
    assert ALONE.any(True) and not ALONE.any(False) and ALONE.all(True) and not ALONE.all(False)
    target = torch.zeros(2)
    ALONE.fill(target, torch.ones(2))
    assert torch.equal(ALONE.mean(target), torch.ones(2))
    with pytest.raises(ValueError, match="mine"), ALONE.together():
        raise ValueError("mine")


def test_facts(tmp_path: Path) -> None:
    def run() -> None:
        with processes(CPU) as (found, _):
            rank = found.rank
            assert (rank, found.count) == (int(os.environ["RANK"]), 3)
            assert found.any(rank == 2) and not found.any(False)
            assert found.all(True) and not found.all(rank != 1)
            assert found.largest(10 - rank) == 10
            assert found.value_of_first({"rank": rank}) == {"rank": 0}
            assert found.mean(torch.tensor([float(rank)])).item() == 1.0
            target = torch.full((3,), float(rank))
            found.fill(target, torch.arange(3.0) if found.is_first else None)
            assert torch.equal(target, torch.arange(3.0))

    assert [one.code for one in in_processes(3, run, tmp_path / "written")] == [0, 0, 0]


def test_shards(tmp_path: Path) -> None:
    """Also where a process has none of a tensor."""

    def run() -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Shard, distribute_tensor

        with processes(CPU) as (found, _):
            mesh = init_device_mesh("cpu", (3,))
            for rows in (2, 5):
                target = distribute_tensor(torch.zeros(rows, 2), mesh, [Shard(0)])
                expected = torch.arange(2.0 * rows).view(rows, 2)
                found.fill(target, expected if found.is_first else None)
                assert torch.equal(whole(target), expected)
                assert torch.equal(local(target), expected.tensor_split([-(-rows // 3), 2 * -(-rows // 3)])[found.rank])

    assert [one.code for one in in_processes(3, run, tmp_path / "written")] == [0, 0, 0]


@pytest.mark.parametrize("failing", [[1], [1, 2], [0, 1, 2]])
def test_what_fails_in_one_fails_in_all(failing: list[int], tmp_path: Path) -> None:
    """The first of those that failed tells."""

    def run() -> int:
        with processes(CPU) as (found, _):
            try:
                with found.together():
                    if found.rank in failing:
                        raise ValueError(f"of {found.rank}")
            except ValueError as error:
                assert str(error) == f"of {found.rank}"
                return 1
            except OtherProcessError as error:
                assert str(error) == f"Process {failing[0]} of this run failed and says why."
                return 2
        return 0

    codes = [one.code for one in in_processes(3, run, tmp_path / "written")]
    assert codes == [1 if rank == failing[0] else 2 for rank in range(3)]


def test_a_process_that_is_gone(tmp_path: Path) -> None:
    def run() -> int:
        try:
            with processes(CPU) as (found, _):
                found.wait()
                if found.rank == 1:
                    os._exit(9)
                found.wait()
        except LostProcessError as error:
            assert str(error) == "Process 0 of 2 has lost another process, which ended."
            return 3
        return 0

    assert [one.code for one in in_processes(2, run, tmp_path / "written")] == [3, 9]


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": 3, "LOCAL_RANK": 3, "WORLD_SIZE": 4, "MASTER_ADDR": "x", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    message = "Process 3 is number 4 on its machine, which has 2 GPUs; start as many processes as GPUs"
    with pytest.raises(ValueError, match=message), processes(torch.device("cuda")):
        pass


def test_the_first_tells_what_all_meet() -> None:
    error = FloatingPointError("not finite")
    assert Processes(0, 2).shared(error) is error
    assert isinstance(Processes(1, 2).shared(error), OtherProcessError)
