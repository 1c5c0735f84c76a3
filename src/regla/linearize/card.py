"""The model card of a converted model: what was done and what it scored, from the run's summary."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

_STATES = {"original": "original", "converted": "after conversion", "trained": "after training"}


def model_card(summary: dict[str, Any]) -> str:
    """Markdown with Hugging Face's front matter, from what `regla.linearize.driver.linearize` returns."""
    arguments = summary["arguments"]
    # A path on one machine says nothing on another.
    local = Path(arguments["model"]).exists()
    model = Path(arguments["model"]).name if local else arguments["model"]
    linear = summary["linear_layers"]
    front = ["---", "library_name: transformers", "tags:", "- regla", "- linear-attention"]
    front += [] if local else [f"base_model: {model}"]
    lines = [
        *front,
        "---",
        "",
        f"# {model}, with ReGLA in {len(linear)} layers",
        "",
        f"Converted from the softmax model `{model}` with regla {summary['versions']['regla']}. Layers "
        f"{', '.join(map(str, linear))} (counted from 0) are gated linear attention with a refined gate "
        "(ReGLA, arXiv 2502.01578): their memory does not grow with the text. "
        f"The model has {summary['parameters']:,} parameters.",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer  # with `regla` installed",
        "",
        'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER", trust_remote_code=True)',
        'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")',
        "```",
        "",
        "## What was done",
        "",
        f"    {_command(arguments, model)}",
        "",
        "1. The weights moved over. Softmax attention through them reproduces the original's logits to "
        f"{summary['transfer_error']:.1e} of the largest.",
        "2. Queries and keys were centred and scaled for the exponential feature map, and the output norms to the "
        "original's output, on a few thousand tokens (figures below).",
    ]
    for number, (stage, row) in enumerate(summary["stages"].items(), start=3):
        lines.append(
            f"{number}. {stage.capitalize()}: {row['steps']:,} steps of {arguments['batch_size']} x "
            f"{arguments['seq_len']} tokens in {row['seconds']:.0f} s, loss {row['first_loss']:.3f} to "
            f"{row['last_loss']:.3f}."
        )
    if not summary["stages"]:
        lines.append("3. It was not trained: its gates are as they were initialised.")
    return "\n".join([*lines, "", *_scores(summary), "", *_calibration(summary), "", *_versions(summary)]) + "\n"


def _command(arguments: dict[str, Any], model: str) -> str:
    """The command that made the model; files by their names."""
    words = ["regla", "linearize", model]
    for name, value in arguments.items():
        if name in ("model", "dry_run") or value in (None, False, (), []):
            continue
        words.append("--" + name.replace("_", "-"))
        if name in ("data", "valid"):
            words += [Path(file).name for file in value]
        elif value is not True:
            words.append(Path(value).name if name == "out" else str(value))
    return shlex.join(words)


def _scores(summary: dict[str, Any]) -> list[str]:
    scores = summary["scores"]
    arguments = summary["arguments"]
    lines = [
        "## Validation perplexity",
        "",
        f"Windows of {arguments['seq_len']} tokens, at most {arguments['valid_tokens']:,} of each source, "
        f"{arguments['dtype']}.",
        "",
        "| source | tokens | " + " | ".join(_STATES[state] for state in scores) + " |",
        "| --- | ---: |" + " ---: |" * len(scores),
    ]
    for rows in zip(*scores.values(), strict=True):
        figures = " | ".join(f"{row['perplexity']:.2f}" for row in rows)
        lines.append(f"| {Path(rows[0]['name']).name} | {rows[0]['tokens']:,} | {figures} |")
    return lines


def _calibration(summary: dict[str, Any]) -> list[str]:
    lines = [
        "## Calibration",
        "",
        "Effective key features of the worst head (exp of the entropy of the mean feature distribution) of "
        f"{summary['calibration'][0]['channels'] if summary['calibration'] else 0}, and KL of softmax attention to "
        "ungated linear attention, before any training, on tokens that the calibration did not see.",
        "",
        "| layer | features before | after | KL before | after | uniform attention | contract |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in summary["calibration"]:
        lines.append(
            f"| {row['layer']} | {row['features_before']:.1f} | {row['features_after']:.1f} | {row['kl_before']:.2f} | "
            f"{row['kl_after']:.2f} | {row['kl_uniform']:.2f} | {'holds' if row['holds'] else 'fails'} |"
        )
    return lines


def _versions(summary: dict[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    return ["## Versions", "", f"{versions}; {summary['device']}."]
