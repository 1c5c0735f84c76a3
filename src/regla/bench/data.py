"""What text at scale takes of memory: `regla bench data --gigabytes 8 --out benchmarks/data.jsonl`.

train     `regla train` on a token file, checksum included, against the same run on one of 8 MB
draw      batches alone, as many tokens as the file has
tokenize  `regla tokenize` of a .jsonl file into shards, against one of 8 MB

Peak memory is that of a process of its own, the resident set with all pages of files in it (VmHWM, Linux).
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile

import numpy as np

from regla.bench.measure import Case, Row
from regla.data.embedded import embedded_text
from regla.data.sources import read_source
from regla.data.token_files import TokenWriter
from regla.data.tokenizer import train_tokenizer
from regla.data.tokens import Tokens
from regla.train.config import LoopConfig
from regla.train.mixture import Mixture, Stream

_SMALL = 8 * 10**6  # bytes
_VOCABULARY = 8192
_RUN = {"hidden-size": 64, "layers": 2, "heads": 2, "seq-len": 512, "batch-size": 8, "steps": 40, "device": "cpu"}
_DRAWN = 2**16  # tokens of a sequence of the benchmark `draw`


def cases(size: int, folder: str | None) -> list[Case]:
    """By the name of the benchmark; `size` in bytes, in a folder of its own under `folder`."""

    def rows(name: str) -> Iterator[Row | str]:
        with TemporaryDirectory(dir=folder, prefix="regla-bench-") as place:
            _check_room(Path(place), size)
            yield {"benchmark": "data", "subject": name, "bytes": size, **_MEASURES[name](Path(place), size)}

    return [Case(name, partial(rows, name)) for name in _MEASURES]


def _check_room(place: Path, size: int) -> None:
    free, needed = shutil.disk_usage(place).free, 3 * size // 2 + 10**9
    if free < needed:
        raise ValueError(
            f"{place.parent} has {free / 1e9:.1f} GB free, and {needed / 1e9:.1f} GB are needed; give fewer "
            "--gigabytes or another --dir."
        )


def _train(place: Path, size: int) -> Row:
    tokenizer = _tokenizer(place)
    run = [word for name, value in _RUN.items() for word in (f"--{name}", value)]
    (place / "valid.txt").write_text(embedded_text().documents[0], encoding="utf-8")
    found = {}
    for name, bytes_ in (("small", _SMALL), ("large", size)):
        _write_tokens(place / f"{name}.bin", bytes_)
        text = ["--data", place / f"{name}.bin", "--tokenizer", tokenizer, "--valid", place / "valid.txt"]
        found[name] = _watch("-m", "regla", "train", "--out", place / name, *run, *text)
    summary = json.loads((place / "large" / "training.json").read_text(encoding="utf-8"))
    return _figures(found) | {"tokens": summary["text_tokens"], "parameters": summary["parameters"]}


def _draw(place: Path, size: int) -> Row:
    found = {}
    for name, bytes_ in (("small", _SMALL), ("large", size)):
        _write_tokens(place / f"{name}.bin", bytes_)
        found[name] = _watch("-c", f"from regla.bench.data import draw_all; draw_all({str(place / name) + '.bin'!r})")
    return _figures(found) | {"tokens": size // 2}


def _tokenize(place: Path, size: int) -> Row:
    tokenizer = _tokenizer(place)
    found = {}
    for name, bytes_ in (("small", _SMALL), ("large", size)):
        _write_text(place / f"{name}.jsonl", bytes_)
        options = ["--tokenizer", tokenizer, "--out", place / name, "--shard-tokens", 10**8]
        found[name] = _watch("-m", "regla", "tokenize", place / f"{name}.jsonl", *options)
    tokens = sum(file.stat().st_size for file in (place / "large").rglob("*.bin")) // 2
    return _figures(found) | {"tokens": tokens}


_MEASURES = {"train": _train, "draw": _draw, "tokenize": _tokenize}


def draw_all(file: str) -> None:
    """Draw as many tokens as a token file has, in batches."""
    source = read_source(file)
    assert isinstance(source, Tokens)
    config = LoopConfig(seq_len=_DRAWN, batch_size=4)
    mixture = Mixture([Stream(source.name, source.ids)], None, config)
    for batch in range(len(source.ids) // config.tokens_per_step):
        mixture(batch)


def _figures(found: dict[str, tuple[int, float]]) -> Row:
    peak, seconds = found["large"]
    small, _ = found["small"]
    return {"peak_bytes": peak, "small_peak_bytes": small, "beyond_bytes": peak - small, "seconds": seconds}


def _watch(*arguments: object) -> tuple[int, float]:
    """Peak resident bytes and seconds of a Python process."""
    peak, started = 0, time.perf_counter()
    with TemporaryFile() as told:
        process = subprocess.Popen([sys.executable, *map(str, arguments)], stdout=told, stderr=told)
        while process.poll() is None:
            for line in Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8").splitlines():
                if line.startswith("VmHWM:"):
                    peak = max(peak, int(line.split()[1]) * 1024)
            time.sleep(0.05)
        if process.returncode:
            told.seek(0)
            raise RuntimeError(
                f"{' '.join(map(str, arguments))} failed: {told.read().decode(errors='replace')[-2000:]}"
            )
    return peak, time.perf_counter() - started


def _tokenizer(place: Path) -> Path:
    train_tokenizer(embedded_text().documents, _VOCABULARY).save_pretrained(place / "tokenizer")
    return place / "tokenizer"


def _write_tokens(file: Path, size: int) -> None:
    """Random ids in documents of 1,000 tokens."""
    rng = np.random.default_rng(0)
    ids_N = rng.integers(1, 256, 10**7)
    ids_N[999::1000] = 0
    left = size // 2
    with TokenWriter(file) as writer:
        while left:
            part = ids_N[:left]
            writer.write(part)
            left -= len(part)


def _write_text(file: Path, size: int) -> None:
    """Records of paragraphs of the embedded text, in random order."""
    rng = np.random.default_rng(0)
    paragraphs = [part for document in embedded_text().documents for part in document.split("\n\n")]
    block = []
    for _ in range(20_000):
        chosen = rng.integers(0, len(paragraphs), 5)
        block.append(json.dumps({"text": "\n\n".join(paragraphs[number] for number in chosen)}) + "\n")
    content = "".join(block).encode()
    with file.open("wb") as out:
        whole, rest = divmod(size, len(content))
        for _ in range(whole):
            out.write(content)
        out.write(content[: content[:rest].rfind(b"\n") + 1])
