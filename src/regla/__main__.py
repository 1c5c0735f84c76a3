"""`python -m regla` is the command `regla`."""

import sys

from regla.cli import main

sys.exit(main())
