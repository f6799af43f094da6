"""The command line: parse, call, print. What a command does is in the library; `reelflow COMMAND --help` says what it takes."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit code: 0 done, 1 failure, 2 wrong usage or bad input, 130 interrupted."""
    from reelflow.cli.app import run

    if argv is None and sys.argv[1:2] == ["train"]:  # a process of its own
        from reelflow.training.allocator import keep_freed_memory

        keep_freed_memory()
    return run(argv)
