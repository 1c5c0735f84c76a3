"""What a report measures: teacher and student on the same held-out text, in about a minute for a small model.

Shape legend: N tokens of text, B sequences, T predicted tokens of a sequence, V vocabulary, L linear layers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from regla.data.tokenizer import end_of_text_id
from regla.eval.inspection import linear_layers, look_inside
from regla.eval.perplexity import bin_edges
from regla.linearize.observe import Attention, observed_attention
from regla.models.families import last_position
from regla.models.student import linear_attention
from regla.quickstart.decoding import decoding_costs
from regla.runtime.device import float32_products

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_WINDOWS, _LENGTH, _BATCH = 48, 256, 4  # sequences of held-out text, their tokens, sequences at a time
_SECONDS = 20.0  # after which no further batch of them begins
_DECODING_SECONDS = 12.0  # the longest context is one that is read in about that time
_LONGEST, _SHORTEST, _REPEATS = 4096, 64, 20  # contexts of the decoding; timed tokens at each
_INSPECTED = 2048  # tokens
_SAMPLES, _PROMPT, _NEW = 3, 24, 48  # prompts, their tokens, new tokens

State = tuple[float, float]
"""A mean and its standard error."""


@torch.no_grad()
@float32_products()
def measure(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids_N: np.ndarray,
    *,
    announce: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Everything that the page shows and the folder does not hold.

    Args:
        teacher: the original.
        student: the converted model, on the same device.
        tokenizer: theirs.
        ids_N: held-out text, int [N], N > 1.
        announce: told what is measured next.

    Returns:
        `comparison` (mean and standard error of each figure, and curves by position), `alignment` (relative error of
        each linear layer), `gates` (rows of `regla.eval.inspection.LayerReport`), `decoding` (rows of
        `regla.quickstart.decoding.DecodingCost` by model), `samples`.
    """
    teacher.eval(), student.eval()
    limit = last_position(student.config)
    windows_BL = _windows(ids_N, min(_LENGTH, limit or _LENGTH))
    announce("Comparing predictions")
    started = time.perf_counter()
    comparison = compare(teacher, student, windows_BL)
    per_token = (time.perf_counter() - started) / comparison["tokens"]
    announce("Looking into the layers")
    found: dict[str, Any] = {
        "comparison": comparison,
        "alignment": alignment(teacher, student, windows_BL[:_BATCH, :-1]),
        "gates": [],
    }
    if linear_layers(student):
        text_1T = torch.from_numpy(ids_N[: min(_INSPECTED, limit or _INSPECTED)].astype(np.int64))[None]
        found["gates"] = [asdict(layer) for layer in look_inside(student, text_1T)]
    announce("Timing the next token")
    contexts = _contexts(per_token, limit)
    found["decoding"] = {
        name: [asdict(row) for row in decoding_costs(model, contexts, repeats=_REPEATS)]
        for name, model in (("teacher", teacher), ("student", student))
    }
    announce("Writing samples")
    found["samples"] = samples(teacher, student, tokenizer, ids_N)
    return found


def _windows(ids_N: np.ndarray, length: int) -> Tensor:
    """Sequences of T + 1 <= length + 1 tokens, int64 [B, T + 1], spread over the text."""
    L = min(length + 1, len(ids_N))
    B = max(1, min(_WINDOWS, len(ids_N) // L))
    starts = np.linspace(0, len(ids_N) - L, B).astype(int)
    return torch.from_numpy(np.stack([ids_N[start : start + L] for start in starts]).astype(np.int64))


@torch.no_grad()
def compare(teacher: PreTrainedModel, student: PreTrainedModel, windows_BL: Tensor) -> dict[str, Any]:
    """Predictions of both on the same tokens; standard errors over sequences, of differences paired by sequence.

    Args:
        windows_BL: sequences of T + 1 tokens; of the first T each predicts the next. Sequences that would begin after
            20 s are left out.
    """
    began = time.perf_counter()
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(windows_BL), generator=generator, device="cpu")  # any part is spread as well
    parts: dict[str, list[Tensor]] = {}
    for batch_BL in windows_BL[order].split(_BATCH):
        if parts and time.perf_counter() - began > _SECONDS:
            break
        inputs_BT, targets_BT = batch_BL[:, :-1].to(teacher.device), batch_BL[:, 1:].to(teacher.device)
        theirs_BTV, ours_BTV = (
            model(input_ids=inputs_BT, use_cache=False).logits.float().log_softmax(-1) for model in (teacher, student)
        )
        rows = {
            "teacher_loss": F.nll_loss(theirs_BTV.flatten(0, 1), targets_BT.flatten(), reduction="none"),
            "student_loss": F.nll_loss(ours_BTV.flatten(0, 1), targets_BT.flatten(), reduction="none"),
            "teacher_right": theirs_BTV.argmax(-1) == targets_BT,
            "student_right": ours_BTV.argmax(-1) == targets_BT,
            "same": theirs_BTV.argmax(-1) == ours_BTV.argmax(-1),
            "kl": F.kl_div(ours_BTV, theirs_BTV, reduction="none", log_target=True).sum(-1),
        }
        for name, row in rows.items():
            parts.setdefault(name, []).append(row.double().view(targets_BT.shape).cpu())
    by_token = {name: torch.cat(rows) for name, rows in parts.items()}
    by_sequence = {name: row_BT.mean(1) for name, row_BT in by_token.items()}
    by_sequence["loss_gap"] = by_sequence["student_loss"] - by_sequence["teacher_loss"]
    by_sequence["right_gap"] = by_sequence["student_right"] - by_sequence["teacher_right"]
    B, T = by_token["kl"].shape
    found: dict[str, Any] = {name: _mean_and_error(row_B) for name, row_B in by_sequence.items()}
    positions = [
        {"first": first, "last": end - 1}
        | {name: float(by_token[name][:, first:end].mean()) for name in ("teacher_loss", "student_loss", "kl")}
        for first, end in pairwise(bin_edges(T))
    ]
    return found | {"sequences": B, "length": T, "tokens": B * T, "positions": positions}


def _mean_and_error(values_B: Tensor) -> State:
    """Standard error nan for one value alone."""
    error = float(values_B.std()) / len(values_B) ** 0.5 if len(values_B) > 1 else math.nan
    return float(values_B.mean()), error


@torch.no_grad()
def alignment(teacher: PreTrainedModel, student: PreTrainedModel, ids_BT: Tensor) -> dict[int, float]:
    """|mixer(x) - y|^2 / |y|^2 of each linear layer, where x goes into the teacher's attention and y comes out."""
    layers = linear_attention(student)
    errors: dict[int, float] = {}

    def see(number: int, attention: Attention) -> None:
        y = layers[number](attention.x, position_embeddings=attention.rotary)[0].double()
        expected = attention.y.double()
        errors[number] = float((y - expected).square().sum() / expected.square().sum())

    with observed_attention(teacher, sorted(layers), see):
        teacher.base_model(ids_BT.to(teacher.device), use_cache=False)
    return errors


def _contexts(seconds_per_token: float, limit: int | None) -> list[int]:
    """Powers of two that are read in time, and for which the model has positions."""
    longest = min(_LONGEST, _DECODING_SECONDS / seconds_per_token, (limit or 2 * _LONGEST) - _REPEATS)
    found = [length for length in (2**power for power in range(6, 13)) if length <= longest]
    return found or [max(1, min(_SHORTEST, (limit or _LONGEST) - _REPEATS))]


def samples(
    teacher: PreTrainedModel, student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids_N: np.ndarray
) -> list[dict[str, str]]:
    """Likeliest continuations of a few places of the text, by both models, and the text itself."""
    limit = last_position(student.config) or _PROMPT + _NEW
    prompt = max(1, min(_PROMPT, limit // 3, len(ids_N) // 2))
    new = max(1, min(_NEW, limit - prompt))
    starts = np.unique(np.linspace(0, max(0, len(ids_N) - prompt - new), _SAMPLES).astype(int))
    padding = end_of_text_id(tokenizer)

    def text(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    found = []
    for start in starts:
        ids = ids_N[start : start + prompt].astype(np.int64)
        ids_1T = torch.from_numpy(ids)[None].to(teacher.device)
        row = {"prompt": text(ids.tolist()), "text": text(ids_N[start + prompt : start + prompt + new].tolist())}
        for name, model in (("teacher", teacher), ("student", student)):
            out_1L = model.generate(
                ids_1T,
                attention_mask=torch.ones_like(ids_1T),
                max_new_tokens=new,
                do_sample=False,
                num_beams=1,
                pad_token_id=padding,
            )
            row[name] = text(out_1L[0, len(ids) :].tolist())
        found.append(row)
    return found
