"""The models in the package: small, safe to load, described, and the trained ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import reelflow
from reelflow.adapters.hub import PACKAGED, packaged
from reelflow.clip import Clip
from reelflow.data.toybox import canonical, render, sample_scene
from reelflow.evaluation.card import describe
from reelflow.evaluation.detect import detect
from reelflow.evaluation.toybox import psnr
from reelflow.evaluation.toybox_svd import pictured
from reelflow.pipelines.svd import Diffusion


def test_they_are_small_and_hold_no_code() -> None:
    files = [path for path in PACKAGED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 80e6
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jsonl", ".md"}


@pytest.mark.parametrize("name", packaged())
def test_each_says_what_it_is(name: str) -> None:
    found = describe(name)
    assert found["licence"] == "Apache-2.0"
    assert all(heading in found["readme"] for heading in ("## How it was trained", "## What was measured", "## What it cannot do"))


def test_mini_knows_toybox() -> None:
    """Its codec gives a clip back, and its flow finds it probable with its own caption, less so with another, or out of order."""
    scene = sample_scene(7, 3, split="train", things=1)
    pipe, clip = reelflow.load("mini", "cpu"), Clip(render([scene], 33)[0].numpy(), 16)
    assert psnr(pipe.codec.decode(pipe.codec.encode(torch.from_numpy(clip.frames)[None]))[0].numpy(), clip.frames) > 32
    own = pipe.score(clip, canonical(scene)).bits_per_dim
    assert own < -0.55  # the noise alone has −0.69
    assert pipe.score(clip, "a small white star circles on a navy background").bits_per_dim > own
    shuffled = Clip(clip.frames[np.random.default_rng(0).permutation(33)], 16)
    assert pipe.score(shuffled, canonical(scene)).bits_per_dim > own


def test_mini_svd_sets_a_picture_in_motion() -> None:
    """From the picture on, the thing keeps its colour and goes as far as it is told to."""
    scene = pictured(1, "train")[0]
    pipe, picture = reelflow.load("mini-svd", "cpu"), render([scene], 1)[0, 0].numpy()
    ways = []
    for motion in (20, 220):
        clip = pipe.animate(picture, seed=0, frames=9, sampling=Diffusion(steps=10, motion=motion))
        assert psnr(clip.frames[0], picture) > 26
        thing = detect(clip.frames)[0]
        assert (thing.colour, thing.background) == (scene.things[0].colour, scene.background)
        assert thing.present.all()
        ways.append(float(np.hypot(*np.diff(thing.track, axis=0).T).sum()))
    assert ways[1] > 2 * ways[0]
