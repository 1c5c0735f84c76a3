"""How far a run has come: steps, losses, time."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

READ_EVERY = 10  # steps between looks at the loss, each of which waits for the device
FINAL_STEPS = 20  # steps whose mean is the final training loss
WINDOW = 100  # steps that a spike is compared with, and among which skipped ones are counted
CALMER = "lower --lr or lengthen --warmup"


@dataclass
class Progress:
    """What a run has done so far; right also after an error or an interrupt."""

    steps: int = 0
    """Of the whole run; those before a resume count."""
    losses: list[float] = field(default_factory=list)
    """The loss of each step that was not skipped in nats, before its update; of those before a resume only the last
    WINDOW."""
    seconds: list[float] = field(default_factory=list)
    """Of training, from the start of this process's first step to the end of each (on a GPU: of each group read
    together)."""
    seconds_aside: float = 0.0
    """Of this process, on checkpoints and evaluations between steps."""
    seconds_before: float = 0.0
    """Spent before a resume."""
    skipped: int = 0
    """Steps passed over, as their loss or gradient was not finite."""
    skipped_lately: list[int] = field(default_factory=list)
    """Which of the last WINDOW steps."""
    spikes: int = 0
    """Steps whose loss was far above those before."""

    def note_time(self, steps: int, started: float) -> None:
        """Note when the latest steps were done, which the device has finished."""
        self.seconds.extend([time.perf_counter() - started - self.seconds_aside] * steps)

    @property
    def train_loss(self) -> float | None:
        """Mean of the last 20 steps that were not skipped."""
        last = self.losses[-FINAL_STEPS:]
        return sum(last) / len(last) if last else None

    @property
    def total_seconds(self) -> float:
        return self.seconds_before + (self.seconds[-1] if self.seconds else 0.0) + self.seconds_aside

    def tokens_per_second(self, tokens_per_step: int) -> float | None:
        """Of this process, without its first ten steps (compilation, cold caches) where there are more, and without
        checkpoints and evaluations."""
        first = READ_EVERY if len(self.seconds) > READ_EVERY else 0
        if not self.seconds:
            return None
        seconds = self.seconds[-1] - (self.seconds[first - 1] if first else 0.0)
        return (len(self.seconds) - first) * tokens_per_step / seconds
