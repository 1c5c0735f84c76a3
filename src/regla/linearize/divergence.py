"""How far a converted model's predictions are from its original's: KL with its standard error over sequences."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from regla.linearize.losses import hidden_states, token_divergences
from regla.runtime.device import precision


@dataclass(frozen=True)
class Divergence:
    """Mean KL(original || model) of the next token in nats; `se` over sequences, nan for one alone."""

    mean: float
    se: float
    tokens: int


@torch.no_grad()
def sequence_divergences(
    original: PreTrainedModel, model: PreTrainedModel, ids_BT: Tensor, *, batch_size: int, dtype: str
) -> Tensor:
    """KL(original || model) in nats, mean over the tokens of each sequence: float64 [B], on the CPU."""
    original.eval(), model.eval()
    found = []
    for part_BT in ids_BT.to(original.device).split(batch_size):
        with precision(original.device, dtype):
            target_ND, h_ND = hidden_states(original, part_BT), hidden_states(model, part_BT)
            nats_N = torch.cat(list(token_divergences(original, target_ND, model, h_ND)))
        found.append(nats_N.double().view(part_BT.shape).mean(1).cpu())
    return torch.cat(found)


def mean_and_error(values_B: Tensor) -> tuple[float, float]:
    """The mean of independent values, and its standard error."""
    if len(values_B) < 2:
        return float(values_B.mean()), math.nan
    return float(values_B.mean()), float(values_B.std() / len(values_B) ** 0.5)


def divergence(
    original: PreTrainedModel, model: PreTrainedModel, ids_BT: Tensor, *, batch_size: int, dtype: str
) -> Divergence:
    """Of the sequences ids_BT [B, T]."""
    values_B = sequence_divergences(original, model, ids_BT, batch_size=batch_size, dtype=dtype)
    return Divergence(*mean_and_error(values_B), ids_BT.numel())
