"""Tables: how all of them are laid out, and those of measured rows (JSON lines of `regla.bench.rows`)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

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


def data_table(rows: Sequence[Row]) -> str:
    """Peak memory over the size of text or tokens."""
    header = ["", "size", "tokens", "peak memory", "beyond"]
    body = [
        [
            row["subject"],
            f"{row['bytes'] / 1e9:g} GB",
            f"{row['tokens'] / 1e6:,.0f}M",
            f"{row['peak_bytes'] / 2**20:,.0f} MiB",
            f"{row['beyond_bytes'] / 2**20:,.0f} MiB",
        ]
        for row in rows
    ]
    return markdown(header, body, numbers_from=1) + "\n\n" + ran_on(rows)


def scores_table(rows: Sequence[Row]) -> str:
    """Conversions: perplexity per source of the original, right after conversion, and after training."""
    sources = [source["name"] for source in rows[0]["scores"]["original"]]
    names = [name.removeprefix("valid_").rpartition("_")[0] or name for name in sources]
    header = ["model", "linear layers", "training", *names]
    body = []
    for row in rows:
        arguments, scores = row["arguments"], row["scores"]
        stages = row["stages"].values()
        steps = sum(stage["steps"] for stage in stages)
        step = arguments["batch_size"] * arguments["seq_len"]  # of stages whose tokens are not on record
        tokens = sum(stage.get("tokens", stage["steps"] * step) for stage in stages)
        for stage, linear, training in (
            ("original", "0", "-"),
            ("converted", str(len(row["linear_layers"])), "none"),
            ("trained", str(len(row["linear_layers"])), f"{steps} steps, {tokens / 1e6:.1f}M tokens"),
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


def plain(header: Sequence[str], body: Sequence[Sequence[str]], *, numbers_from: int = 1) -> str:
    """A table for the terminal; columns from `numbers_from` on are set to the right."""
    rows = [header, *body]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column >= numbers_from else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def ran_on(rows: Sequence[Row]) -> str:
    """One line: hardware and versions, each kind once, with its commits and dates."""
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        threads = f", {row['threads']} threads" if "threads" in row else ""
        kinds.setdefault(f"{row['device']}{threads}, torch {row.get('versions', row)['torch']}", []).append(row)
    return "Measured on " + "; ".join(f"{kind}, {_commits(of_kind)}" for kind, of_kind in kinds.items()) + "."


def _commits(rows: Sequence[Row]) -> str:
    """Of an installed package no commit is known; its version is named."""
    commits = list(dict.fromkeys(row["commit"] for row in rows if row["commit"] is not None))
    others = list(dict.fromkeys(f"regla {row['regla']}" for row in rows if row["commit"] is None and "regla" in row))
    dates = sorted({row["date"] for row in rows})
    words = [f"commit{'s' if len(commits) > 1 else ''} {', '.join(commits)}"] if commits else []
    return ", ".join([*words, *others, dates[0]]) + (f" to {dates[-1]}" if len(dates) > 1 else "")
