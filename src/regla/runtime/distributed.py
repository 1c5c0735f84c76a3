"""The processes of a run: this one's place among them, and what they agree on.

A launcher (torchrun, `accelerate launch`) starts them and says in the environment who each of them is. Small facts
travel over gloo on the CPU, so that no GPU is waited for.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from regla.runtime.errors import LostProcessError, OptionError, OtherProcessError

_PLACE = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

# Groups of processes, to the end of this one. Were DistributedDataParallel the last to hold a group, it would end it
# with the interpreter's lock, for which a thread of the group may wait: neither would end.
_held: list[Any] = []


class Processes:
    """This process among those of a run; without a launcher it is the first and only one.

    Every method but the properties is called by all processes at the same place, or by none.

    Args:
        rank: the number of this process, from 0.
        count: how many there are.
        local_rank: its number among those of this machine.
    """

    def __init__(self, rank: int = 0, count: int = 1, local_rank: int = 0) -> None:
        self.rank, self.count, self.local_rank = rank, count, local_rank

    @property
    def is_first(self) -> bool:
        """Whether this is the process that prints, and writes to disk."""
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        return self.count == 1

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true in one of the processes."""
        return self.largest(int(flag)) > 0

    def all(self, flag: bool) -> bool:
        return not self.any(not flag)

    def wait(self) -> None:
        """Until all processes are here."""
        self.any(False)

    @contextmanager
    def together(self) -> Iterator[None]:
        """What fails in one process fails in all: the first of those with an error raises it, the others raise
        OtherProcessError. The body must not talk to other processes."""
        if self.is_alone:
            yield
            return
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        failed = self.count - self.largest(0 if error is None else self.count - self.rank)
        if error is not None and failed == self.rank:
            raise error
        if failed < self.count:
            raise OtherProcessError(f"Process {failed} of this run failed and says why.") from error

    def shared(self, error: Exception) -> Exception:
        """What to raise for an error that every process meets: the error in the first, which tells, and
        OtherProcessError elsewhere."""
        return error if self.is_first else OtherProcessError(f"Process 0 of this run failed and says why: {error}")

    def lost(self, advice: str = "") -> LostProcessError:
        """What to raise where another process is gone."""
        sentence = f"Process {self.rank} of {self.count} has lost another process, which ended. {advice}"
        return LostProcessError(sentence.rstrip())

    def value_of_first(self, value: Any) -> Any:
        """What the first process gives, in all of them."""
        if self.is_alone:
            return value
        box = [value]
        dist.broadcast_object_list(box, 0, device=torch.device("cpu"))
        return box[0]

    def mean(self, x: Tensor) -> Tensor:
        """The mean of every element over the processes; overwrites x."""
        if not self.is_alone:
            dist.all_reduce(x)
            x /= self.count
        return x

    def rows_together(self, part: Tensor, rows: int) -> Tensor:
        """[rows, ...], of which each process has the `part` that `tensor_split` gives it, in all of them."""
        if self.is_alone:
            return part
        wide = torch.float32 if part.is_floating_point() else part.dtype
        every = torch.zeros(rows, *part.shape[1:], dtype=wide, device=part.device)
        every.tensor_split(self.count)[self.rank].copy_(part)
        dist.all_reduce(every)
        return every.to(part.dtype)

    def fill(self, target: Tensor, value: Tensor | None) -> None:
        """Copy `value`, which only the first process needs to have, into `target`, of which each process may have a
        shard (DTensor)."""
        if value is not None and (self.is_alone or not hasattr(target, "full_tensor")):
            target.copy_(value)
        if self.is_alone:
            return
        if not hasattr(target, "full_tensor"):
            dist.broadcast(target.detach(), 0)
            return
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(target, DTensor)
        every = torch.empty(target.shape, dtype=target.dtype, device=target.device)
        if value is not None:
            every.copy_(value)
        target.copy_(distribute_tensor(every, target.device_mesh, target.placements))

    def largest(self, number: int) -> int:
        """Of the numbers that the processes give."""
        if self.is_alone:
            return number
        found = torch.tensor(number, device="cpu")
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)


ALONE = Processes()


def whole(x: Tensor) -> Tensor:
    """x, or all of it where processes have shards of it, in each of them; then every process calls this."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def local(x: Tensor) -> Tensor:
    """x, or this process's shard of it."""
    return x.to_local() if hasattr(x, "to_local") else x


@contextmanager
def processes(device: torch.device) -> Iterator[tuple[Processes, torch.device]]:
    """The processes that the launcher started, connected while the context is open, and this one's device.

    Only the first writes to stdout. With several, `device` cuda becomes the GPU of this process, and the backend is
    NCCL for tensors on GPUs and gloo for those on the CPU.

    Raises:
        ValueError: the launcher's environment is not complete, or this machine has more processes than GPUs.
        LostProcessError: another process ended while this one waited for it.
    """
    world = os.environ.get("WORLD_SIZE", "")
    count = int(world) if world.isdecimal() else 1
    if count <= 1:
        yield ALONE, device
        return
    missing = [name for name in _PLACE if not os.environ.get(name)]
    if missing:
        raise ValueError(
            f"WORLD_SIZE is {count}, but {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set; start "
            "several processes with torchrun, or unset WORLD_SIZE."
        )
    found = Processes(int(os.environ["RANK"]), count, int(os.environ["LOCAL_RANK"]))
    backend = "gloo"
    if device.type == "cuda":
        if found.local_rank >= torch.cuda.device_count():
            raise OptionError(
                "Process {rank} is number {number} on its machine, which has {gpus} GPUs; start as many processes as "
                "GPUs, or give {device} cpu.",
                rank=found.rank,
                number=found.local_rank + 1,
                gpus=torch.cuda.device_count(),
            )
        device, backend = torch.device("cuda", found.local_rank), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    dist.init_process_group(backend)
    _held.append(dist.group.WORLD)
    connected = True
    try:
        with nullcontext() if found.is_first else redirect_stdout(io.StringIO()):
            yield found, device
    except RuntimeError as error:
        connected = not is_lost(error)
        if connected or isinstance(error, LostProcessError):
            raise
        raise found.lost() from error
    finally:
        if connected:  # else it could wait for those that are gone
            dist.destroy_process_group()


def is_lost(error: BaseException) -> bool:
    """Whether an error says that another process is gone."""
    if isinstance(error, LostProcessError | dist.DistError):
        return True
    return isinstance(error, RuntimeError) and "gloo/transport" in str(error)
