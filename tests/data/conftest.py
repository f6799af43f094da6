"""Small videos and pictures with captions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from reelflow.clip import Clip


def moving(frames: int, height: int, width: int, seed: int) -> np.ndarray:
    """Coarse noise, no two frames alike."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 255, (frames, -(-height // 8), -(-width // 8), 3), np.uint8)
    return small.repeat(8, 1).repeat(8, 2)[:, :height, :width]


@pytest.fixture(scope="session")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """wide.mp4 (96 × 48, 24 frames, 12 per second), tall.mp4 (48 × 80, 12 frames, 8 per second), short.mp4 (3 frames), still.png."""
    folder = tmp_path_factory.mktemp("media")
    Clip(moving(24, 48, 96, 0), 12).save(folder / "wide.mp4")
    Clip(moving(12, 80, 48, 1), 8).save(folder / "tall.mp4")
    Clip(moving(3, 64, 64, 2), 8).save(folder / "short.mp4")
    Clip(moving(1, 40, 56, 3), 8).save(folder / "still.png")
    return folder
