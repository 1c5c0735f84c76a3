"""How the processes of a run share the work of a step: data parallel, sharded data parallel, sequence parallel.

Every process makes the whole batch, whose number alone decides what is in it, and takes its part. The gradient is that
of the mean over all tokens of the step, whoever has them: a process weighs its own mean by its share of the tokens. So
a run takes the same steps, up to rounding, in any number of processes.

Shape legend: B sequences, L tokens of a crop, one more than T, those that are predicted; P processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from regla.runtime.distributed import ALONE, Processes, whole
from regla.runtime.errors import OptionError
from regla.train.config import LoopConfig
from regla.train.sequence import Exchange, check_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Parallel:
    """One process, which has all of a step; the others are derived from it.

    `prepare` comes before the optimiser is made; then, for each batch, `part` and, around forward and backward,
    `batch`; then `reduce` and `clip` before the optimiser's step.
    """

    def __init__(self, processes: Processes = ALONE) -> None:
        self.processes = processes

    def check(self, model: PreTrainedModel, config: LoopConfig) -> None:
        """Raise ValueError where the run does not fit."""

    def prepare(self, model: PreTrainedModel, config: LoopConfig) -> nn.Module:
        """What the loss calls in place of `model`, whose parameters may be other objects from now on."""
        return model

    def part(self, batch: Tensor) -> Tensor:
        """What this process takes of a batch [..., B, T or L]."""
        return batch

    def batch(self, *, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a batch; `last`: of the step."""
        return nullcontext()

    def reduce(self, parameters: Iterable[nn.Parameter]) -> None:
        """Make the gradients those of the whole step, where the backward pass has not done so."""

    def clip(self, parameters: Sequence[nn.Parameter], most: float) -> Tensor:
        """Scale the gradients to a norm of at most `most`; the norm of all of them before, a scalar."""
        return whole(nn.utils.clip_grad_norm_(parameters, most))


class _Rows(Parallel):
    """Each process takes some sequences of a batch, and the backward pass takes the mean of the gradients."""

    def check(self, model: PreTrainedModel, config: LoopConfig) -> None:
        if config.batch_size < self.processes.count:
            raise OptionError(
                "{batch_size} is {value}, but there are {count} processes, and each takes at least one sequence of a "
                "batch; raise it, or start fewer.",
                value=config.batch_size,
                count=self.processes.count,
            )

    def part(self, batch: Tensor) -> Tensor:
        return batch.tensor_split(self.processes.count, dim=-2)[self.processes.rank]


class DataParallel(_Rows):
    """DistributedDataParallel: weights and optimiser in every process, gradients averaged while the backward runs."""

    def prepare(self, model: PreTrainedModel, config: LoopConfig) -> nn.Module:
        self._wrapped = nn.parallel.DistributedDataParallel(
            model,
            device_ids=[model.device] if model.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
        )
        if config.compile:  # blocks and loss are compiled, not what lies between
            self._wrapped.forward = torch.compiler.disable(self._wrapped.forward)  # type: ignore[method-assign]
        return self._wrapped

    def batch(self, *, last: bool) -> AbstractContextManager[None]:
        return nullcontext() if last else self._wrapped.no_sync()


class FullySharded(_Rows):
    """FSDP2 (`fully_shard`): each process has a P-th of weights, gradients and optimiser, and gathers a block's weights
    while it runs."""

    def prepare(self, model: PreTrainedModel, config: LoopConfig) -> nn.Module:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        from regla.models.families import blocks_of

        _start_alike(model, self.processes)
        mesh = init_device_mesh(model.device.type, (self.processes.count,))
        for block in blocks_of(model):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model


class SequenceParallel(Parallel):
    """Each process has a part of every sequence, and passes the states of its linear layers on to the next (see
    `regla.train.sequence`); weights and optimiser in every process."""

    exchange: Exchange
    """Behind `prepare`."""

    def check(self, model: PreTrainedModel, config: LoopConfig) -> None:
        check_model(model.config)
        if config.seq_len < self.processes.count:
            raise OptionError(
                "{seq_len} is {value}, but there are {count} processes, and each takes at least one token of a "
                "sequence; raise it, or start fewer.",
                value=config.seq_len,
                count=self.processes.count,
            )

    def prepare(self, model: PreTrainedModel, config: LoopConfig) -> nn.Module:
        _start_alike(model, self.processes)
        self._seq_len = config.seq_len
        self.exchange = Exchange(model, self.processes)
        return model

    def part(self, batch: Tensor) -> Tensor:
        # A crop has one token more than it predicts: the last of a part is the first of the next.
        extra = batch.shape[-1] - self._seq_len
        tokens = torch.arange(self._seq_len).tensor_split(self.processes.count)[self.processes.rank]
        self.exchange.start = int(tokens[0])
        return batch[..., int(tokens[0]) : int(tokens[-1]) + 1 + extra]

    def batch(self, *, last: bool) -> AbstractContextManager[None]:
        return self.exchange.open()

    def reduce(self, parameters: Iterable[nn.Parameter]) -> None:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        together = self.processes.mean(torch.cat([gradient.flatten() for gradient in gradients]))
        parts = together.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))


def _start_alike(model: nn.Module, processes: Processes) -> None:
    """Give every process the first one's weights and buffers."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor, 0)


PARALLEL: dict[str, Callable[[Processes], Parallel]] = {
    "ddp": DataParallel,
    "fsdp": FullySharded,
    "sequence": SequenceParallel,
}
