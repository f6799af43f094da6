"""True clips are as asked and as various as their scenes; clips that stand still on one place are neither."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from temperature import circles, made, spread

from reelflow.clip import Clip
from reelflow.data.scene import DIRECTIONS, Scene
from reelflow.evaluation.toybox import scenes, shown
from reelflow.pipelines.starflow import Sampling


def showing(some: list[Scene]) -> Any:
    """A pipeline whose clip of a seed shows that scene."""

    def generate_batch(prompts: list[str], seeds: list[int], *, sampling: Sampling) -> list[Clip]:
        assert sampling.temperature == 0.5
        return [shown(some[seed]) for seed in seeds]

    return SimpleNamespace(generate_batch=generate_batch)


def test_true_clips() -> None:
    some = scenes(12, "train", 1)
    share, places, speeds = made(showing(some), some, 0.5)
    assert share == 1
    assert places == pytest.approx(spread([np.array((s.things[0].x, s.things[0].y)) for s in some]), abs=1)
    asked = [np.hypot(s.things[0].vx, s.things[0].vy) for s in some if s.things[0].motion in DIRECTIONS]
    assert speeds == pytest.approx(np.std(asked), abs=0.2)


def test_one_clip_for_all() -> None:
    some = scenes(6, "train", 1)
    still = replace(some[0].things[0], motion="stays still", vx=0.0, vy=0.0, turn=0.0, x=64.0, y=64.0)
    share, places, speeds = made(showing([replace(some[0], things=(still,))] * 6), some, 0.5)
    assert share < 0.5
    assert places < 0.1
    assert speeds < 0.1


def test_circles_are_the_same_for_every_count() -> None:
    assert [scene.things[0].motion for scene in circles(48)] == ["circles"] * 48
    assert circles(5)[:3] == circles(3)
