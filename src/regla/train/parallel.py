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
from regla.train.config import LoopConfig, TrainConfig
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

    def clip(self, parameters: Sequence[nn.Parameter], most: float) -> tuple[Tensor, Tensor]:
        """Scale the gradients to a norm of at most `most`.

        Returns:
            The norm of all of them before, a scalar, and of each, [P], 0 where there is no gradient.
        """
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norms = whole(torch.stack([norm.float() for norm in torch._foreach_norm(gradients)]))
        norm = torch.linalg.vector_norm(norms)
        nn.utils.clip_grads_with_norm_(parameters, most, norm)
        if len(gradients) < len(parameters):  # such as experts that no token has chosen
            rest, zero = iter(norms.unbind()), torch.zeros_like(norm)
            norms = torch.stack([zero if parameter.grad is None else next(rest) for parameter in parameters])
        return norm, norms


class _Rows(Parallel):
    """Each process takes some sequences of a batch, and the backward pass takes the mean of the gradients."""

    def check(self, model: PreTrainedModel, config: LoopConfig) -> None:
        _check_rows(config, self.processes.count, "processes")

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
    """Each process of a group has a part of every sequence, and passes the states of its linear layers on to the next
    (see `regla.train.sequence`); each group takes some sequences of a batch. Weights and optimiser in every process.

    Args:
        size: processes of a group, which are neighbours; None: all.
    """

    exchange: Exchange
    """Behind `prepare`."""

    def __init__(self, processes: Processes, size: int | None = None) -> None:
        super().__init__(processes)
        self.size = size or processes.count
        self.groups = processes.count // self.size
        self.group, self.place = divmod(processes.rank, self.size)

    def check(self, model: PreTrainedModel, config: LoopConfig) -> None:
        if self.groups * self.size != self.processes.count:
            raise OptionError(
                "{sequence_parallel_size} is {value}, but there are {count} processes, which is no multiple of it; "
                "change one of them.",
                value=self.size,
                count=self.processes.count,
            )
        check_model(model.config)
        _check_rows(config, self.groups, "groups of processes")
        if config.seq_len < self.size:
            raise OptionError(
                "{seq_len} is {value}, but {count} processes share a sequence, and each takes at least one token of "
                "it; raise it, or start fewer.",
                value=config.seq_len,
                count=self.size,
            )

    def prepare(self, model: PreTrainedModel, config: LoopConfig) -> nn.Module:
        _start_alike(model, self.processes)
        self._seq_len = config.seq_len
        rank = self.processes.rank
        self.exchange = Exchange(
            model,
            before=rank - 1 if self.place > 0 else None,
            behind=rank + 1 if self.place + 1 < self.size else None,
        )
        return model

    def part(self, batch: Tensor) -> Tensor:
        # A crop has one token more than it predicts: the last of a part is the first of the next.
        extra = batch.shape[-1] - self._seq_len
        tokens = torch.arange(self._seq_len).tensor_split(self.size)[self.place]
        self.exchange.start = int(tokens[0])
        batch = batch.tensor_split(self.groups, dim=-2)[self.group]
        return batch[..., int(tokens[0]) : int(tokens[-1]) + 1 + extra]

    def batch(self, *, last: bool) -> AbstractContextManager[None]:
        return self.exchange.open()

    def reduce(self, parameters: Iterable[nn.Parameter]) -> None:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        together = self.processes.mean(torch.cat([gradient.flatten() for gradient in gradients]))
        parts = together.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))


def _check_rows(config: LoopConfig, count: int, who: str) -> None:
    if config.batch_size < count:
        raise OptionError(
            "{batch_size} is {value}, but there are {count} {who}, and each takes at least one sequence of a batch; "
            "raise it, or start fewer.",
            value=config.batch_size,
            count=count,
            who=who,
        )


def _start_alike(model: nn.Module, processes: Processes) -> None:
    """Give every process the first one's weights and buffers."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor, 0)


def parallel_of(config: TrainConfig, processes: Processes) -> Parallel:
    """How `processes` share the steps of a run of `config`."""
    if processes.is_alone:
        return Parallel()
    if config.parallel == "sequence":
        return SequenceParallel(processes, config.sequence_parallel_size)
    return PARALLEL[config.parallel](processes)


PARALLEL: dict[str, Callable[[Processes], Parallel]] = {
    "ddp": DataParallel,
    "fsdp": FullySharded,
    "sequence": SequenceParallel,
}
"""By the name of the option, with its defaults."""
