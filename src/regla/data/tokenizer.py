"""Tokenizers: load one, train a byte-level BPE, and what is asked of either."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from regla.data.pretrained import load_pretrained
from regla.runtime.files import brief

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END_OF_TEXT = "<|endoftext|>"
"""Line between two documents of a text file, and the end-of-text token of tokenizers trained here."""

SMALLEST_VOCABULARY = 257  # every byte, and the end-of-text token


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder, in a .gguf file, or of a name on the Hugging Face hub."""
    from transformers import AutoTokenizer

    tokenizer = load_pretrained(AutoTokenizer, name, "tokenizer")
    with TemporaryDirectory() as folder:  # what cannot be used or saved is found before anything else is done
        try:
            tokenizer("a b", add_special_tokens=False)
            tokenizer.save_pretrained(folder)
        except Exception as error:
            raise ValueError(f"{name} holds no usable tokenizer ({brief(error)}); give another.") from error
    return tokenizer


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """The largest id and one: rows that an embedding needs. `len(tokenizer)` is less where ids have gaps."""
    return 1 + max(max(tokenizer.get_vocab().values()), max(tokenizer.added_tokens_decoder, default=0))


def vocabulary_digest(tokenizer: PreTrainedTokenizerBase, largest: int) -> str:
    """SHA-256 of the tokens with ids up to `largest`: the same where tokens were added behind them."""
    known = tokenizer.get_vocab() | {str(token): id_ for id_, token in tokenizer.added_tokens_decoder.items()}
    tokens = sorted((id_, token) for token, id_ in known.items() if id_ <= largest)
    return hashlib.sha256(repr(tokens).encode(errors="surrogatepass")).hexdigest()


def end_of_text_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that ends a document."""
    if tokenizer.eos_token_id is None:
        raise ValueError("The tokenizer has no end-of-text (eos) token; set its eos_token and save it again.")
    return int(tokenizer.eos_token_id)


def first_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What stands before a text: the beginning-of-text token, or for want of one the end of the text before."""
    return end_of_text_id(tokenizer) if tokenizer.bos_token_id is None else int(tokenizer.bos_token_id)


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
