"""Text and JSON from files and arguments; what is wrong with them is said in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_utf8(path: str | Path, expected: str) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Args:
        path: the file.
        expected: what the file should have been, for the sentence.

    Raises:
        ValueError: it cannot be read or is not UTF-8.
    """
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); give {expected}.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}); convert it to UTF-8.") from error


def parse_json(text: str | bytes, where: str) -> Any:
    """The value of a JSON text; `where` names it at the start of the sentence of a ValueError."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError(f"{where} is nested too deeply to be read; correct it.") from error
    except ValueError as error:
        raise ValueError(f"{where} is not JSON ({error}); correct it.") from error


def read_json(path: str | Path, expected: str) -> Any:
    """The value in a JSON file; see `read_utf8` and `parse_json`."""
    return parse_json(read_utf8(path, expected), str(path))


def check_text(text: str, where: str) -> str:
    r"""`text`, if UTF-8 can hold it.

    A Python string can hold lone surrogates, which JSON's "\ud83d" and invalid bytes of a command line become. No
    tokenizer takes them and no file holds them.

    Raises:
        ValueError: it holds a lone surrogate; the sentence begins with `where`.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = ascii(text[error.start])
        raise ValueError(
            f"{where} is no valid Unicode text (a lone surrogate, {found}, at character {error.start}); correct it."
        ) from error
    return text
