"""One tiny model for all tests of pipelines."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

import reelflow
from reelflow import Clip
from reelflow.pipelines.starflow import StarFlowPipeline

tiny = runpy.run_path(str(Path(__file__).with_name("tiny.py")))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny["write_tiny"](tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def pipe(tiny_model: Path) -> StarFlowPipeline:
    loaded = reelflow.load(tiny_model, "cpu")
    assert isinstance(loaded, StarFlowPipeline)
    return loaded


@pytest.fixture(scope="session")
def source(pipe: StarFlowPipeline) -> Clip:
    """A clip at the model's own size and rate, 9 frames."""
    return pipe.generate("a red ball", seed=1)
