"""A folder of small captioned clips, and a tiny model to prepare them for."""

from __future__ import annotations

import runpy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reelflow.clip import Clip
from reelflow.training.config import TrainConfig

PIPELINES = runpy.run_path(str(Path(__file__).parent.parent / "pipelines" / "tiny.py"))
BUCKETS = [
    {"task": "generate", "frames": 3, "batch": 2}, {"task": "image", "batch": 3}, {"task": "extend", "frames": 2, "batch": 2},
]  # fmt: skip


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 × 64 pixels, any aspect, 9 frames at 8 per second: 3 latent frames of 8 channels."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    return PIPELINES["write_tiny"](folder, prompt={"fps": True, "aspect": True})


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips of 9 and 17 frames at 8 per second, three wide and four square, and a still; each with its caption beside."""
    folder = tmp_path_factory.mktemp("recorded")
    rng = np.random.default_rng(0)
    for index in range(8):
        frames, width = (1, 64) if index == 7 else ((9, 17)[index % 2], 112 if index < 3 else 64)
        noise = rng.integers(0, 255, (frames, 8, width // 8, 3), np.uint8).repeat(8, 1).repeat(8, 2)
        Clip(noise, 8).save(folder / f"{index}.{'png' if frames == 1 else 'mp4'}")
        (folder / f"{index}.txt").write_text(f"clip {index}")
    return folder


@pytest.fixture
def clips(recorded: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(recorded, tmp_path / "clips"))


def configure(model: Path, clips: Path, latents: Path | None, data: dict[str, Any] | None = None, **more: Any) -> TrainConfig:
    values = {
        "init": str(model), "latents": latents and str(latents), "data": {"folder": str(clips), **(data or {})},
        "stages": [{"steps": 40, "buckets": BUCKETS}], "precision": "float32", "text_drop": 0.0,
    }  # fmt: skip
    return TrainConfig.parse(values | more)
