"""Where the original comes from: what a model card has to say of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*$", re.DOTALL | re.MULTILINE)
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_TAKEN_OVER = ("license", "license_name", "license_link")


def origin_of(model: str) -> dict[str, Any]:
    """`base_model` and, where the original's card or GGUF file names it, its licence; keys as in a card's front matter.

    The base of a folder or file is its name, since nothing else is known of it.
    """
    path = Path(model)
    gguf = path.suffix.lower() == ".gguf"
    name = path.stem if gguf else path.resolve().name if path.is_dir() else model
    base = {"base_model": name} if _HUB_NAME.fullmatch(name) else {}
    found = _of_gguf(path) if gguf else _of_card(_card(model))
    return base | {key: found[key] for key in _TAKEN_OVER if isinstance(found.get(key), str | list)}


def _of_card(text: str) -> dict[str, Any]:
    match = _FRONT_MATTER.match(text)
    try:
        found = yaml.safe_load(match.group(1)) if match else {}
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def _card(model: str) -> str:
    """The original's README.md, empty where it has none or the hub does not answer."""
    file = Path(model) / "README.md"
    try:
        if not Path(model).is_dir():
            from huggingface_hub import hf_hub_download

            file = Path(hf_hub_download(model, "README.md"))
        return file.read_text(encoding="utf-8")
    except Exception:  # whatever the network raises: a card is no reason to stop
        return ""


def _of_gguf(file: Path) -> dict[str, Any]:
    from gguf import GGUFReader

    field = GGUFReader(file).get_field("general.license")
    return {} if field is None else {"license": bytes(field.parts[-1]).decode()}
