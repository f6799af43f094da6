"""What is off is measured in pixels of the last frame of every latent frame; what is not seen is not a number."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from motion_ahead import KNOWN, off
from motion_bits import scenes

from reelflow.clip import Clip
from reelflow.data.scene import Scene
from reelflow.evaluation.toybox import shown
from reelflow.pipelines.starflow import Sampling


@pytest.mark.parametrize("pixels", [0.0, 3.0])
def test_a_shifted_course_is_off_by_the_shift(pixels: float) -> None:
    some = [scene for scene in scenes("stays still", 4) if scene.things[0].y < 100]
    found = off(continued(some, pixels), some, Sampling())
    assert found.shape == (len(some), 4)
    assert found == pytest.approx(pixels, abs=0.3)


def test_what_is_gone_is_not_a_number() -> None:
    some = scenes("circles", 2)
    assert np.isnan(off(continued(some, None), some, Sampling())).all()


def continued(some: list[Scene], pixels: float | None) -> Any:
    """A pipeline that goes on with the true clips, so many pixels lower, or (None) without the thing."""

    def extend(clip: Clip, prompt: str, *, seconds: float, seed: int, sampling: Sampling) -> Clip:
        thing = some[seed].things[0]
        frames = shown(replace(some[seed], things=(replace(thing, y=thing.y + (pixels or 0)),))).frames
        if pixels is None:
            frames = np.broadcast_to(frames[:1, :1, :1], frames.shape)
        assert len(clip) == KNOWN
        return Clip(np.ascontiguousarray(frames), 16)

    return SimpleNamespace(extend=extend, codec=SimpleNamespace(temporal_factor=4))
