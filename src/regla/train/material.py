"""What a run trains on and is scored on: text in tokens, or a task that makes its own sequences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regla.data.bad import BadRecords
from regla.data.cache import cached_tokens
from regla.data.records import read_dataset
from regla.data.selection import check_apart, read_sources, split_validation
from regla.data.sources import Source, encode_source, files_of, holds_tokens, read_source
from regla.data.text import Text
from regla.data.tokenizer import end_of_text_id, first_id, load_tokenizer, train_tokenizer, vocabulary_size
from regla.data.tokens import Ids, Tokens
from regla.eval.perplexity import Score, beyond_the_model, mean_score, position_table, score, table
from regla.eval.probes.run import Cell, Record, figures, record, training_cells
from regla.eval.probes.score import Answers, answer_tokens, join
from regla.eval.probes.tokens import IGNORE, Asked, mqar
from regla.models.folders import check_ids
from regla.models.packing import all_linear
from regla.report.tables import markdown
from regla.runtime.errors import OptionError
from regla.train.carry import text_in_order
from regla.train.config import DEFAULT_PAIRS, DEFAULT_VOCAB_SIZE, TrainConfig
from regla.train.loop import Loss, document_loss, next_token_loss, predicted_tokens
from regla.train.mixture import Mixture, Stream

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_CHARACTERS_PER_TOKEN = 8  # of a data set: more than English text has in any tokenizer, so that crops repeat little
_LARGE = 2**29  # bytes of text
_SCORED = 256  # sequences of each cell of a task
_VALIDATED = 32  # of each cell, while the run goes on
_SAMPLED = 512  # tokens at most of a look inside
_ON_GPU = 2**27  # tokens that are kept there as a whole


class Material(Protocol):
    """What the driver needs to know."""

    vocab_size: int
    end_of_text: int
    described: str
    """For the line that says what a run does."""
    facts: dict[str, Any]
    """For the summary."""
    settings: dict[str, Any]
    """What the weights of a run depend on."""

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        """A scalar with a gradient."""

    def count(self, batch: Tensor) -> Tensor | int:
        """How many tokens of a batch, or a part of one, the loss is the mean of."""

    def check(self, model: PreTrainedModel) -> None:
        """Raise ValueError where the model does not fit."""

    def batches(self, device: torch.device) -> Tensor | Callable[[int], Tensor]:
        """For `optimise`."""

    def drawn(self, steps: int) -> dict[str, Any]:
        """For the summary: what the first `steps` trained on."""

    def validate(self, model: PreTrainedModel) -> float:
        """Validation loss while the run goes on."""

    def sample(self) -> Tensor:
        """Tokens [1, T] of one sequence to validate on, for a look inside the model."""

    def scores(self, model: PreTrainedModel, summary: dict[str, Any]) -> list[Score]:
        """Scores of the trained model, printed; what else there is goes into the summary."""

    def save(self, folder: Path) -> None:
        """What belongs beside the model."""


class TextMaterial:
    """Text in tokens; the last part of it, or other files, to validate on."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        bad = BadRecords(config.max_bad_records)
        folder = config.init or config.tokenizer
        known = None if folder is None else load_tokenizer(folder)
        train_sources, valid_sources = _sources(config, known, bad)
        self.tokenizer = known or _new_tokenizer(config, train_sources, valid_sources)
        self.vocab_size, self.end_of_text = vocabulary_size(self.tokenizer), end_of_text_id(self.tokenizer)
        streams = [self._stream(source) for source in train_sources]
        self.mixture = Mixture(streams, config.data_weights, config, once=config.sampling == "epochs")
        self.valid = [encode_source(source, self.tokenizer) for source in valid_sources]
        for text in self.valid:
            if config.eval_context is not None and len(text.ids) < config.eval_context:
                raise OptionError(
                    "The validation text {name} has {tokens} tokens, fewer than {eval_context} {context}; give more "
                    "text or a shorter context.",
                    name=text.name,
                    tokens=len(text.ids),
                    context=config.eval_context,
                )
        tokens = len(self.mixture.ids)
        self.described = f"{tokens:,} tokens of text ({self._plan()})"
        if bad.told:
            print(bad.report())
        self.facts = {"text_tokens": tokens, "bad_records": bad.told}
        digest = self.mixture.ids.digest(verify=config.verify_data)
        self.settings = {"--data (SHA-256 of its tokens)": digest}
        self._loss: Loss | None = None

    def _stream(self, source: Source) -> Stream:
        if isinstance(source, Tokens):
            source.check(self.tokenizer, verify=self.config.verify_data)
            return Stream(source.name, source.ids)
        return Stream(source.name, Ids.of(source.tokens(self.tokenizer)))

    def _plan(self) -> str:
        """Which share each source is to have, and how often it is read for that."""
        total = self.config.total_steps * self.config.tokens_per_step
        if len(self.mixture.streams) == 1:
            return f"{total / len(self.mixture.ids):.2f} epochs"
        return ", ".join(
            f"{stream.name} {share:.1%}, {share * total / length:.2f} epochs"
            for stream, share, length in zip(
                self.mixture.streams, self.mixture.shares, self.mixture.lengths, strict=True
            )
        )

    def loss(self, model: nn.Module, crop_BL: Tensor) -> Tensor:
        return next_token_loss(model, crop_BL) if self._loss is None else self._loss(model, crop_BL)

    def count(self, crop_BL: Tensor) -> int:
        return predicted_tokens(crop_BL)

    def check(self, model: PreTrainedModel) -> None:
        if self.config.reset_at_documents:
            self._loss = document_loss(self.end_of_text, together=all_linear(model))
        largest = [("the training text", self.mixture.ids.largest(verify=self.config.verify_data))]
        for name, id_ in (*largest, *((text.name, int(text.ids.max())) for text in self.valid)):
            check_ids(model, [id_], f"The tokens of {name}")

    def batches(self, device: torch.device) -> Tensor | Callable[[int], Tensor]:
        if self.config.carry_state:
            return text_in_order(torch.from_numpy(self.mixture.ids.read()).to(device), self.config)
        if self.mixture.in_memory is not None:
            return torch.from_numpy(self.mixture.in_memory).to(device)
        if device.type != "cuda":
            return self.mixture
        if self.mixture.is_one_row and len(self.mixture.ids) <= _ON_GPU:  # a batch then costs no copy
            return torch.from_numpy(self.mixture.ids.read()).to(device)
        return lambda batch: self.mixture(batch).pin_memory().to(device, non_blocking=True)

    def drawn(self, steps: int) -> dict[str, Any]:
        if self.config.carry_state:  # all of the text in its order
            return {}
        return {"data": [asdict(source) for source in self.mixture.drawn(steps)]}

    def validate(self, model: PreTrainedModel) -> float:
        return mean_score(self._score(model, self.config.seq_len)).loss

    def sample(self) -> Tensor:
        ids_N = self.valid[0].ids[: min(self.config.seq_len, _SAMPLED) - 1]
        return torch.from_numpy(np.concatenate([[first_id(self.tokenizer)], ids_N]).astype(np.int64))[None]

    def scores(self, model: PreTrainedModel, summary: dict[str, Any]) -> list[Score]:
        scores = self._score(model, self.config.seq_len)
        print(table(scores))
        context = self.config.eval_context
        if context is not None:
            by_position = self._score(model, context, by_position=True)
            summary["by_position"] = [asdict(bin_) for bin_ in mean_score(by_position).positions]
            note = beyond_the_model(model, context)
            print("\n" + position_table(by_position) + (f"\n{note}" if note else "") + "\n")
        return scores

    def _score(self, model: PreTrainedModel, seq_len: int, *, by_position: bool = False) -> list[Score]:
        return [
            score(
                model,
                text,
                first=first_id(self.tokenizer),
                seq_len=seq_len,
                batch_size=self.config.batch_size,
                dtype=self.config.dtype,
                by_position=by_position,
                reset_at=self.end_of_text if self.config.reset_at_documents else None,
            )
            for text in self.valid
        ]

    def save(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)


class TaskMaterial:
    """Multi-query associative recall, new sequences for every batch; scored by pairs, gap and distance."""

    end_of_text = 0  # no key and no value, but noise

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.vocab_size = config.vocab_size or DEFAULT_VOCAB_SIZE
        pairs, gaps = config.pairs or DEFAULT_PAIRS, config.gaps or (0,)
        self.cells = training_cells(pairs, gaps, length=config.seq_len, vocab_size=self.vocab_size)
        self.described = f"{config.task} of {', '.join(map(str, pairs))} pairs"
        self.facts = {"task": config.task}
        self.settings: dict[str, Any] = {}

    def loss(self, model: nn.Module, both_2BT: Tensor) -> Tensor:
        """Mean cross-entropy in nats of the answers alone, 0 without any. both_2BT: ids and targets, IGNORE where
        nothing is asked."""
        ids_BT, targets_BT = both_2BT
        logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
        logits, targets = logits_BTV.float().flatten(0, 1), targets_BT.flatten()
        nats = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
        return nats / self.count(both_2BT).clamp_min(1)

    def count(self, both_2BT: Tensor) -> Tensor:
        return (both_2BT[1] != IGNORE).sum()

    def check(self, model: PreTrainedModel) -> None:
        """The vocabulary is the model's."""

    def batches(self, device: torch.device) -> Callable[[int], Tensor]:
        cells = [(cell.pairs or 0, cell.gap or 0) for cell in self.cells]

        def batch(number: int) -> Tensor:
            rng = np.random.default_rng([self.config.seed, number])
            asked = mqar(
                rng,
                rows=self.config.batch_size,
                length=self.config.seq_len,
                vocab_size=self.vocab_size,
                cells=cells,
            )
            return torch.stack([asked.ids_BT, asked.targets_BT]).to(device, non_blocking=True)

        return batch

    def drawn(self, steps: int) -> dict[str, Any]:
        return {}

    def validate(self, model: PreTrainedModel) -> float:
        return figures(join([answers for _, answers in self._answers(model, _VALIDATED)]))["nats"]

    def sample(self) -> Tensor:
        return self._asked(self.cells[0], 1).ids_BT

    def scores(self, model: PreTrainedModel, summary: dict[str, Any]) -> list[Score]:
        records: list[Record] = []
        scores = []
        for cell, (asked, answers) in zip(self.cells, self._answers(model, _SCORED), strict=True):
            records.append(record("", cell, answers, asked.chance))
            loss = records[-1].nats
            scores.append(
                Score(
                    name=cell.name,
                    tokens=records[-1].n,
                    bytes=None,
                    loss=loss,
                    perplexity=float(np.exp(loss)),
                    bits_per_byte=None,
                )
            )
        summary["recall"] = [
            {name: value for name, value in asdict(one).items() if name not in ("model", "depth")} for one in records
        ]
        body = [
            [cell.name, f"{one.n:,}", f"{one.generation:.3f} ± {one.generation_se:.3f}", f"{one.nats:.3f}"]
            for cell, one in zip(self.cells, records, strict=True)
        ]
        print(markdown(["asked", "answers", "right", "nats"], body, numbers_from=1))
        return scores

    def _answers(self, model: PreTrainedModel, rows: int) -> list[tuple[Asked, Answers]]:
        """Of sequences that no training batch has. An answer is one token that nothing feeds back, so the likeliest
        token of the parallel pass is what free generation says."""
        found = []
        for cell in self.cells:
            asked = self._asked(cell, rows)
            size = self.config.batch_size
            found.append((asked, answer_tokens(model, asked, batch_size=size, dtype=self.config.dtype, generate=False)))
        return found

    def _asked(self, cell: Cell, rows: int) -> Asked:
        assert cell.pairs is not None and cell.gap is not None
        return mqar(
            cell.seed(self.config.seed),
            rows=rows,
            length=cell.length,
            vocab_size=self.vocab_size,
            cells=[(cell.pairs, cell.gap)],
        )

    def save(self, folder: Path) -> None:
        """No tokenizer: the model reads ids."""


def material(config: TrainConfig) -> Material:
    return TextMaterial(config) if config.task is None else TaskMaterial(config)


def _sources(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase | None, bad: BadRecords
) -> tuple[list[Source], list[Source]]:
    """What to train and to validate on."""
    check_apart(config.data, config.valid)
    data: list[Source] = []
    for path in config.data:
        if config.token_cache is None or tokenizer is None or holds_tokens(path):
            size = 0 if holds_tokens(path) else sum(file.stat().st_size for file in files_of(path))
            if size > _LARGE:
                print(
                    f"{path} has {size / 1e9:.1f} GB of text, which all goes into memory; --token-cache DIR streams it."
                )
            data.append(read_source(path, config.text_field, bad))
        else:
            data.append(cached_tokens(path, config.token_cache, tokenizer, config.text_field, bad))
    if config.dataset is not None:
        needed = config.total_steps * config.tokens_per_step * _CHARACTERS_PER_TOKEN
        data.append(read_dataset(config.dataset, config.text_field, characters=needed, bad=bad))
    return split_validation(data or read_sources(()), config.valid, config.text_field, bad)


def _new_tokenizer(config: TrainConfig, data: list[Source], valid: list[Source]) -> PreTrainedTokenizerBase:
    for source in (*data, *valid):
        if not isinstance(source, Text):
            raise OptionError(
                "{name} holds tokens; name the folder of their tokenizer with {tokenizer} DIR.", name=source.name
            )
    documents = (document for source in data if isinstance(source, Text) for document in source.documents)
    return train_tokenizer(documents, config.vocab_size or DEFAULT_VOCAB_SIZE)
