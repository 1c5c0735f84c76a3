"""Ctrl-C and SIGTERM end a run between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType


class Interrupted(KeyboardInterrupt):
    """A run was ended by signal `signum`; the exit code of a process is then 128 + signum."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class Signals:
    """While it is open, the first SIGINT or SIGTERM is only noted in `received`; a second raises Interrupted.

    So no update and no file is cut short. patient: so is a second; a launcher passes on what the terminal has sent to
    all of its processes. Signals reach the main thread alone; in any other it does nothing.
    """

    def __init__(self, *, patient: bool = False) -> None:
        self.received: int | None = None
        self._patient = patient

    def __enter__(self) -> Signals:
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.received is not None and not self._patient:
            raise Interrupted(signum)
        self.received = signum
