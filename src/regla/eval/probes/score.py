"""How a probe is scored: by likelihood and by free generation, with standard errors.

    likelihood   the right candidate is the likeliest of C; chance is 1 / C, and so is 1 / k the worth of a tie of k
    generation   the greedy tokens, of the whole vocabulary and fed back, are the right ones: what the model can say;
                 chance is about 0

Both have n and a standard error. Answers of one sequence are not independent, so sequences are the units of the error:

    share = sum_b right_b / sum_b asked_b     se = sqrt(B / (B-1) sum_b (right_b - share asked_b)^2) / sum_b asked_b

Shape legend: B sequences, T tokens, C candidates, A tokens of an answer, N answers, V vocabulary.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regla.eval.probes.tokens import IGNORE, Asked
from regla.runtime.device import precision

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CHUNK = 2048  # tokens of a prompt at a time: bounds the memory of long ones
_LOGITS = 2**27  # at a time, unless one sequence has more


@dataclass(frozen=True)
class Answers:
    """What came of N questions, each in a row of its own or several in one."""

    row_N: Tensor
    distance_N: Tensor
    nats_N: Tensor
    """-ln p of the right answer."""
    likelihood_N: Tensor
    """1 where the right candidate was the likeliest, 1 / k where it tied with k - 1 others, else 0; float."""
    generation_N: Tensor
    """bool: greedy decoding said it."""

    def of(self, chosen_N: Tensor) -> Answers:
        return Answers(*(getattr(self, name)[chosen_N] for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class Share:
    """A mean over answers and its standard error over sequences; nan where one sequence alone was asked."""

    mean: float
    se: float


def share(values_N: Tensor, row_N: Tensor) -> Share:
    rows, index_N = row_N.unique(return_inverse=True)
    B = len(rows)
    right_B = values_N.new_zeros(B, dtype=torch.float64).index_add_(0, index_N, values_N.double())
    asked_B = index_N.bincount(minlength=B).double()
    mean = float(right_B.sum() / asked_B.sum())
    if B < 2:
        return Share(mean, math.nan)
    error = (B / (B - 1) * (right_B - mean * asked_B).square().sum()).sqrt() / asked_B.sum()
    return Share(mean, float(error))


def join(parts: Sequence[Answers]) -> Answers:
    """Answers of several batches; their rows stay apart."""
    rows, start = [], 0
    for part in parts:
        rows.append(part.row_N + start)
        start += int(part.row_N.max()) + 1
    rest = [
        torch.cat([getattr(part, name) for part in parts]) for name in Answers.__dataclass_fields__ if name != "row_N"
    ]
    return Answers(torch.cat(rows), *rest)


@torch.no_grad()
def answer_tokens(
    model: PreTrainedModel, asked: Asked, *, batch_size: int, dtype: str, generate: bool = True
) -> Answers:
    """Score questions in token ids. Without `generate`, generation is what the parallel pass finds likeliest."""
    model.eval()
    size = max(1, min(batch_size, _LOGITS // (asked.ids_BT.shape[1] * model.config.get_text_config().vocab_size)))
    parts = []
    for start in range(0, len(asked.ids_BT), size):
        ids_BT, targets_BT, candidates_BC, distance_BT = (
            x[start : start + size].to(model.device)
            for x in (asked.ids_BT, asked.targets_BT, asked.candidates_BC, asked.distance_BT)
        )
        with precision(model.device, dtype):
            logits_BTV = _forward(model, ids_BT, use_cache=False).logits
        is_asked_BT = targets_BT != IGNORE
        row_N = is_asked_BT.nonzero()[:, 0]
        logits_NV, targets_N = logits_BTV[is_asked_BT].float(), targets_BT[is_asked_BT]
        candidates_NC = candidates_BC[row_N]
        right_N1 = logits_NV.gather(1, targets_N[:, None])
        said_N = greedy(model, ids_BT, targets_BT, dtype=dtype)[is_asked_BT] if generate else logits_NV.argmax(-1)
        parts.append(
            Answers(
                row_N=row_N.cpu(),
                distance_N=distance_BT[is_asked_BT].cpu(),
                nats_N=torch.nn.functional.cross_entropy(logits_NV, targets_N, reduction="none").cpu(),
                likelihood_N=_likeliest(right_N1, logits_NV.gather(1, candidates_NC)).cpu(),
                generation_N=(said_N == targets_N).cpu(),
            )
        )
    return join(parts)


@torch.no_grad()
def greedy(model: PreTrainedModel, ids_BT: Tensor, targets_BT: Tensor, *, dtype: str = "float32") -> Tensor:
    """The likeliest token [B, T] at every position that is asked, token by token through the cache.

    Where the sequence goes on with the answer, the model reads what it said itself instead.
    """
    is_asked_BT = targets_BT != IGNORE
    columns = is_asked_BT.any(0).nonzero().flatten().tolist()
    first, last = columns[0], columns[-1]
    said_BT = torch.full_like(targets_BT, IGNORE)
    logits_BV, cache = read(model, ids_BT[:, : first + 1], dtype=dtype)
    for t in range(first, last + 1):
        token_B = logits_BV.argmax(-1)
        said_BT[:, t] = torch.where(is_asked_BT[:, t], token_B, IGNORE)
        if t < last:
            next_B = ids_BT[:, t + 1]
            next_B = torch.where(is_asked_BT[:, t] & (next_B == targets_BT[:, t]), token_B, next_B)
            logits_BV, cache = read(model, next_B[:, None], cache=cache, dtype=dtype)
    return said_BT


@torch.no_grad()
def answer_text(
    model: PreTrainedModel, prompt_BT: Tensor, candidates: Sequence[Sequence[Sequence[int]]], *, dtype: str
) -> Answers:
    """Score prompts that end right before their answer. candidates: C sequences of ids for each prompt, the right one
    first; the likeliest is that with the largest sum of log-probabilities."""
    model.eval()
    B, C = len(candidates), len(candidates[0])
    lengths_BC = torch.tensor([[len(one) for one in row] for row in candidates], device=model.device)
    A = int(lengths_BC.max())
    padded = [[[*one, *([0] * (A - len(one)))] for one in row] for row in candidates]
    answer_BCA = torch.tensor(padded, device=model.device)
    logits_BV, cache = read(model, prompt_BT.to(model.device), dtype=dtype)
    said = [logits_BV.argmax(-1)]
    speaking = copy.deepcopy(cache)
    for _ in range(int(lengths_BC[:, 0].max()) - 1):
        next_BV, speaking = read(model, said[-1][:, None], cache=speaking, dtype=dtype)
        said.append(next_BV.argmax(-1))
    said_BA = torch.stack(said, 1)
    right_BA, used_BA = answer_BCA[:, 0, : said_BA.shape[1]], _used(lengths_BC[:, 0], said_BA.shape[1])
    generation_B = ((said_BA == right_BA) | ~used_BA).all(1)

    log_p_BCA = logits_BV.float().log_softmax(-1)[:, None].expand(B, C, -1).gather(2, answer_BCA[:, :, :1])
    if A > 1:
        cache.batch_repeat_interleave(C)
        with precision(model.device, dtype):
            out = _forward(model, answer_BCA[:, :, :-1].flatten(0, 1), past_key_values=cache, use_cache=True)
        log_p = out.logits.float().log_softmax(-1).gather(2, answer_BCA[:, :, 1:].flatten(0, 1)[..., None])[..., 0]
        log_p_BCA = torch.cat([log_p_BCA, log_p.view(B, C, A - 1)], 2)
    log_p_BC = (log_p_BCA * _used(lengths_BC, A)).sum(2)
    return Answers(
        row_N=torch.arange(B, device="cpu"),
        distance_N=torch.zeros(B, dtype=torch.long, device="cpu"),
        nats_N=-log_p_BC[:, 0].cpu(),
        likelihood_N=_likeliest(log_p_BC[:, :1], log_p_BC).cpu(),
        generation_N=generation_B.cpu(),
    )


def _likeliest(right_N1: Tensor, all_NC: Tensor) -> Tensor:
    """A model that finds all alike must score chance, so ties share the point."""
    best_NC = all_NC == all_NC.amax(1, keepdim=True)
    return (right_N1[:, 0] == all_NC.amax(1)).float() / best_NC.sum(1)


def _used(lengths: Tensor, A: int) -> Tensor:
    return torch.arange(A, device=lengths.device) < lengths[..., None]


def read(model: PreTrainedModel, ids_BT: Tensor, *, cache: Any = None, dtype: str = "float32") -> tuple[Tensor, Any]:
    """Logits [B, V] behind the last token, and the cache, which is changed in place; long inputs go in chunks."""
    for ids_BC in ids_BT.split(_CHUNK, dim=1):
        with precision(model.device, dtype):
            out = _forward(model, ids_BC, past_key_values=cache, use_cache=True, last=True)
        cache = out.past_key_values
    return out.logits[:, -1], cache


def _forward(model: PreTrainedModel, ids_BT: Tensor, *, last: bool = False, **kwargs: Any) -> Any:
    """`last`: the last token's logits alone, where the model can leave the others out."""
    if last and "logits_to_keep" in inspect.signature(model.forward).parameters:
        kwargs["logits_to_keep"] = 1
    try:
        return model(input_ids=ids_BT, **kwargs)
    except IndexError as error:  # learnt positions end somewhere
        named = getattr(model.config, "max_position_embeddings", None)
        raise ValueError(
            f"The model has no position for a token of this text; its max_position_embeddings is {named}: take a "
            "shorter length."
        ) from error
