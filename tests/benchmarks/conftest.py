"""The scripts of benchmarks/ and examples/ as modules."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("benchmarks", "examples")]
tiny = runpy.run_path(str(Path(__file__).parents[1] / "pipelines" / "tiny.py"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny["write_tiny"](tmp_path_factory.mktemp("model") / "tiny")
