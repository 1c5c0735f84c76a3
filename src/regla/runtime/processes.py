"""How many processes a command runs in."""

from __future__ import annotations

import os


def check_one_process(command: str) -> None:
    """Raise ValueError where a launcher such as torchrun has started several processes of a command that writes."""
    world = os.environ.get("WORLD_SIZE", "")
    if world.isdecimal() and int(world) > 1:
        raise ValueError(
            f"`regla {command}` runs in one process, but a launcher started {world} (WORLD_SIZE={world}); "
            "start it without torchrun."
        )
