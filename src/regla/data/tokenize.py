"""Text files to token files, with their tokenizer beside them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from regla.data.records import TEXT_FIELD
from regla.data.sources import read_source
from regla.data.text import Text
from regla.data.tokenizer import load_tokenizer, train_tokenizer, vocabulary_size
from regla.data.tokens import SUFFIX, check_fits, write_tokens
from regla.runtime.errors import OptionError, check_count
from regla.runtime.files import check_new, new_folder_alone
from regla.runtime.processes import check_one_process


def tokenize_files(
    files: Sequence[str | Path],
    out: str | Path,
    *,
    tokenizer: str | Path | None = None,
    vocab_size: int | None = None,
    text_field: str = TEXT_FIELD,
) -> dict[Path, int]:
    """Write NAME.bin (little-endian uint16) for each text file and the tokenizer beside them; the tokens in each file.

    Without `tokenizer`, a folder, one of `vocab_size` tokens is trained on the files.
    """
    check_one_process("tokenize")
    if (tokenizer is None) == (vocab_size is None):
        raise OptionError("Give either {tokenizer} or {vocab_size}: a tokenizer, or the size of one to train.")
    check_count("vocab_size", vocab_size)
    check_fits(vocab_size or 0)
    check_new(out)
    targets: dict[Path, Text] = {}
    for file in files:
        source = read_source(file, text_field)
        if not isinstance(source, Text):
            raise ValueError(f"{file} is not text; give .txt, .jsonl or .parquet files to tokenize.")
        target = Path(out) / f"{Path(file).stem}{SUFFIX}"
        if target in targets:
            raise ValueError(f"Two files would both be written to {target}; rename one of them.")
        targets[target] = source
    if tokenizer is not None:
        codec = load_tokenizer(tokenizer)
    else:
        assert vocab_size is not None
        codec = train_tokenizer((document for text in targets.values() for document in text.documents), vocab_size)
    check_fits(vocabulary_size(codec))
    tokens = {target: text.tokens(codec) for target, text in targets.items()}
    counts = {}
    with new_folder_alone(out):
        codec.save_pretrained(str(out))
        for target, ids_N in tokens.items():
            write_tokens(target, ids_N)
            counts[target] = len(ids_N)
            print(f"{target}: {len(ids_N):,} tokens")
    return counts
