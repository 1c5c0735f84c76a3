"""Tokens of text files in a folder: made once, then read from there."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from regla.data.bad import BadRecords
from regla.data.records import TEXT_FIELD
from regla.data.sources import document_pieces, files_of
from regla.data.token_files import SUFFIX, TokenFile
from regla.data.tokenize import write_documents
from regla.data.tokenizer import vocabulary_size
from regla.data.tokens import Ids, Tokens, check_fits
from regla.runtime.errors import OptionError
from regla.runtime.files import alone_in

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FORMAT = 1


def cached_tokens(
    path: str | Path,
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    text_field: str = TEXT_FIELD,
    bad: BadRecords | None = None,
) -> Tokens:
    """The tokens of a text file or of those in a folder, from a token file in `folder`, which is written first where
    there is none of this text and tokenizer. Of several processes one writes it.

    A text is known by path, size and time of its last change.
    """
    check_fits(vocabulary_size(tokenizer))
    files = files_of(path)
    name = re.sub(r"[^\w.-]+", "-", Path(path).stem)
    target = Path(folder) / f"{name}-{_key(files, tokenizer, text_field)}{SUFFIX}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(
            "{folder} cannot be created ({reason}); give {token_cache} a place that you may write to.",
            folder=folder,
            reason=error.strerror,
        ) from error
    bad = bad or BadRecords()
    with alone_in(target.parent, wait=True):
        if not target.is_file():
            print(f"Tokenizing {path} into {target}.")
            for _ in write_documents(document_pieces(path, text_field, bad), iter([target]), tokenizer, bad):
                pass
        else:
            for why in TokenFile(target).content(verify=False).left_out:
                bad.add(ValueError(why))
    return Tokens(str(path), Ids.of(TokenFile(target)))


def _key(files: Sequence[Path], tokenizer: PreTrainedTokenizerBase, text_field: str) -> str:
    state = [(str(file.resolve()), (found := file.stat()).st_size, found.st_mtime_ns) for file in files]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    how = repr(sorted(tokenizer.get_vocab().items())) if backend is None else backend.to_str()
    text = json.dumps([_FORMAT, state, text_field, tokenizer.eos_token_id, how])
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:12]
