"""`python -m regla.report readme|plots`: the tables and plots of the documentation, from what benchmarks/ holds."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from regla.report.documents import draw, update


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m regla.report", description=__doc__)
    parser.add_argument("what", choices=["readme", "plots"], help="tables of README.md and docs/results, or plots")
    parser.add_argument("--root", type=Path, default=Path(), metavar="DIR", help="the checkout (default: this folder)")
    args = parser.parse_args(argv)
    try:
        changed = update(args.root) if args.what == "readme" else draw(args.root)
    except ValueError as error:
        print(f"regla.report: error: {error}", file=sys.stderr)
        return 2
    print("\n".join(f"rewritten: {file}" for file in changed) or "All tables are up to date.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
