"""Text files to token files, with their tokenizer beside them."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import chain, count, islice, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regla.data.bad import MAX_BAD_RECORDS, BadRecords
from regla.data.records import TEXT_FIELD
from regla.data.sources import document_pieces, files_of, holds_tokens
from regla.data.text import Piece, encode_pieces
from regla.data.token_files import SUFFIX, TokenFile, TokenWriter
from regla.data.tokenizer import load_tokenizer, train_tokenizer, vocabulary_size
from regla.data.tokens import check_fits
from regla.runtime.errors import OptionError, check_count
from regla.runtime.files import LOCK, alone_in, check_new, new_folder_alone, remove_unfinished, write_json
from regla.runtime.processes import check_one_process

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BAD = "bad-records.json"
_PLAN = "tokenize.json"
_MOST_SHARDS = 10**5


def tokenize_files(
    files: Sequence[str | Path],
    out: str | Path,
    *,
    tokenizer: str | Path | None = None,
    vocab_size: int | None = None,
    text_field: str = TEXT_FIELD,
    shard_tokens: int | None = None,
    max_bad_records: int = MAX_BAD_RECORDS,
    resume: bool = False,
) -> dict[Path, int]:
    """Write NAME.bin (little-endian uint16) for each text file or folder and the tokenizer beside them.

    Text streams: it need not fit into memory. The same text and tokenizer give the same files.

    Args:
        files: .txt, .jsonl and .parquet files, or folders of files of one kind, which become one token file each.
        out: new folder; with `resume` also that of a call that was interrupted.
        tokenizer: folder of one; None: one of `vocab_size` tokens is trained on the files.
        vocab_size: see `tokenizer`.
        text_field: name of the text in a record.
        shard_tokens: write NAME/00000.bin, NAME/00001.bin, ... instead; each ends with the document in which it
            reaches so many tokens.
        max_bad_records: how many records may be left out; they are named in `bad-records.json`.
        resume: go on behind the last whole token file, with the tokenizer that is there.

    Returns:
        The tokens in each file.

    Raises:
        ValueError: whatever is wrong with the input.
    """
    check_one_process("tokenize")
    check_count("vocab_size", vocab_size)
    check_count("shard_tokens", shard_tokens)
    if (tokenizer is None) == (vocab_size is None):
        raise OptionError("Give either {tokenizer} or {vocab_size}: a tokenizer, or the size of one to train.")
    check_fits(vocab_size or 0)
    out = Path(out)
    goes_on = resume and (out / _PLAN).is_file()
    if not goes_on:
        check_new(out)
    sources = _sources(files)
    plan = {
        "files": {name: _sizes(source) for name, source in sources.items()},
        "tokenizer": None if tokenizer is None else str(tokenizer),
        "vocab_size": vocab_size,
        "text_field": text_field,
        "shard_tokens": shard_tokens,
    }
    with ExitStack() as held:
        if goes_on:
            held.enter_context(alone_in(out))
            remove_unfinished(out)
            _check_plan(out, plan)
            codec = load_tokenizer(out)
        else:
            codec = _tokenizer(sources, tokenizer, vocab_size, text_field, max_bad_records)
            held.enter_context(new_folder_alone(out))
            codec.save_pretrained(str(out))
            write_json(out / _PLAN, plan)
        bad = BadRecords(max_bad_records)
        counts: dict[Path, int] = {}
        try:
            for name, source in sources.items():
                counts |= _write(out / name, source, text_field, codec, bad, shard_tokens)
        except BaseException:
            _tidy(out)
            raise
        if bad.told:
            write_json(out / BAD, bad.told)
            print(f"{bad.report()}\n{out / BAD} names all.")
    return counts


def write_documents(
    pieces: Iterator[Piece],
    targets: Iterator[Path],
    codec: PreTrainedTokenizerBase,
    bad: BadRecords,
    most: int | None = None,
) -> Iterator[TokenWriter]:
    """Write documents to token files, each of at least `most` tokens but the last; None: all to one.

    Yields each when it is written. `bad` counts what `pieces` leave out; the record of a single file names it.
    """
    known = len(bad)
    encoded = encode_pieces(codec, pieces)
    for first in encoded:
        with TokenWriter(next(targets), codec) as writer:
            for ids_N, ends in chain([first], encoded):
                writer.write(ids_N, ends=ends)
                if ends and most is not None and writer.tokens >= most:
                    break
            if most is None:  # else records are read ahead, and are of no certain file
                writer.left_out = bad.told[known:]
        yield writer


def _write(
    stem: Path, source: Path, text_field: str, codec: PreTrainedTokenizerBase, bad: BadRecords, most: int | None
) -> dict[Path, int]:
    """The token files of one source; those that are there stay."""
    if most is not None:
        stem.mkdir(exist_ok=True)
        remove_unfinished(stem)

    def targets() -> Iterator[Path]:
        if most is None:
            return iter([stem.with_name(stem.name + SUFFIX)])
        return (stem / f"{number:05d}{SUFFIX}" for number in count())

    written = [(target, TokenFile(target).content(verify=False)) for target in takewhile(Path.is_file, targets())]
    documents = sum(content.documents or 0 for _, content in written)
    pieces = _behind(document_pieces(source, text_field, bad), documents)
    counts = {target: content.tokens for target, content in written}
    for writer in write_documents(pieces, islice(targets(), len(written), None), codec, bad, most):
        counts[writer.path] = writer.tokens
        print(f"{writer.path}: {writer.tokens:,} tokens, {writer.documents:,} documents")
    return counts


def _behind(pieces: Iterator[Piece], documents: int) -> Iterator[Piece]:
    """The pieces behind the first `documents`."""
    for piece in pieces:
        if documents:
            documents -= piece.ends
        else:
            yield piece


def _tidy(out: Path) -> None:
    """Keep what a call with `resume` can go on from; without any, empty the folder."""
    if any(out.rglob(f"*{SUFFIX}")):
        print(f"{out} has whole token files; the same command with --resume goes on behind them.", file=sys.stderr)
        return
    for entry in out.iterdir():
        if entry.name != LOCK:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _sources(files: Sequence[str | Path]) -> dict[str, Path]:
    """By the names of their token files."""
    sources: dict[str, Path] = {}
    for file in map(Path, files):
        if holds_tokens(file):
            raise ValueError(f"{file} is not text; give .txt, .jsonl or .parquet files to tokenize.")
        name = file.resolve().name if file.is_dir() else file.stem
        if name in sources:
            raise ValueError(f"Two files would both be written to {name}{SUFFIX}; rename one of them.")
        sources[name] = file
    return sources


def _sizes(source: Path) -> dict[str, int]:
    return {str(file.resolve()): file.stat().st_size for file in files_of(source)}


def _check_plan(out: Path, plan: dict[str, Any]) -> None:
    try:
        before = json.loads((out / _PLAN).read_bytes())
        differ = [name for name, value in plan.items() if before[name] != value]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OptionError("{file} is damaged; give {out} a new folder.", file=out / _PLAN) from error
    if differ:
        raise OptionError(
            "{folder} was begun with other files or options ({names}); repeat those, or give {out} a new folder.",
            folder=out,
            names=", ".join(differ),
        )


def _tokenizer(
    sources: dict[str, Path], tokenizer: str | Path | None, vocab_size: int | None, text_field: str, most: int
) -> PreTrainedTokenizerBase:
    if tokenizer is not None:
        codec = load_tokenizer(tokenizer)
    else:
        assert vocab_size is not None
        bad = BadRecords(most)
        texts = (piece.text for source in sources.values() for piece in document_pieces(source, text_field, bad))
        codec = train_tokenizer(texts, vocab_size)
    check_fits(vocabulary_size(codec))
    return codec
