"""The command `regla report`: what a conversion's folder holds, what is measured, and the page of both."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import AutoConfig

from regla.data.pretrained import load_pretrained
from regla.data.selection import read_sources, split_validation
from regla.data.sources import encode_source
from regla.data.tokenizer import load_tokenizer
from regla.linearize.card import repeated_by
from regla.linearize.load import check_original, load_config, load_original
from regla.linearize.summary import SUMMARY, read_summary
from regla.models.folders import check_ids, load_model
from regla.page.measure import measure
from regla.report.conversion import conversion_page
from regla.runtime.device import pick_device
from regla.runtime.errors import OptionError
from regla.runtime.files import check_writable, write_text
from regla.runtime.log import FILE as LOG
from regla.runtime.versions import device_name

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

PAGE = "report.html"
_SUFFIXES = (".html", ".htm")
_SHAPE = ("vocab_size", "hidden_size", "num_hidden_layers")


def report(
    folder: str | Path,
    *,
    teacher: str | None = None,
    out: str | Path | None = None,
    skip_measurements: bool = False,
    device: str = "auto",
) -> Path:
    """Write one HTML page about the conversion in `folder`; it needs no other file and no network.

    Args:
        folder: what `regla linearize` wrote.
        teacher: the original, to measure against; None: the one that the folder names.
        out: the page, .html; None: report.html in the folder. An earlier page is replaced.
        skip_measurements: show only what the folder holds: no model is loaded.
        device: where to measure.

    Returns:
        Where the page is.

    Raises:
        ValueError: no such folder, or not a conversion's; an original that cannot be loaded or does not fit; a page
            that cannot be written.
    """
    folder = Path(folder)
    summary = _conversion(folder)
    page = Path(out) if out is not None else folder / PAGE
    if page.suffix.lower() not in _SUFFIXES:
        raise OptionError("{out} is {value}, expected the name of an .html file.", value=page)
    check_writable(page)
    if skip_measurements and teacher is not None:
        raise OptionError("{teacher} is measured, but {skip_measurements} is given; leave one out.")
    measured = None if skip_measurements else _measure(folder, summary, teacher, device)
    try:
        command = repeated_by(summary["arguments"])
    except (KeyError, TypeError, ValueError, AttributeError):  # of another version
        command = None
    write_text(page, conversion_page(folder.resolve().name, summary, _config(folder), _log(folder), measured, command))
    print(f"Written to {page}.")
    return page


def _conversion(folder: Path) -> dict[str, Any]:
    """The summary of a conversion; raises ValueError where there is none."""
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}; give one that `regla linearize` wrote.")
    if not (folder / SUMMARY).is_file():
        raise ValueError(
            f"{folder} holds no conversion (it has no {SUMMARY}); give a folder that `regla linearize` wrote."
        )
    summary = read_summary(folder)
    if not summary:
        raise ValueError(
            f"{folder / SUMMARY} is damaged or no record of a conversion; repeat it, or give another folder."
        )
    return summary


def _config(folder: Path) -> dict[str, Any]:
    """What config.json holds; empty where it cannot be read."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def _log(folder: Path) -> list[dict[str, Any]]:
    """Records of the log; lines that are none, such as a last one that was cut short, are passed over."""
    try:
        lines = (folder / LOG).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def _measure(folder: Path, summary: Mapping[str, Any], teacher: str | None, device: str) -> dict[str, Any]:
    """Whatever can be wrong with the input is found before weights are loaded."""
    where = pick_device(device)
    name = str(summary["arguments"].get("model")) if teacher is None else teacher
    config, tokenizer = load_pretrained(AutoConfig, folder, "model"), load_tokenizer(str(folder))
    try:
        theirs = load_config(name)
        check_original(name, theirs)
        their_tokenizer = load_tokenizer(name)
    except ValueError as error:
        raise OptionError(
            "The original cannot be loaded: {reason} Say where it is with {teacher}, or leave out what is measured "
            "with {skip_measurements}.",
            reason=error,
        ) from error
    _check_teacher(folder, config, name, theirs)
    if their_tokenizer.get_vocab() != tokenizer.get_vocab():
        raise OptionError(
            "The tokenizer of {name} is not that of {folder}; give {teacher} the model that it was converted from.",
            name=name,
            folder=folder,
        )
    ids_N, text = _held_out(summary["arguments"], tokenizer)
    student = load_model(folder, where)
    check_ids(student, [int(ids_N.max())], "The tokens of the text")
    original = load_original(name)[0].to(where)
    return measure(original, student, tokenizer, ids_N) | {"text": text, "device": device_name(where)}


def _check_teacher(folder: Path, ours: PreTrainedConfig, name: str, theirs: PreTrainedConfig) -> None:
    """Raise ValueError where the student was not made from a model of this shape."""
    for key in _SHAPE:
        if getattr(ours, key, None) != getattr(theirs, key, None):
            raise OptionError(
                "{folder} has {key} {ours}, but {name} has {theirs}; give {teacher} the model that it was converted "
                "from.",
                folder=folder,
                key=key,
                ours=getattr(ours, key, None),
                name=name,
                theirs=getattr(theirs, key, None),
            )


def _held_out(arguments: Mapping[str, Any], tokenizer: Any) -> tuple[np.ndarray, str]:
    """Tokens that the conversion did not train on, and what they are: its own validation text where that is there."""
    try:
        data, valid = arguments.get("data") or (), arguments.get("valid") or ()
        sources = split_validation(read_sources(data, arguments.get("text_field") or "text"), valid)[1]
        note = "the conversion's validation text"
    except (ValueError, TypeError):  # gone, or of a damaged record
        sources = split_validation(read_sources(()))[1]
        note = "embedded text, since the conversion's validation text is not there"
    texts = [encode_source(source, tokenizer) for source in sources]
    names = ", ".join(Path(text.name).name for text in texts)
    return np.concatenate([text.ids for text in texts]), f"{note} ({names})"
