"""Memory that a step has freed serves the next one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
import torch
from reelflow.training.allocator import keep_freed_memory

torch.set_num_threads(1)
kept = sys.argv[1] == "keep" and keep_freed_memory()

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(16 * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
print(kept, faults())
"""


def run(how: str) -> tuple[bool, int]:
    command = [sys.executable, "-c", SCRIPT, how]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}  # the C library's own settings
    kept, faults = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120, env=environment).stdout.split()
    return kept == "True", int(faults)


def test_the_same_pages_are_used_again() -> None:
    kept, faults = run("keep")
    if not kept:
        pytest.skip("the C library is not glibc")
    assert faults < 0.1 * run("leave")[1], "which are 64 MiB, twenty times over"
