"""`python -m regla.study FOLDER`: one run of a study, see `regla.study.worker`."""

import signal
import sys
from types import FrameType

from regla.runtime.signals import Interrupted
from regla.study.worker import main


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise Interrupted(signum)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _terminate)  # also before and after the training loop: 143 and no traceback
    sys.exit(main())
