"""`regla eval MODEL [MODEL ...] --probes ...`: ask, keep a record of every cell, and show models side by side."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from regla.data.records import TEXT_FIELD
from regla.data.selection import read_sources, split_validation
from regla.data.sources import encode_source
from regla.data.tokenizer import first_id, load_tokenizer, vocabulary_size
from regla.eval.perplexity import beyond_the_model
from regla.eval.probes.run import PROBES, TEXT_PROBES, Cell, Plan, Record, run_cell
from regla.eval.probes.text import Haystack
from regla.models.folders import load_model
from regla.report.plots import plot_shares
from regla.report.tables import markdown
from regla.runtime.device import pick_device
from regla.runtime.errors import OptionError
from regla.runtime.files import alone_in, write_json, write_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS, PAGE, TABLE, SUMMARY, PLOT = "probes.jsonl", "probes.md", "probes.csv", "probes.json", "probes.png"


def probe(
    models: Sequence[str],
    plan: Plan,
    *,
    data: Sequence[str] = (),
    text_field: str = TEXT_FIELD,
    out: str | Path | None = None,
    batch_size: int = 16,
    device: str = "auto",
    dtype: str = "float32",
) -> list[Record]:
    """Ask every model everything in `plan`; print a table, and write OUT/probes.md, .csv, .json and .png.

    A record is kept in OUT/probes.jsonl as soon as its cell is done, and the same command goes on from there.

    Args:
        models: folders, .gguf files or names on the hub.
        data: text to hide facts in; by default the embedded text.
        batch_size: sequences in token ids at a time.

    Raises:
        ValueError: whatever can be wrong with the input; a model without a tokenizer, where the probe is of text.
    """
    if len(set(models)) < len(models):
        raise OptionError("A model is named twice; name each once.")
    cells = list(plan.cells())
    where = pick_device(device)
    if out is None:
        return _show(plan, list(_records(models, plan, cells, data, text_field, batch_size, where, dtype, None)), None)
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(
            "{folder} cannot be created ({reason}); give {out} a place you may write to.",
            folder=out,
            reason=error.strerror,
        ) from error
    with alone_in(out, "evaluation"):
        file = Path(out) / ROWS
        return _show(
            plan, list(_records(models, plan, cells, data, text_field, batch_size, where, dtype, file)), Path(out)
        )


def _records(
    models: Sequence[str],
    plan: Plan,
    cells: Sequence[Cell],
    data: Sequence[str],
    text_field: str,
    batch_size: int,
    device: Any,
    dtype: str,
    file: Path | None,
) -> Any:
    sources = []
    if any(cell.probe in TEXT_PROBES for cell in cells):
        sources = read_sources(data, text_field) if data else split_validation(read_sources([]))[1]
    done = _read(file)
    with tqdm(total=len(models) * len(cells), unit="cell", desc="probes", mininterval=1) as bar:
        for name in models:
            model = load_model(name, device)
            haystack, vocab_size = _haystack(name, model, sources)
            for cell in cells:
                asked = {"dtype": dtype, "limit": plan.limit, "seed": plan.seed, "text": _digest(haystack, cell)}
                key = _key(asked | {"model": name} | asdict(cell))
                if key not in done:
                    found = run_cell(
                        model,
                        name,
                        cell,
                        limit=plan.limit,
                        seed=plan.seed,
                        haystack=haystack,
                        vocab_size=vocab_size,
                        batch_size=batch_size,
                        dtype=dtype,
                    )
                    done[key] = asked | asdict(found)
                    if file is not None:
                        with file.open("a", encoding="utf-8") as stream:
                            stream.write(json.dumps(done[key]) + "\n")
                yield _record(done[key])
                bar.update()
            note = beyond_the_model(model, max(cell.length for cell in cells))
            if note is not None:
                print(f"{name}: {note}")


def _haystack(name: str, model: PreTrainedModel, sources: Sequence[Any]) -> tuple[Haystack | None, int]:
    """The text in the model's tokens, and the ids that it may be asked in."""
    rows = int(model.get_input_embeddings().weight.shape[0])
    try:
        tokenizer = load_tokenizer(name)
    except ValueError as error:
        if sources:
            probes = ", ".join(TEXT_PROBES)
            raise ValueError(
                f"{name} has no tokenizer, which probes of text ({probes}) need: {error} Probes in token ids "
                f"({', '.join(one for one in PROBES if one not in TEXT_PROBES)}) need none."
            ) from error
        return None, rows
    if not sources:
        return None, min(rows, vocabulary_size(tokenizer))
    ids_N = np.concatenate([encode_source(source, tokenizer).ids for source in sources])
    return Haystack(tokenizer, ids_N, first_id(tokenizer)), min(rows, vocabulary_size(tokenizer))


def _digest(haystack: Haystack | None, cell: Cell) -> str | None:
    if haystack is None or cell.probe not in TEXT_PROBES:
        return None
    return hashlib.sha256(haystack.ids_N.tobytes()).hexdigest()[:12]


_ASKED = ("dtype", "limit", "seed", "text")


def _key(row: dict[str, Any]) -> str:
    return json.dumps([row[name] for name in (*_ASKED, "model", *Cell.__dataclass_fields__)])


def _read(file: Path | None) -> dict[str, dict[str, Any]]:
    """Records that are there; a last line that was cut short is left out, and written over."""
    if file is None or not file.is_file():
        return {}
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        write_text(file, "".join(lines[:-1]))
        lines = lines[:-1]
    try:
        rows = [json.loads(line) for line in lines]
        return {_key(row): row for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise OptionError("{file} holds no records of probes; give {out} another folder.", file=file) from error


def _record(row: dict[str, Any]) -> Record:
    fields = {name: value for name, value in row.items() if name not in _ASKED}
    return Record(**fields | {"by_distance": tuple(fields["by_distance"])})


def _show(plan: Plan, records: list[Record], out: Path | None) -> list[Record]:
    text = page(plan, records)
    print(text.partition("\n\n")[2])
    if out is not None:
        write_text(out / PAGE, text)
        write_text(out / TABLE, _csv(records))
        write_json(out / SUMMARY, {"plan": asdict(plan), "records": [asdict(record) for record in records]})
        plot_shares(panels(records), out / PLOT, title="Probes: answers by free generation")
        print(f"Written to {out}: {PAGE}, {TABLE}, {SUMMARY}, {PLOT}.")
    return records


def page(plan: Plan, records: Sequence[Record]) -> str:
    """Markdown: a table of every probe, models side by side, and mqar by distance."""
    names = short_names([record.model for record in records])
    parts = [
        "# Probes of memory",
        f"Seed {plan.seed}. A cell holds the share of right answers by likelihood (of the candidates) / by free "
        "generation (greedy, of the whole vocabulary; chance about 0), each with its standard error over sequences.",
    ]
    for kind in dict.fromkeys(record.probe for record in records):
        own = [record for record in records if record.probe == kind]
        header = ["length", "asked", "n", "chance", *names.values()]
        rows: dict[tuple[Any, ...], dict[str, Record]] = {}
        for record in own:
            rows.setdefault((record.length, record.pairs, record.gap, record.depth), {})[record.model] = record
        body = []
        for of_models in rows.values():
            first = next(iter(of_models.values()))
            cell = Cell(**{name: getattr(first, name) for name in Cell.__dataclass_fields__})
            cells = [_cell(of_models.get(model)) for model in names]
            body.append([f"{first.length:,}", cell.name, f"{first.n:,}", f"{first.chance:.2f}", *cells])
        parts += [f"## {kind}: {PROBES[kind]}", markdown(header, body, numbers_from=2)]
        if kind == "mqar":
            parts += ["By distance from value to query, free generation:", _distance_table(own, names)]
    return "\n\n".join(parts) + "\n"


def _cell(record: Record | None) -> str:
    if record is None:
        return "-"
    shares = (record.likelihood, record.likelihood_se), (record.generation, record.generation_se)
    return " / ".join(_with_error(*one) for one in shares)


def _with_error(mean: float, se: float | None) -> str:
    return f"{mean:.2f}" if se is None else f"{mean:.2f} ± {se:.2f}"


def pooled_by_distance(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Bins of several cells together; their sequences are independent, so n se adds in squares."""
    bins: dict[int, list[dict[str, Any]]] = {}
    for record in records:
        for one in record.by_distance:
            bins.setdefault(one["first"], []).append(one)
    found = []
    for first, parts in sorted(bins.items()):
        n = sum(part["n"] for part in parts)
        mean = sum(part["n"] * part["generation"] for part in parts) / n
        errors = [part["n"] * part["generation_se"] for part in parts if part["generation_se"] is not None]
        se = sum(error**2 for error in errors) ** 0.5 / n if len(errors) == len(parts) else None
        found.append({"first": first, "last": parts[0]["last"], "n": n, "generation": mean, "generation_se": se})
    return found


def _distance_table(records: Sequence[Record], names: dict[str, str]) -> str:
    pooled = {model: pooled_by_distance([one for one in records if one.model == model]) for model in names}
    bins = sorted({(one["first"], one["last"]) for ones in pooled.values() for one in ones})
    body = []
    for first, last in bins:
        own = {model: next((one for one in ones if one["first"] == first), None) for model, ones in pooled.items()}
        n = max(one["n"] for one in own.values() if one is not None)
        cells = [_with_error(one["generation"], one["generation_se"]) if one else "-" for one in own.values()]
        body.append([f"{first}-{last}", f"{n:,}", *cells])
    return markdown(["distance", "n", *names.values()], body)


def panels(records: Sequence[Record]) -> dict[str, dict[str, list[tuple[float, float, float]]]]:
    """(x, share, standard error) by probe and model; x is what the cells differ in most, the rest is pooled."""
    names = short_names([record.model for record in records])
    found: dict[str, dict[str, list[tuple[float, float, float]]]] = {}
    for kind in dict.fromkeys(record.probe for record in records):
        own = [record for record in records if record.probe == kind]
        axes = {axis: {getattr(record, axis) for record in own} for axis in ("length", "pairs", "gap", "depth")}
        axis = max(axes, key=lambda name: len(axes[name]))
        curves: dict[str, list[tuple[float, float, float]]] = {}
        for model, name in names.items():
            points = []
            for x in sorted(axes[axis]):
                at = [record for record in own if record.model == model and getattr(record, axis) == x]
                if at:
                    points.append((x, *pooled(at)[:2]))
            curves[name] = points
        found[f"{kind}, by {axis}"] = curves
    return found


def pooled(records: Sequence[Record]) -> tuple[float, float, int]:
    """Answers by free generation in several cells together, whose sequences are independent: the share of right ones,
    its standard error, and their number."""
    n = sum(record.n for record in records)
    mean = sum(record.n * record.generation for record in records) / n
    return mean, sum((record.n * record.generation_se) ** 2 for record in records) ** 0.5 / n, n


def short_names(models: Sequence[str]) -> dict[str, str]:
    """Models by the shortest end of their path that tells them apart."""
    models = list(dict.fromkeys(models))
    parts = {model: Path(model).parts or (model,) for model in models}
    for depth in range(1, max(len(one) for one in parts.values()) + 1):
        short = {model: "/".join(one[-depth:]) for model, one in parts.items()}
        if len(set(short.values())) == len(models):
            return short
    return {model: model for model in models}


def _csv(records: Sequence[Record]) -> str:
    stream = io.StringIO()
    names = [name for name in Record.__dataclass_fields__ if name != "by_distance"]
    writer = csv.DictWriter(stream, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(record) for record in records)
    return stream.getvalue()
