"""Truncated backpropagation: what linear layers remember goes on from step to step, its gradient does not.

    loss_s = loss(crop_s, stop_gradient(state_{s-1})),    state_s = the states behind crop_s

Every row of a batch reads the text in its order, a crop in each step. Where a document has ended in a crop of a row,
the row's next crop begins with an empty state, and so it does behind numbers that are not finite.

Shape legend: N tokens of the text, B sequences, L tokens of a crop, one more than T, those that are predicted; R = B
times the batches of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from regla.layers.attention import ReGLAAttention, ReGLAState
from regla.models.families import last_position
from regla.runtime.distributed import ALONE, Processes
from regla.runtime.errors import OptionError
from regla.train.config import LoopConfig
from regla.train.sequence import state_like

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PARTS = ReGLAState._fields


def text_in_order(tokens_N: Tensor, config: LoopConfig) -> Callable[[int], Tensor]:
    """Crops [B, L], int64: in each step every one of R rows goes on where it was, from R places evenly over the text,
    the first of which the seed draws. Behind the end of the text comes its beginning."""
    T, N = config.seq_len, len(tokens_N)
    R = config.batch_size * config.accumulate
    starts_R = int(np.random.default_rng(config.seed).integers(N)) + np.arange(R) * N // R

    def batch(number: int) -> Tensor:
        step, micro = divmod(number, config.accumulate)
        mine = starts_R[micro * config.batch_size : (micro + 1) * config.batch_size]
        first_B = torch.from_numpy((mine + step * T) % N).to(tokens_N.device, non_blocking=True)
        return tokens_N[(first_B[:, None] + torch.arange(T + 1, device=tokens_N.device)) % N].long()

    return batch


def check_carries(model: PreTrainedModel) -> None:
    """Raise OptionError unless all that a layer of the model remembers is a state of one size."""
    linear = getattr(model.config, "linear_config", model.config)
    for number, kind in enumerate(linear.layer_types or ()):
        if kind != "linear_attention":
            raise OptionError(
                "{carry_state} takes the states of linear layers on from step to step, but layer {number} of the model "
                "is {kind}, whose keys and values would grow; leave it out, or use {mixer} regla.",
                number=number,
                kind=kind,
            )
    if linear.key_max == "sequence":
        raise OptionError(
            "{carry_state} cannot know the largest key of a whole text, which key_max 'sequence' of the model needs; "
            "leave it out, or use another key_max."
        )
    if last_position(model.config) is not None:
        raise OptionError(
            "{carry_state} reads texts of any length, but the model has learnt positions, which end; leave it out."
        )


class CarriedStates:
    """Lets the linear layers of `model` begin each batch with the states behind the one before, wherever they run while
    it is open.

    Args:
        model: see `check_carries`.
        end: the id of the token that ends a document.
        rows: sequences of a batch, of all processes together.
        processes: each has the rows that `tensor_split` gives it.
    """

    def __init__(self, model: PreTrainedModel, *, end: int, rows: int, processes: Processes = ALONE) -> None:
        self.end, self.rows, self.processes = end, rows, processes
        self._device = model.device
        self._mixers = [module for module in model.modules() if isinstance(module, ReGLAAttention)]
        self._states: dict[int, list[ReGLAState]] = {}  # by number of the batch in a step
        self._positions: dict[int, Tensor] = {}  # [B], of the next tokens in their documents
        self._is_open = False
        for mixer in self._mixers:
            mixer.register_forward_pre_hook(self._begin, with_kwargs=True)
            mixer.register_forward_hook(self._end)
        linear = getattr(model.config, "linear_config", model.config)
        if linear.linear_rope or linear.window_branch:
            model.base_model.register_forward_pre_hook(self._place, with_kwargs=True)

    @contextmanager
    def open(self, micro: int, crop_BL: Tensor) -> Iterator[None]:
        """Around forward and backward of batch `micro` of a step, of which this process has `crop_BL`."""
        self._before = dict(zip(self._mixers, self._states.get(micro, ()), strict=False))
        self._after: dict[nn.Module, ReGLAState] = {}
        B, L = crop_BL.shape
        self._position = self._positions.get(micro, torch.zeros(B, dtype=torch.long, device=crop_BL.device))
        self._is_open = True
        try:
            yield
        finally:
            self._is_open = False
        states = [self._after[mixer] for mixer in self._mixers]
        finite_B = torch.stack([state.S.isfinite().flatten(1).all(1) for state in states]).all(0)
        goes_on_B = finite_B & (crop_BL[:, :-1] != self.end).all(1)

        def kept(x: Tensor) -> Tensor:
            """The rows that go on; the others are empty."""
            return torch.where(goes_on_B.view(-1, *[1] * (x.ndim - 1)), x, torch.zeros_like(x))

        self._states[micro] = [state.each(kept) for state in states]
        self._positions[micro] = torch.where(goes_on_B, self._position + L - 1, 0)
        self._before, self._after = {}, {}

    def whole(self) -> dict[str, Tensor]:
        """The states of all rows by name, in every process, for a checkpoint."""
        found = {}
        for micro, states in self._states.items():
            found[f"{micro}/position"] = self.processes.rows_together(self._positions[micro], self.rows)
            for number, state in enumerate(states):
                for name, x in zip(_PARTS, state, strict=True):
                    if x is not None:
                        found[f"{micro}/{number}/{name}"] = self.processes.rows_together(x, self.rows)
        return {name: x.cpu().contiguous() for name, x in found.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `whole` gave, in any number of processes."""
        mine = {
            name: x.tensor_split(self.processes.count)[self.processes.rank].to(self._device, copy=True)
            for name, x in tensors.items()
        }
        for micro in sorted({int(name.partition("/")[0]) for name in mine}):
            self._positions[micro] = mine[f"{micro}/position"]
            self._states[micro] = [
                ReGLAState(*(mine.get(f"{micro}/{number}/{name}") for name in _PARTS))  # type: ignore[arg-type]
                for number in range(len(self._mixers))
            ]

    @torch.compiler.disable
    def _begin(
        self, mixer: ReGLAAttention, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self._is_open:
            return None
        if mixer not in self._before:  # the first batch
            empty = state_like(mixer, args[0])
            self._before[mixer] = empty.each(torch.zeros_like)
        return args, kwargs | {"state": self._before[mixer], "return_state": True}

    @torch.compiler.disable
    def _end(
        self, mixer: ReGLAAttention, args: tuple[Any, ...], output: tuple[Tensor, ReGLAState]
    ) -> tuple[Tensor, None] | None:
        if not self._is_open:
            return None
        y, state = output
        self._after[mixer] = state.each(Tensor.detach)
        return y, None

    def _place(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Positions, for RoPE in linear layers and their window branches."""
        if not self._is_open:
            return None
        ids_BT = args[0] if args else kwargs["input_ids"]
        place = torch.arange(ids_BT.shape[1], device=ids_BT.device)
        return args, kwargs | {"position_ids": self._position[:, None] + place}
