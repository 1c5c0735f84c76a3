"""Malformed inputs for the command line, made of valid ones: `python -m tests.fuzz.fuzzer --cases 500 --seed 0`.

A case takes one file of a valid input (a seed), truncates it, flips bits in it, overwrites a part, or changes a value
of its JSON, and runs the command that reads it, within this process. It passes if

- the command ends in time, with a result (exit code 0) or with a sentence on stderr (1 or 2), never an exception;
- every file that was there before has the same bytes, but in a run that was resumed with success;
- nothing in the input was executed: pickles among the seeds would create a file.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import pickle
import random
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regla.cli import main

SECONDS = 60  # that a command may take; most take a fraction of one
TINY = "--vocab-size 300 --hidden-size 32 --layers 2 --heads 2 --seq-len 32 --batch-size 2 --steps 4 --device cpu"
LINES = [f"Line {number} of the text says {number % 7}." for number in range(120)]
ODD_VALUES: list[Any] = [
    None,
    -1,
    0,
    1,
    2.5,
    "x",
    "",
    [],
    {},
    [None],
    {"a": 1},
    True,
    float("nan"),
    float("inf"),
    [[[]]],
]


@dataclass(frozen=True)
class Seed:
    """A valid input: what is copied, which file of it is changed, and the command that reads it.

    In the command, {seed} is the copy, {base} the folder of all seeds, and {out} a new folder.
    """

    kind: str
    copied: str
    changed: str  # within the copy; "" where the copy is a file
    command: str


GENERATE = "generate {seed} --prompt Line --max-new-tokens 2 --temperature 0 --device cpu"
_MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
RESUME = f"train --out {{seed}} --data {{base}}/text.txt {TINY} --save-every 2 --steps 6 --resume"
SEEDS = [
    Seed("config", "config.json", "", "train --out {out} --data {base}/text.txt --config {seed} " + TINY),
    Seed("study", "study.yaml", "", "study {seed} --dry-run"),
    *(Seed("model", "model", file, GENERATE) for file in _MODEL_FILES),
    Seed("model", "student", "config.json", GENERATE),
    Seed("model", "pickled", "pytorch_model.bin", GENERATE),
    *(
        Seed(kind, f"text.{kind}", "", "tokenize --out {out} --tokenizer {base}/model {seed}")
        for kind in ("jsonl", "parquet", "txt")
    ),
    Seed("tokens", "tokens.bin", "", "eval {base}/model --data {seed} --seq-len 32 --device cpu"),
    *(
        Seed(
            "checkpoint",
            "run",
            f"checkpoints/step-000002/{file}",
            "train --out {seed} --data {base}/text.txt --resume " + TINY,
        )
        for file in ("manifest.json", "model.safetensors", "optimizer.safetensors", "random.safetensors", "state.json")
    ),
    *(Seed("run", "run", file, RESUME) for file in ("training.json", "log.jsonl", "config.json")),
    Seed("state", "text.state", "", "generate {base}/model --load-state {seed} --max-new-tokens 2 --device cpu"),
]


class _Bomb:
    """Unpickled, it creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


class Hang(BaseException):
    """A command that does not end."""


def make_seeds(base: Path) -> None:
    """Write all seeds to the folder `base`."""
    import pyarrow
    import pyarrow.parquet

    (base / "text.txt").write_text("\n".join(LINES))
    (base / "text.jsonl").write_text("".join(json.dumps({"text": line, "n": 1}) + "\n" for line in LINES[:20]))
    pyarrow.parquet.write_table(pyarrow.table({"text": LINES[:20]}), base / "text.parquet")
    (base / "config.json").write_text('{"hidden_size":32,"num_hidden_layers":2,"rms_norm_eps":1e-6,"qk_norm":true}')
    (base / "study.yaml").write_text(
        "title: A study\nbase: {steps: 3, warmup: 1}\nlr: [1.0e-3, 2.0e-3]\nseeds: [0, 1]\n"
    )
    run = ["train", "--data", str(base / "text.txt"), *TINY.split(), "--save-every", "2"]
    for name in ("model", "run"):
        _run([*run, "--out", str(base / name)])
    _run(["generate", str(base / "model"), "--prompt", "Line", "--max-new-tokens", "2", "--device", "cpu",
          "--save-state", str(base / "text.state")])  # fmt: skip
    _run(["tokenize", "--tokenizer", str(base / "model"), "--out", str(base / "made"), str(base / "text.txt")])
    shutil.copy(base / "made/text.bin", base / "tokens.bin")
    for name in ("student", "pickled"):
        shutil.copytree(base / "model", base / name)
    (base / "pickled/model.safetensors").unlink()
    (base / "pickled/pytorch_model.bin").write_bytes(pickle.dumps(_Bomb(base / "executed")))
    _make_student(base / "student")


def _make_student(folder: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from regla.linearize import convert

    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48}
    config = LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=2)
    convert(LlamaForCausalLM(config).eval(), [1], check=False).save_pretrained(folder)


def _run(command: list[str]) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        if main(command) != 0:
            raise RuntimeError(f"regla {' '.join(command)} made no seed")


def malformed(content: bytes, dice: random.Random) -> bytes:
    """One of many broken forms of a file's content."""
    changes: list[Callable[[bytes, random.Random], bytes]] = [_truncated, _flipped, _flipped, _overwritten]
    with contextlib.suppress(ValueError):  # UnicodeDecodeError is one
        if isinstance(json.loads(content), dict):
            changes += [_changed_value, _changed_value]
    return dice.choice(changes)(content, dice)


def _truncated(content: bytes, dice: random.Random) -> bytes:
    return content[: dice.randrange(len(content))]


def _flipped(content: bytes, dice: random.Random) -> bytes:
    changed = bytearray(content)
    # Headers are short, and decide more than what follows them.
    end = len(content) if dice.random() < 0.5 else min(len(content), 400)
    for _ in range(dice.choice((1, 1, 2, 8))):
        changed[dice.randrange(end)] ^= 1 << dice.randrange(8)
    return bytes(changed)


def _overwritten(content: bytes, dice: random.Random) -> bytes:
    at = dice.randrange(len(content))
    part = dice.choice((dice.randbytes(dice.randint(1, 16)), bytes(16), b"\xff" * 16, b'{"[' * 4, b"\xed\xa0\xbd"))
    return content[:at] + part + content[at + len(part) :]


def _changed_value(content: bytes, dice: random.Random) -> bytes:
    value = json.loads(content)
    place = value
    while True:
        key = dice.choice(list(place))
        if not (isinstance(place[key], dict) and place[key] and dice.random() < 0.7):
            break
        place = place[key]
    if dice.random() < 0.2:
        del place[key]
    else:
        place[key] = dice.choice(ODD_VALUES)
    return json.dumps(value).encode()


def _files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


@contextlib.contextmanager
def _at_most(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def attempt(seed: Seed, content: bytes, base: Path, place: Path) -> tuple[int | None, str]:
    """Run a seed's command on a copy whose file has this content.

    Args:
        place: an empty folder, for the copy and what the command writes.

    Returns:
        The exit code, and what is wrong with how the command ended ("": nothing).
    """
    copy = place / "in" / seed.copied
    copy.parent.mkdir()
    source = base / seed.copied
    shutil.copytree(source, copy) if source.is_dir() else shutil.copy(source, copy)
    (copy / seed.changed if seed.changed else copy).write_bytes(content)
    before, errors = _files(place), io.StringIO()
    command = [part.format(seed=copy, base=base, out=place / "out") for part in seed.command.split()]
    try:
        with _at_most(SECONDS), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
            code = main(command)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except Hang:
        return None, f"did not end within {SECONDS} s"
    except BaseException:
        return None, traceback.format_exc(limit=-4)
    said = errors.getvalue()
    if (base / "executed").exists():
        return code, "code in the input was executed"
    if code not in (0, 1, 2) or "Traceback" in said:
        return code, f"exit code {code}: {said}"
    if code and not (said.splitlines() or [""])[-1].startswith("regla"):
        return code, f"exit code {code} without a sentence: {said!r}"
    after = _files(place)
    for path, was in before.items():
        if after.get(path) != was and not (code == 0 and "--resume" in command):
            return code, f"{path.relative_to(place)} was changed"
    if code and (place / "out").is_dir() and _files(place / "out"):
        return code, f"failed, and left {[str(path.relative_to(place)) for path in _files(place / 'out')]}"
    return code, ""


def fuzz(
    cases: int, seed: int, folder: Path, report: Callable[[str], None] = print
) -> tuple[list[str], dict[str, int]]:
    """Run `cases` cases in `folder`, seeds in turn.

    Returns:
        A text for each case that fails, and how many of each kind ended in each exit code.
    """
    base, failures, counts = folder / "seeds", [], dict[str, int]()
    base.mkdir()
    make_seeds(base)
    untouched = _files(base)
    for number, chosen in enumerate(SEEDS):  # what refuses everything would pass all cases
        place = folder / f"valid-{number}"
        place.mkdir()
        code, wrong = attempt(chosen, (base / chosen.copied / chosen.changed).read_bytes(), base, place)
        if wrong or code != (2 if chosen.copied == "pickled" else 0):
            raise RuntimeError(f"{chosen.copied}/{chosen.changed} as it was made ends in {code} {wrong}")
    for number in range(cases):
        dice = random.Random(f"{seed}/{number}")
        chosen = SEEDS[number % len(SEEDS)]
        file = base / chosen.copied / chosen.changed
        place = folder / str(number)
        place.mkdir()
        code, wrong = attempt(chosen, malformed(file.read_bytes(), dice), base, place)
        if not wrong and _files(base) != untouched:
            wrong = "a seed was changed"
        counts[f"{chosen.kind}: {code}"] = counts.get(f"{chosen.kind}: {code}", 0) + 1
        if wrong:
            failures.append(f"case {number} of seed {seed}, {chosen.copied}/{chosen.changed}: {wrong}")
            report(failures[-1])
        else:
            shutil.rmtree(place)
    return failures, counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    found, totals = fuzz(options.cases, options.seed, Path(tempfile.mkdtemp(prefix="regla-fuzz-")))
    print("\n".join(f"{kind}: {count}" for kind, count in sorted(totals.items())))
    print(f"{options.cases} cases, {len(found)} failures")
    sys.exit(bool(found))
