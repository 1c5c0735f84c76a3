"""The tokens of a study: prepared once, read by every run."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from regla.data.records import TEXT_FIELD
from regla.data.selection import read_sources, split_validation
from regla.data.sources import READERS, Source, read_source
from regla.data.text import Text
from regla.data.token_files import SUFFIX
from regla.data.tokenizer import end_of_text_id, load_tokenizer, train_tokenizer, vocabulary_size
from regla.data.tokens import Tokens, check_fits, write_tokens
from regla.runtime.errors import OptionError
from regla.runtime.files import unfinished_name
from regla.train.config import DEFAULT_VOCAB_SIZE


@dataclass(frozen=True, kw_only=True)
class StudyData:
    """Token files, and what the runs need to know of them."""

    data: tuple[str, ...]
    valid: tuple[str, ...]
    tokenizer: str | None
    """Its folder; None: a task, which has no text."""
    digest: str
    """SHA-256 of all training tokens and of those of each validation file."""
    tokens: int
    """To train on."""
    vocab_size: int
    end_of_text: int
    options: tuple[str, ...] = ()
    """Of the command line, that named the files; without their folders."""


def prepare(
    folder: str | Path,
    *,
    data: Sequence[str] = (),
    valid: Sequence[str] = (),
    text_field: str = TEXT_FIELD,
    tokenizer: str | None = None,
    vocab_size: int | None = None,
) -> StudyData:
    """Token files for training and validation.

    Token files with their tokenizer are used where they are. Anything else (text, the embedded text where `data` is
    empty, files whose last tenth is to be held out) is written to `folder` as token files first, once: a second call
    with the same text finds them there. `vocab_size` is that of the tokenizer to train where none is given.
    """
    if tokenizer is not None and vocab_size is not None:
        raise OptionError(
            "The study's base has a vocab_size, which is that of a tokenizer to train, and {tokenizer} is given, too; "
            "leave out one of them (--set vocab_size=null)."
        )
    options = _options(data, valid, tokenizer)
    if text_field != TEXT_FIELD:
        options += ("--text-field", text_field)
    if tokenizer is not None and data and valid and all(Path(file).suffix == SUFFIX for file in (*data, *valid)):
        return _describe(data, valid, tokenizer, options)
    train_sources, valid_sources = split_validation(read_sources(data, text_field), valid, text_field)
    target = Path(folder) / _digest_of_sources(train_sources, valid_sources, tokenizer, vocab_size)
    if not target.is_dir():
        _write(target, train_sources, valid_sources, tokenizer, vocab_size)
    return _describe(_files(target / "train"), _files(target / "valid"), str(target / "tokenizer"), options)


def of_task(task: str, vocab_size: int | None) -> StudyData:
    """What the runs need to know of a task, which makes its sequences itself."""
    digest = hashlib.sha256(f"task {task}".encode()).hexdigest()
    return StudyData(
        data=(),
        valid=(),
        tokenizer=None,
        digest=digest,
        tokens=0,
        vocab_size=vocab_size or DEFAULT_VOCAB_SIZE,
        end_of_text=0,
    )


def _options(data: Sequence[str], valid: Sequence[str], tokenizer: str | None) -> tuple[str, ...]:
    words: list[str] = []
    for option, files in (("--tokenizer", [tokenizer] if tokenizer else []), ("--data", data), ("--valid", valid)):
        words += [option, *(Path(file).name for file in files)] if files else []
    return tuple(words)


def _describe(data: Sequence[str], valid: Sequence[str], folder: str, options: tuple[str, ...]) -> StudyData:
    tokenizer = load_tokenizer(folder)
    train_ids = [read_source(file).tokens(tokenizer) for file in data]
    hashes = [hashlib.sha256(np.concatenate(train_ids).data).hexdigest()]
    hashes += [hashlib.sha256(read_source(file).tokens(tokenizer).data).hexdigest() for file in valid]
    return StudyData(
        data=tuple(data),
        valid=tuple(valid),
        tokenizer=folder,
        digest=hashlib.sha256("\n".join(hashes).encode()).hexdigest(),
        tokens=sum(map(len, train_ids)),
        vocab_size=vocabulary_size(tokenizer),
        end_of_text=end_of_text_id(tokenizer),
        options=options,
    )


def _digest_of_sources(
    train: Sequence[Source], valid: Sequence[Source], tokenizer: str | None, vocab_size: int | None
) -> str:
    digest = hashlib.sha256(f"{vocab_size or DEFAULT_VOCAB_SIZE}".encode())
    if tokenizer is not None:
        load_tokenizer(tokenizer)  # whether there is one
        for file in sorted(Path(tokenizer).glob("*.json")):
            if not file.name.endswith(f"{SUFFIX}.json"):  # the record of a token file beside the tokenizer
                digest.update(file.read_bytes())
    for part, sources in (("train", train), ("valid", valid)):
        for source in sources:
            digest.update(f"\0{part} {source.name}\0".encode())
            for document in _contents(source):
                digest.update(hashlib.sha256(document).digest())
    return digest.hexdigest()[:12]


def _contents(source: Source) -> list[bytes]:
    if isinstance(source, Text):
        return [document.encode() for document in source.documents]
    return [source.ids.read().tobytes()] if isinstance(source, Tokens) else []


def _write(
    target: Path, train: Sequence[Source], valid: Sequence[Source], tokenizer: str | None, vocab_size: int | None
) -> None:
    """Beside its place first, so that a folder that is there is whole."""
    if tokenizer is not None:
        codec = load_tokenizer(tokenizer)
    else:
        for source in (*train, *valid):
            if not isinstance(source, Text):
                raise OptionError(
                    "{name} holds tokens; give {tokenizer} the folder of their tokenizer.", name=source.name
                )
        texts = (document for source in train if isinstance(source, Text) for document in source.documents)
        codec = train_tokenizer(texts, vocab_size or DEFAULT_VOCAB_SIZE)
    check_fits(vocabulary_size(codec))
    unfinished = unfinished_name(target)
    shutil.rmtree(unfinished, ignore_errors=True)
    for part, sources in (("train", train), ("valid", valid)):
        (unfinished / part).mkdir(parents=True)
        for number, source in enumerate(sources):
            ids_N = source.tokens(codec)
            if not len(ids_N):
                raise OptionError(
                    "{name} is too short to hold out a part of it; give more text, or {valid}.", name=source.name
                )
            folder = unfinished / part / f"{number:03d}"  # keeps the order, and apart what has one name
            folder.mkdir()
            write_tokens(folder / f"{_plain_name(source.name)}{SUFFIX}", ids_N, codec)
    codec.save_pretrained(str(unfinished / "tokenizer"))
    os.replace(unfinished, target)


def _plain_name(name: str) -> str:
    """The name of a source without its folder and kind."""
    path = Path(name)
    return re.sub(r"[^\w.-]+", "-", path.stem if path.suffix in READERS else path.name)


def _files(folder: Path) -> list[str]:
    return sorted(map(str, folder.glob(f"*/*{SUFFIX}")))
