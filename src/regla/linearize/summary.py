"""`linearize.json`: what a conversion was told, found and scored. What it holds need not be computed again."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regla.eval.perplexity import Score, mean_score
from regla.linearize.card import model_card
from regla.linearize.config import LinearizeConfig
from regla.report.tables import plain
from regla.runtime.files import write_json, write_text
from regla.runtime.versions import device_name, versions

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SUMMARY = "linearize.json"


def new_summary(config: LinearizeConfig, *, texts: str, device: torch.device, origin: dict[str, Any]) -> dict[str, Any]:
    """What is known before anything is computed. `scores` will be by state of the model ("original", "converted",
    "trained"), a row for each validation text.

    Args:
        config: the arguments of the conversion.
        texts: hash of all tokens, so that figures are reused for the same texts alone.
        device: where it is computed.
        origin: what `regla.linearize.origin.origin_of` says of the original.
    """
    return {
        "arguments": asdict(config),
        "origin": origin,
        "texts": texts,
        "stages": {},
        "scores": {},
        "device": device_name(device),
        "versions": versions(),
    }


def read_summary(out: str | Path) -> dict[str, Any]:
    """What `linearize.json` in the folder holds; empty where it is missing or damaged."""
    try:
        summary = json.loads((Path(out) / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    parts = ("arguments", "stages", "scores")
    whole = isinstance(summary, dict) and all(isinstance(summary.get(part), dict) for part in parts)
    return summary if whole else {}


def write_summary(out: Path, summary: dict[str, Any]) -> None:
    """Written last of all: a summary with the scores of the trained model says that everything is there."""
    write_json(out / SUMMARY, summary)


def save(out: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, summary: dict[str, Any]) -> None:
    """Weights, config, generation config, tokenizer with its chat template, model card and summary."""
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    write_text(out / "README.md", model_card(summary))
    write_summary(out, summary)


def finished(summary: dict[str, Any]) -> bool:
    return "trained" in summary.get("scores", {})


def score_table(scores: dict[str, list[dict[str, Any]]]) -> str:
    """Perplexity by source (rows) and state of the model (columns), from the scores of a summary."""
    found = {state: [Score(**row | {"positions": ()}) for row in rows] for state, rows in scores.items()}
    if len(next(iter(found.values()))) > 1:
        found = {state: [*rows, mean_score(rows)] for state, rows in found.items()}
    body = [
        [of_source[0].name, *(f"{row.perplexity:.2f}" for row in of_source)]
        for of_source in zip(*found.values(), strict=True)
    ]
    return plain(["perplexity", *found], body)


def divergence_line(rows: dict[str, dict[str, Any]]) -> str:
    """KL of the original's predictions to those of each state of the model."""
    parts = [f"{state} {row['mean']:.4f} ± {row['se']:.4f}" for state, row in rows.items()]
    return f"KL to the original, nats per token: {', '.join(parts)}"
