"""Which layers keep softmax attention: each is given back by itself, and what that wins decides.

After attention transfer every layer is linear. With layer l restored to the original's attention,

    share of KL      (KL of the linear model - KL with l) / KL of the linear model
    share of recall  (nats of the linear model - nats with l) / (nats of the linear model - nats of the original)

where KL is that of the original's predictions on validation text, and nats are those of the right answers of
associative recall (mqar). A difference within twice its standard error, paired by sequence, is noise and counts as 0.
Layers are ranked by the sum of both shares; equal ones by KL.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from regla.eval.probes.run import Cell
from regla.eval.probes.score import answer_tokens
from regla.eval.probes.tokens import mqar
from regla.linearize.divergence import mean_and_error, sequence_divergences
from regla.models.families import family_of, last_position
from regla.models.student import linear_attention
from regla.report.tables import plain
from regla.runtime.errors import OptionError

_PAIRS, _GAP, _SEQUENCES = 8, 64, 64  # of the probe: pairs, tokens between them and their queries, sequences
_NOISE = 2.0  # standard errors


@dataclass(frozen=True)
class LayerGain:
    """What it wins to restore one layer; `se` is that of the paired difference over sequences."""

    layer: int
    kl: float
    kl_gain: float
    kl_gain_se: float
    recall: float
    """Nats of the right answers."""
    recall_gain: float
    recall_gain_se: float
    score: float


def rank_layers(
    original: PreTrainedModel, model: PreTrainedModel, ids_BT: Tensor, *, batch_size: int, dtype: str, seed: int
) -> list[LayerGain]:
    """The linear layers of `model`, the one that wins most first.

    Args:
        original: the teacher.
        model: the student after attention transfer; as it was, afterwards.
        ids_BT: validation text.
        batch_size: sequences at a time.
        dtype: of matrix products.
        seed: of the probe's sequences.
    """
    asked = _asked(original, seed)

    def figures(of: PreTrainedModel) -> tuple[Tensor, Tensor]:
        kl_B = sequence_divergences(original, of, ids_BT, batch_size=batch_size, dtype=dtype)
        answers = answer_tokens(of, asked, batch_size=batch_size, dtype=dtype, generate=False)
        rows = len(asked.ids_BT)
        recall_B = answers.nats_N.new_zeros(rows, dtype=torch.float64)
        recall_B.index_add_(0, answers.row_N, answers.nats_N.double())
        return kl_B, recall_B * rows / len(answers.row_N)

    training = model.training
    (_, best_B), (kl_B, recall_B) = figures(original), figures(model)
    kl_gap, recall_gap = float(kl_B.mean()), float((recall_B - best_B).mean())
    found = []
    for layer in tqdm(sorted(linear_attention(model)), unit="layer", desc="restored", mininterval=1):
        with softmax_restored(original, model, layer):
            kl_of_B, recall_of_B = figures(model)
        kl_gain, recall_gain = mean_and_error(kl_B - kl_of_B), mean_and_error(recall_B - recall_of_B)
        shares = ((kl_gain, kl_gap), (recall_gain, recall_gap))
        score = sum(_beyond_noise(*gain) / gap for gain, gap in shares if gap > 0)
        found.append(LayerGain(layer, float(kl_of_B.mean()), *kl_gain, float(recall_of_B.mean()), *recall_gain, score))
    model.train(training)
    return sorted(found, key=lambda row: (-row.score, row.kl))


def _beyond_noise(gain: float, se: float) -> float:
    return gain if abs(gain) > _NOISE * se else 0.0


def _asked(original: PreTrainedModel, seed: int) -> Any:
    pairs, gap = _PAIRS, _GAP
    limit = last_position(original.config)
    if limit is not None and limit < 4 * pairs + gap:
        gap = max(0, limit - 4 * pairs)
    cell = Cell(probe="mqar", length=4 * pairs + gap, pairs=pairs, gap=gap)
    return mqar(
        cell.seed(seed),
        rows=_SEQUENCES,
        length=cell.length,
        vocab_size=original.config.vocab_size,
        cells=[(pairs, gap)],
    )


@contextmanager
def softmax_restored(original: PreTrainedModel, model: PreTrainedModel, layer: int) -> Iterator[None]:
    """Within the context one linear layer of `model` is the original's attention."""
    family, ours = family_of(model.config), linear_attention(model)[layer]
    family.replace_attention(model, layer, family.attention_of(original, layer))
    try:
        yield
    finally:
        family.replace_attention(model, layer, ours)


def keep_softmax(original: PreTrainedModel, model: PreTrainedModel, layers: Sequence[int]) -> None:
    """Give linear layers of `model` the original's attention back for good, in place."""
    family = family_of(model.config)
    for layer in layers:
        family.replace_attention(model, layer, copy.deepcopy(family.attention_of(original, layer)))
    model.config.linear_layers = [layer for layer in model.config.linear_layers if layer not in layers]
    for part in (model, model.base_model):
        part.config.linear_layers = model.config.linear_layers
        part.linear_config = model.config.linear_config  # type: ignore[assignment]


def choice_table(rows: Sequence[LayerGain], count: int) -> str:
    """A line for each layer, the best first; the first `count` are kept."""
    body = [
        [
            str(row.layer),
            f"{row.kl:.4f}",
            f"{row.kl_gain:+.4f} ± {row.kl_gain_se:.4f}",
            f"{row.recall:.3f}",
            f"{row.recall_gain:+.3f} ± {row.recall_gain_se:.3f}",
            f"{row.score:.3f}",
            "kept" if place < count else "",
        ]
        for place, row in enumerate(rows)
    ]
    header = ["layer", "KL", "gain", "recall (nats)", "gain", "score", ""]
    return "Each layer restored to softmax attention by itself:\n" + plain(header, body, numbers_from=0)


def known_choice(summary: dict[str, Any]) -> list[int]:
    """The layers that a run chose before, from its summary.

    Raises:
        ValueError: it does not say.
    """
    try:
        return [int(layer) for layer in summary["layer_choice"]["kept"]]
    except (KeyError, TypeError, ValueError):
        raise OptionError(
            "linearize.json in {out} does not say which layers keep softmax attention, and training behind that choice "
            "has begun; give {out} a new folder."
        ) from None
