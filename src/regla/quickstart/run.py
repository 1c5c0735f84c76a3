"""The whole quickstart: everything it prints is measured while you watch."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from regla.data.embedded import embedded_text
from regla.data.sources import HELD_OUT
from regla.data.tokenizer import load_tokenizer
from regla.eval.generation import generate
from regla.models.folders import load_model
from regla.quickstart.decoding import DecodingCost, decoding_costs, streaming_difference
from regla.quickstart.pretrained import linearize_pretrained
from regla.report.plots import Curve, plot_decoding, plot_losses
from regla.report.tables import plain
from regla.runtime.errors import OptionError, check_count
from regla.runtime.files import alone_in, content_of, new_folder, write_json
from regla.runtime.processes import check_one_process
from regla.train.config import TrainConfig
from regla.train.run import train

RESULT = "quickstart.json"
LOSS_PLOT = "loss.png"
DECODING_PLOT = "decoding.png"
LINEARIZED = "linearized"
_STREAMS = ((256, 1), (2048, 100))  # tokens, tokens of a chunk
_PROMPT = "The following statement"
_NAMES = {"regla": "ReGLA", "hybrid": "hybrid", "softmax": "softmax"}
_TRAINED = tuple(_NAMES)
_COMPARED = ("regla", "softmax")  # in the cost of a generated token


def quickstart(
    *, out: str | Path = "runs/quickstart", steps: int = 250, longest: int = 16384, sample_tokens: int = 60
) -> dict[str, Any]:
    """Train ReGLA, hybrid and softmax models of equal size on equal tokens, compare them, and plot what was found.

    Writes the models, `loss.png`, `decoding.png` and `quickstart.json` to `out`; what an earlier quickstart wrote there
    is replaced, a folder of other content is an error. `longest` is the longest context of the decoding plot, at least
    128. Returns what `quickstart.json` holds.
    """
    check_one_process("quickstart")
    check_count("steps", steps)
    check_count("sample_tokens", sample_tokens)
    if longest < 128:
        raise OptionError("{longest} is {value}, expected at least 128 tokens.", value=longest)
    with _own_folder(Path(out)) as folder:
        return _quickstart(folder, steps=steps, longest=longest, sample_tokens=sample_tokens)


def _quickstart(out: Path, *, steps: int, longest: int, sample_tokens: int) -> dict[str, Any]:
    started = time.perf_counter()
    result: dict[str, Any] = {"models": {}, "streaming": [], "decoding": {}}
    titles = _titles()
    for mixer in _TRAINED:
        print(next(titles))
        result["models"][mixer] = train(TrainConfig(out=str(out / mixer), mixer=mixer, steps=steps, device="cpu"))
    plot_losses({_NAMES[mixer]: read_losses(out / mixer) for mixer in _TRAINED}, out / LOSS_PLOT)
    print("\n" + comparison(result["models"]))
    print("One seed and one learning rate each: a demonstration, no benchmark.")

    print(next(titles))
    regla = load_model(out / "regla", torch.device("cpu"))
    ids_N = embedded_text().hold_out(HELD_OUT)[1].tokens(load_tokenizer(out / "regla"))
    for tokens, chunk in _STREAMS:
        ids_1T = torch.from_numpy(ids_N[:tokens]).long()[None]
        difference = streaming_difference(regla, ids_1T, chunk=chunk)
        result["streaming"].append({"tokens": ids_1T.shape[1], "chunk": chunk, "max_difference": difference})
        pieces = "one token at a time" if chunk == 1 else f"{chunk} tokens at a time"
        print(f"{ids_1T.shape[1]:>6,} tokens, {pieces}: no logit differs by more than {difference:.1e}")

    print(next(titles))
    contexts = [length for length in (2**power for power in range(7, 31)) if length <= longest]
    costs = {mixer: decoding_costs(load_model(out / mixer, torch.device("cpu")), contexts) for mixer in _COMPARED}
    result["decoding"] = {mixer: [asdict(cost) for cost in rows] for mixer, rows in costs.items()}
    plot_decoding(
        {_NAMES[mixer]: [(cost.context, cost.milliseconds) for cost in rows] for mixer, rows in costs.items()},
        {_NAMES[mixer]: [(cost.context, cost.cache_bytes / 1024) for cost in rows] for mixer, rows in costs.items()},
        out / DECODING_PLOT,
        title="One more token, one sequence, CPU, float32",
    )
    print(decoding_table(costs))

    print(next(titles))
    generate(out / "regla", _PROMPT, max_new_tokens=sample_tokens, device="cpu")

    print(next(titles))
    result["linearized"] = linearize_pretrained(out / LINEARIZED, steps=steps)

    result["seconds"] = time.perf_counter() - started
    write_json(out / RESULT, result)
    print(
        f"\nDone in {result['seconds']:.0f} s. Plots: {out / LOSS_PLOT}, {out / DECODING_PLOT}; figures: {out / RESULT}"
    )
    print(f"\nNext:\n{_next_commands(out)}")
    return result


def _titles() -> Iterator[str]:
    """The heading of each part, in order."""
    parts = [
        *(f"Training {_NAMES[mixer]}" for mixer in _TRAINED),
        "Streaming: the same text in one forward pass, and piece by piece through the state",
        "Cost of one more token",
        f"ReGLA goes on from {_PROMPT!r}",
        "Linearizing a pretrained GPT-NeoX that comes with the package",
    ]
    return (f"\n[{number}/{len(parts)}] {part}" for number, part in enumerate(parts, 1))


def read_losses(run: Path) -> Curve:
    """(tokens, loss) of every step in the log of a training run."""
    lines = (run / "log.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [(row["tokens"], row["loss"]) for row in rows if row.get("loss") is not None]


def comparison(models: dict[str, dict[str, Any]]) -> str:
    """One line per model, of what `train` returned."""
    body = [
        [
            _NAMES[mixer],
            f"{run['parameters']:,}",
            f"{run['tokens']:,}",
            f"{run['validation_perplexity']:.1f}",
            f"{run['tokens_per_second']:,.0f}",
            f"{run['seconds']:.0f}",
        ]
        for mixer, run in models.items()
    ]
    return plain(["model", "parameters", "tokens", "validation perplexity", "tokens/s", "s"], body)


def decoding_table(costs: dict[str, list[DecodingCost]]) -> str:
    """One line per context length: milliseconds and KiB of each model."""
    header = [f"{_NAMES[name]} {quantity}" for name in costs for quantity in ("ms", "KiB")]
    body = []
    for row in zip(*costs.values(), strict=True):
        cells = (cell for cost in row for cell in (f"{cost.milliseconds:.2f}", f"{cost.cache_bytes / 1024:,.0f}"))
        body.append([f"{row[0].context:,}", *cells])
    return plain(["context", *header], body, numbers_from=0)


@contextmanager
def _own_folder(out: Path) -> Iterator[Path]:
    """Make `out` an empty folder that the next quickstart knows as its own, and hold it."""
    if out.is_dir() and content_of(out) and not (out / RESULT).is_file():
        raise OptionError(
            "{folder} holds something else than a quickstart; give {out} another folder or remove it.", folder=out
        )
    if not out.is_dir():
        new_folder(out)
    with alone_in(out, "quickstart"):
        for entry in content_of(out):
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        write_json(out / RESULT, {})
        yield out


def _next_commands(out: Path) -> str:
    return f"""\
  regla generate {out / "regla"} --prompt "A class" --temperature 0.5
  regla eval {out / "regla"} --stream 8192 --by-position
  regla train --out runs/mine --data YOUR.txt --steps 1000
  regla linearize HuggingFaceTB/SmolLM2-135M --dry-run
  regla doctor"""
