"""The model card of a converted model: what was done and what it scored, from the run's summary."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from regla.linearize.config import WINDOW
from regla.models.window_attention import SINKS
from regla.runtime.errors import flag
from regla.runtime.install import install_regla

_OF_ONE_RUN = ("dry_run", "resume", "save_every")
_OPTIONS = "mixer.json"
_BRANCH = " Each has softmax attention over the last {} tokens and the first few beside it."
_STATES = {"original": "original", "converted": "after conversion", "trained": "after training"}


def model_card(summary: dict[str, Any]) -> str:
    """Markdown with Hugging Face's front matter, from what `regla.linearize.driver.linearize` returns."""
    arguments = summary["arguments"]
    model = _shown(arguments["model"])
    lines = [
        *_front_matter(summary["origin"]),
        "",
        *_about(summary, model),
        "",
        f"It needs the package `regla` (`{install_regla()}`):",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER", trust_remote_code=True)',
        'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER", trust_remote_code=True)',
        "```",
        "",
        "## What was done",
        "",
        "```sh",
        _command(arguments),
        "```",
        *(["", f"where `{_OPTIONS}` holds `{json.dumps(arguments['overrides'])}`."] if arguments["overrides"] else []),
        "",
        *(f"{number}. {step}" for number, step in enumerate(_steps(summary), 1)),
    ]
    return "\n".join([*lines, "", *_scores(summary), "", *_calibration(summary), *_versions(summary)]) + "\n"


def _about(summary: dict[str, Any], model: str) -> list[str]:
    arguments, linear = summary["arguments"], summary["linear_layers"]
    made = f"Made from the softmax model `{model}` with regla {summary['versions']['regla']}."
    size = f"The model has {summary['parameters']:,} parameters."
    if arguments["mixer"] == "window":
        title = f"{model}, cut to a window"
        what = (
            f"A baseline without training: layers that `--keep` does not name attend to the last "
            f"{arguments['window'] or WINDOW} tokens and the first {SINKS} alone."
        )
    elif not linear:
        title, what = f"{model}, trained further", "Every layer keeps softmax attention: the control of a conversion."
    else:
        title = f"{model}, with ReGLA in {len(linear)} layers"
        what = (
            f"Layers {', '.join(map(str, linear))} (counted from 0) are gated linear attention "
            "(ReGLA, arXiv 2502.01578): their memory does not grow with the text."
            + (_BRANCH.format(arguments["window_branch"]) if arguments.get("window_branch") else "")
        )
    return [f"# {title}", "", f"{made} {what} {size}"]


def _front_matter(origin: dict[str, Any]) -> list[str]:
    known = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        **origin,
        "tags": ["regla", "linear-attention"],
    }
    return ["---", yaml.safe_dump(known, sort_keys=False, allow_unicode=True).rstrip(), "---"]


def _steps(summary: dict[str, Any]) -> Iterator[str]:
    arguments = summary["arguments"]
    if arguments["init"] is not None:
        yield f"The weights are those of `{_shown(arguments['init'])}`, a converted model; the original is the teacher."
    if summary["transfer_error"] is not None:
        yield (
            "The weights moved over. Softmax attention through them reproduces the logits from before to "
            f"{summary['transfer_error']:.1e} of the largest."
        )
        yield (
            "Queries and keys were centred and scaled for the exponential feature map, and gates and output norms set "
            f"from the original's attention, on {arguments['calibration_tokens']:,} tokens (figures below)."
            if summary["calibration"]
            else "Nothing was calibrated."
        )
    for stage, row in summary["stages"].items():
        yield (
            f"{stage.capitalize()}: {row['steps']:,} steps, {row['tokens']:,} tokens in {row['seconds']:.0f} s, "
            f"loss {row['first_loss']:.3f} to {row['last_loss']:.3f}."
        )
    if "layer_choice" in summary:
        kept = ", ".join(map(str, summary["layer_choice"]["kept"]))
        yield f"Layers {kept} were chosen to stay softmax after attention transfer; linearize.json has the ranking."
    if not summary["stages"] and summary["linear_layers"]:
        yield "It was not trained: its gates are as they were initialised."


def _command(arguments: dict[str, Any]) -> str:
    """The command that makes the model anew. Options of a single run, such as --resume, are left out."""
    words = ["regla", "linearize", _shown(arguments["model"])]
    for name, value in arguments.items():
        if name in ("model", *_OF_ONE_RUN) or value is None or value is False or value in ((), [], {}):
            continue
        words.append(flag(name))
        if name in ("data", "valid"):
            words += map(_shown, value)
        elif name == "overrides":
            words.append(_OPTIONS)
        elif value is not True:
            words.append(_shown(value) if name in ("out", "init") else str(value))
    return shlex.join(words)


def _shown(path: str) -> str:
    """A relative path as it is, an absolute one by its last name: the rest says nothing on another machine."""
    return Path(path).name if Path(path).is_absolute() else path


def repeated_by(arguments: dict[str, Any]) -> str:
    """The command that makes a conversion with these arguments anew, without paths of this machine."""
    return _command(arguments)


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
    if not summary["calibration"]:
        return []
    lines = [
        "## Calibration",
        "",
        "Effective key features of the worst head (exp of the entropy of the mean feature distribution) of "
        f"{summary['calibration'][0]['channels']}, and KL of softmax attention to "
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
    return [*lines, ""]


def _versions(summary: dict[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    return ["## Versions", "", f"{versions}; {summary['device']}."]
