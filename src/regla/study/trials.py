"""Trials: the runs of a study, each checked before any of them starts, and named after all its result depends on."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regla.runtime.options import with_effect
from regla.study.data import StudyData
from regla.study.grid import Study, Variant, in_order
from regla.train.config import DEFAULT_PAIRS, DEFAULT_VOCAB_SIZE, TrainConfig

if TYPE_CHECKING:
    from regla.models.configuration import ReGLAConfig


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run. `config.out` is its model's folder."""

    id: str
    variant: Variant
    lr: float
    seed: int
    config: TrainConfig
    row: dict[str, Any]
    """What is known of its row before it runs."""

    @property
    def name(self) -> str:
        return f"{self.variant.name} lr {self.lr:g} seed {self.seed}"

    @property
    def tokens(self) -> int:
        return self.config.total_steps * self.config.tokens_per_step


@dataclass(frozen=True, kw_only=True)
class Size:
    """What a variant costs."""

    parameters: int
    steps: int
    tokens: int


def check_variants(
    study: Study, variants: Sequence[Variant], *, vocab_size: int | None, end_of_text: int = 0
) -> tuple[dict[str, Size], dict[str, dict[str, Any]]]:
    """Size and resolved ReGLAConfig of each variant, by its name.

    vocab_size: None where the tokenizer is not there yet; the one to train is then taken at its full size.
    Raises ValueError, naming the variant, where a configuration does not fit.
    """
    from regla.eval.probes.run import training_cells
    from regla.models.configuration import ReGLAConfig
    from regla.train.model import count_parameters, match_softmax, model_config

    sizes, models = {}, {}
    for variant in variants:
        try:
            config = _train_config(variant, lr=study.lrs[0], seed=study.seeds[0])
            vocabulary = vocab_size or study.vocab_size or DEFAULT_VOCAB_SIZE
            if config.task is not None:
                training_cells(
                    config.pairs or DEFAULT_PAIRS, config.gaps or (0,), length=config.seq_len, vocab_size=vocabulary
                )
            model, _ = match_softmax(model_config(config, vocab_size=vocabulary, end_of_text=end_of_text))
        except ValueError as error:
            raise ValueError(f"The variant {variant.name} does not fit: {error}") from error
        sizes[variant.name] = Size(
            parameters=count_parameters(model),
            steps=config.total_steps,
            tokens=config.total_steps * config.tokens_per_step,
        )
        models[variant.name] = {name: getattr(model, name) for name in ReGLAConfig.__annotations__}
        for option in _without_effect(model):  # so that runs of before the option stay the same runs
            del models[variant.name][option]
        if not _gates_an_axis(model):  # so that another default does not make it another run
            models[variant.name]["gate_axis"] = None
    return sizes, models


def _without_effect(model: ReGLAConfig) -> list[str]:
    """Options that came later than others and that this model does not use."""
    unused = [] if model.window_branch else ["window_branch", "window_sinks", "window_dropout"]
    return unused if model.feature_dim is not None else [*unused, "feature_dim"]


def _gates_an_axis(model: ReGLAConfig) -> bool:
    """Whether the result depends on `gate_axis`."""
    from regla.layers.gates import GATES

    return "linear_attention" in (model.layer_types or ()) and GATES[model.gate].has_axis


def make_trials(study: Study, data: StudyData, *, out: str | Path, device: str) -> list[Trial]:
    """All trials of the study in the order to train them."""
    _, models = check_variants(study, study.variants, vocab_size=data.vocab_size, end_of_text=data.end_of_text)
    trials = []
    for variant, lr, seed in in_order(study):
        config = replace(
            _train_config(variant, lr=lr, seed=seed),
            data=data.data,
            valid=data.valid,
            tokenizer=data.tokenizer,
            vocab_size=data.vocab_size if data.tokenizer is None else None,
            device=device,
            resume="latest",
        )
        if config.task is None and data.tokens <= config.seq_len:
            raise ValueError(
                f"The training text has {data.tokens} tokens, expected more than the seq_len {config.seq_len} of the "
                f"variant {variant.name}; give more text or a smaller seq_len."
            )
        settings = with_effect(config)
        if not settings["carry_state"]:  # rows from before there was the option are of the same runs
            del settings["carry_state"]
        del settings["vocab_size"]  # the tokenizer is there, and counts by its tokens and the size of the model
        row = {
            "benchmark": "study",
            "study": study.name,
            "title": study.title,
            "variant": dict(variant.choices),
            "lr": lr,
            "seed": seed,
            "config": settings | {"compile": config.compile},
            "model": models[variant.name],
            "data": [Path(file).name for file in data.data],
            "text_tokens": data.tokens,
            "data_digest": data.digest[:12],
            "files": list(data.options),
            "set": list(study.sets),
        }
        if study.rates:
            row["rates"] = sorted(study.lrs)  # of which the sweep chose this one
        row |= study.measured
        what = [settings, models[variant.name], data.digest, *study.measured.values()]
        result_of = json.dumps(what, sort_keys=True)
        digest = hashlib.sha256(result_of.encode()).hexdigest()[:8]
        name = re.sub(r"[^\w.+-]+", "-", variant.name).strip("-")
        trial = f"{name}-lr{lr:g}-seed{seed}-{digest}"
        folder = Path(out) / "runs" / trial
        trials.append(
            Trial(
                id=trial,
                variant=variant,
                lr=lr,
                seed=seed,
                config=replace(config, out=str(folder / "model")),
                row={"id": trial} | row,
            )
        )
    return trials


def _train_config(variant: Variant, *, lr: float, seed: int) -> TrainConfig:
    settings: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in variant.settings.items()
        if name != "vocab_size"
    }
    return TrainConfig(**settings, out="-", lr=lr, seed=seed)
