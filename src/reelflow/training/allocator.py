"""What the C library does with memory that a step of training has freed."""

from __future__ import annotations

import ctypes
import sys

SETTINGS = {-4: 0, -1: 2**31 - 1, -2: 2**28}
"""Of glibc's mallopt: M_MMAP_MAX blocks of their own, M_TRIM_THRESHOLD and M_TOP_PAD bytes."""


def keep_freed_memory() -> bool:
    """Have it kept for the next step's tensors, for the rest of this process. Returns whether the system can.

    glibc maps large blocks one by one and gives each back when it is freed, so that every step has the kernel clear its pages
    anew (benchmarks/training_step.py). The most that is held stays what it was.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    return mallopt is not None and all(mallopt(what, value) for what, value in SETTINGS.items())
