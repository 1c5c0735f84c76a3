"""Markdown tables from measured rows (JSON objects, one a line, as `regla.bench.rows` writes them)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_MIXERS = {"regla": "ReGLA", "hybrid": "hybrid", "softmax": "softmax", "window": "window"}

Row = dict[str, Any]


def read_rows(file: str | Path, benchmark: str) -> list[Row]:
    """The rows of one benchmark in a .jsonl file, in the file's order; ValueError where there are none."""
    lines = Path(file).read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["benchmark"] == benchmark]
    if not rows:
        raise ValueError(f"{file} has no rows of the benchmark {benchmark!r}; run it and commit what it writes.")
    return rows


def latest(table: Callable[[Sequence[Row]], str]) -> Callable[[Sequence[Row]], str]:
    """`table` of the rows alone that were measured on the last row's commit: what the code does now."""
    return lambda rows: table([row for row in rows if row["commit"] == rows[-1]["commit"]])


def training_table(rows: Sequence[Row]) -> str:
    """Runs of `regla train` that differ in mixer, learning rate and start; perplexity per source and of the mean loss.

    `start` is initializer_range, the standard deviation of the initial weights, where a run overrode the default;
    `options` are what else it overrode.
    """
    sources = [source["name"] for source in rows[0]["validation"]]
    names = [name.removeprefix("valid_").rpartition("_")[0] or name for name in sources]
    header = [
        "mixer",
        "peak lr",
        "start",
        "options",
        "parameters",
        "tokens",
        *names,
        "all three" if len(names) == 3 else "all",
        "tokens/s",
    ]
    body = []
    for row in rows:
        arguments = row["arguments"]
        options = {name: value for name, value in arguments["overrides"].items() if name != "initializer_range"}
        body.append(
            [
                _MIXERS[arguments["mixer"]],
                f"{arguments['lr']:g}",
                str(arguments["overrides"].get("initializer_range", "default")),
                ", ".join(f"{name} {value}" for name, value in options.items()) or "-",
                f"{row['parameters'] / 1e6:.2f}M",
                f"{row['tokens'] / 1e6:.1f}M",
                *(f"{source['perplexity']:.1f}" for source in row["validation"]),
                f"{row['validation_perplexity']:.1f}",
                f"{row['tokens_per_second'] / 1e3:,.0f}k",
            ]
        )
    return markdown(header, body, numbers_from=1) + "\n\n" + ran_on(rows)


def forms_table(rows: Sequence[Row]) -> str:
    """Every backend against the recurrence."""
    header = ["operation", "backend", "B, T, H, K, V", "time", "recurrence", "ratio"]
    body = [
        [
            f"`{row['operation']}`",
            f"`{row['backend']}`",
            ", ".join(str(row["shape"][key]) for key in "BTHKV"),
            f"{row['seconds'] * 1e3:,.0f} ms",
            f"{row['recurrent_seconds'] * 1e3:,.0f} ms",
            f"{row['ratio']:.1f}",
        ]
        for row in rows
    ]
    return markdown(header, body, numbers_from=2) + "\n\n" + ran_on(rows)


def decode_table(rows: Sequence[Row]) -> str:
    """Cost of one more token at two positions."""
    header = ["tokens before", "time per token", "against the first row", "cache"]
    body = [
        [
            f"{row['position']:,}",
            f"{row['seconds_per_token'] * 1e3:.2f} ms",
            f"{row['ratio_to_early']:.3f}",
            f"{row['cache_bytes'] / 1024:,.0f} KiB",
        ]
        for row in rows
    ]
    return markdown(header, body) + "\n\n" + ran_on(rows)


def memory_table(rows: Sequence[Row]) -> str:
    """Peak memory of a forward pass over its length."""
    header = ["tokens", "peak memory", "per token"]
    body = [
        [f"{row['T']:,}", f"{row['peak_bytes'] / 2**20:,.0f} MiB", f"{row['peak_bytes'] / row['T'] / 1024:.1f} KiB"]
        for row in rows
    ]
    return markdown(header, body) + "\n\n" + ran_on(rows)


def scores_table(rows: Sequence[Row]) -> str:
    """Conversions: perplexity per source of the original, right after conversion, and after training."""
    sources = [source["name"] for source in rows[0]["scores"]["original"]]
    names = [name.removeprefix("valid_").rpartition("_")[0] or name for name in sources]
    header = ["model", "linear layers", "training", *names]
    body = []
    for row in rows:
        arguments, scores = row["arguments"], row["scores"]
        tokens = arguments["steps"] * arguments["batch_size"] * arguments["seq_len"]
        for stage, linear, training in (
            ("original", "0", "-"),
            ("converted", str(len(row["linear_layers"])), "none"),
            ("trained", str(len(row["linear_layers"])), f"{arguments['steps']} steps, {tokens / 1e6:.1f}M tokens"),
        ):
            perplexities = [f"{source['perplexity']:.1f}" for source in scores[stage]]
            body.append([f"{arguments['model']}, {stage}", linear, training, *perplexities])
    return markdown(header, body, numbers_from=3) + "\n\n" + ran_on(rows)


def calibration_table(rows: Sequence[Row]) -> str:
    """Conversions: what the pretrained queries and keys make of the exponential feature map, layer by layer."""
    header = ["layer", "features before", "after", "KL before", "after", "uniform"]
    body = [
        [
            str(layer["layer"]),
            f"{layer['features_before']:.1f}",
            f"{layer['features_after']:.1f} of {layer['channels']}",
            f"{layer['kl_before']:.2f}",
            f"{layer['kl_after']:.2f}",
            f"{layer['kl_uniform']:.2f}",
        ]
        for row in rows
        for layer in row["calibration"]
    ]
    return markdown(header, body) + "\n\n" + ran_on(rows)


def markdown(header: Sequence[str], body: Sequence[Sequence[str]], *, numbers_from: int = 0) -> str:
    """A Markdown table; columns from `numbers_from` on are set to the right."""
    rule = ["---:" if index >= numbers_from else "---" for index in range(len(header))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *body))


def ran_on(rows: Sequence[Row]) -> str:
    """Hardware, versions, commit and date of the rows, each kind of them once."""
    kinds = []
    for row in rows:
        versions = row.get("versions", row)
        threads = f", {row['threads']} threads" if "threads" in row else ""
        kind = f"{row['device']}{threads}; torch {versions['torch']}; commit {row['commit']}, {row['date']}"
        if kind not in kinds:
            kinds.append(kind)
    return "Measured on: " + "; and ".join(kinds) + "."
