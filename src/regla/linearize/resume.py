"""Which folders a conversion may write to, and which it can go on in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from regla.linearize.config import LinearizeConfig
from regla.linearize.summary import finished, read_summary
from regla.runtime.checkpoint import FOLDER as CHECKPOINTS
from regla.runtime.checkpoint import found_in
from regla.runtime.errors import OptionError
from regla.runtime.files import check_new, content_of
from regla.runtime.options import by_flag, with_effect


def stage_folder(out: str | Path, number: int) -> Path:
    return Path(out) / f"stage-{number}"


def settings(config: LinearizeConfig, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Of arguments, which may be those of another run, what the weights depend on, by option."""
    return by_flag({name: arguments.get(name) for name in with_effect(config)}) | {"MODEL": arguments.get("model")}


def check_out(config: LinearizeConfig) -> None:
    """Raise ValueError unless `config.out` is new, or is to be resumed and holds the same conversion, not finished."""
    if config.out is None:
        return
    out = Path(config.out)
    folders = [stage_folder(out, number) for number in (1, 2, 3)]
    begun = any(found_in(folder / CHECKPOINTS) for folder in folders)
    summary = read_summary(out)
    if config.resume is None:
        if (begun or summary.get("arguments", {}).get("tokens")) and not finished(summary):
            raise OptionError(
                "{folder} is not empty; give {out} a new folder, or {resume} to go on with its conversion.", folder=out
            )
        check_new(out)
        return
    if config.tokens == 0:
        raise OptionError("{resume} without {tokens} has nothing to go on with; repeat the {tokens} of the conversion.")
    if not out.is_dir() or not content_of(out):
        return
    if finished(summary):
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        raise ValueError(f"The conversion in {out} is finished; there is nothing to resume.")
    if not begun and not summary:
        raise OptionError("{folder} holds no conversion to resume; give {out} the folder of one.", folder=out)
    ours = settings(config, json.loads(json.dumps(asdict(config))))
    theirs = settings(config, summary["arguments"]) if summary else ours
    for key in ours:
        if theirs.get(key) != ours[key]:
            raise OptionError(
                "{folder} is of a conversion with {key} {theirs}, but this one has {key} {ours}; repeat the options of "
                "that conversion, or give {out} a new folder.",
                folder=out,
                key=key,
                theirs=theirs.get(key),
                ours=ours[key],
            )
