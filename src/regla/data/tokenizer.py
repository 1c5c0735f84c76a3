"""Tokenizers: train a byte-level BPE, and write token files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from regla.data.sources import END_OF_TEXT, TEXT_FIELD, Text, read_source
from regla.runtime.files import brief, check_new, new_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SMALLEST_VOCABULARY = 257  # every byte, and the end-of-text token
LARGEST_UINT16_VOCABULARY = 2**16


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder on disk."""
    if not Path(folder).is_dir():
        raise ValueError(
            f"There is no tokenizer folder {folder}; give one that `regla tokenize` or save_pretrained wrote."
        )
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # transformers lets through whatever its parsers raise
        raise ValueError(f"{folder} holds no readable tokenizer ({brief(error)}); give another folder.") from error


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """Byte-level BPE over `documents`: any text encodes, and decodes to itself.

    `<|endoftext|>` (id 0) is its beginning, end and padding token. A small text may yield fewer than `vocab_size`.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(
            f"A vocabulary of {vocab_size} is too small: it needs at least {SMALLEST_VOCABULARY} tokens, "
            "256 bytes and the end-of-text token."
        )
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


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
    if (tokenizer is None) == (vocab_size is None):
        raise ValueError("Give either --tokenizer DIR or --vocab-size N: a tokenizer, or the size of one to train.")
    if vocab_size is not None and vocab_size > LARGEST_UINT16_VOCABULARY:
        raise ValueError(_too_large(vocab_size))
    check_new(out)
    targets: dict[Path, Text] = {}
    for file in files:
        source = read_source(file, text_field)
        if not isinstance(source, Text):
            raise ValueError(f"{file} is not text; give .txt, .jsonl or .parquet files to tokenize.")
        target = Path(out) / f"{Path(file).stem}.bin"
        if target in targets:
            raise ValueError(f"Two files would both be written to {target}; rename one of them.")
        targets[target] = source
    if tokenizer is not None:
        codec = load_tokenizer(tokenizer)
    else:
        assert vocab_size is not None
        codec = train_tokenizer((document for text in targets.values() for document in text.documents), vocab_size)
    if len(codec) > LARGEST_UINT16_VOCABULARY:
        raise ValueError(_too_large(len(codec)))
    new_folder(out)
    codec.save_pretrained(str(out))
    counts = {}
    for target, text in targets.items():
        ids_N = text.tokens(codec)
        ids_N.astype("<u2").tofile(target)
        counts[target] = len(ids_N)
        print(f"{target}: {len(ids_N):,} tokens")
    return counts


def _too_large(vocabulary: int) -> str:
    return (
        f"A vocabulary of {vocabulary} does not fit token files of uint16, which hold {LARGEST_UINT16_VOCABULARY} ids; "
        "use a smaller one, or train on the text files themselves."
    )
