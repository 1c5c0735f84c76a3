"""Measurements as rows: one JSON object a line, each with the machine and the versions it was taken on."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from regla.runtime.versions import commit, device_name, package_version, versions


def surroundings(device: torch.device | None = None) -> dict[str, Any]:
    """What a figure depends on besides the code: hardware, versions, commit, date. device: None is the GPU if any."""
    cuda = torch.cuda.is_available() if device is None else device.type == "cuda"
    return {
        "device": device_name(device),
        **({"cuda": torch.version.cuda} if cuda else {"threads": torch.get_num_threads()}),
        **versions(),
        "triton": package_version("triton"),
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def write_rows(path: str | Path, rows: Iterable[dict[str, Any]], device: torch.device | None = None) -> None:
    """Append rows to a .jsonl file, each with its surroundings."""
    around = surroundings(device)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row | around) + "\n")
