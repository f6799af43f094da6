"""How well the detector reads true renders: clean, degraded as a lossy codec might, late in long clips, and of true
courses drawn unevenly.

    python -m reelflow.evaluation.validate [--clips 512] [--size 128]

Legend: F frames, H height, W width. Lengths are in pixels of a 128 x 128 frame unless said otherwise.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
import torch
from torch import Tensor

from reelflow.data.render import render, simulate
from reelflow.data.scene import MOTIONS, sample_scene
from reelflow.evaluation.detect import detect, gaussian_blur, matches
from reelflow.evaluation.motion import motion_of
from reelflow.evaluation.toybox import goes_on, scenes


def degrade(frames: Tensor, seed: int, blur: float = 1.0, noise: float = 8.0, shift: float = 25.0) -> Tensor:
    """A clip as a lossy codec might return it, uint8 (F, H, W, 3): blurred, every colour channel off by up to `shift`, noisy."""
    rng = torch.Generator().manual_seed(seed)
    soft = gaussian_blur(frames.to(torch.float32), blur)
    soft += shift * (2 * torch.rand(3, generator=rng) - 1)
    return (soft + noise * torch.randn(soft.shape, generator=rng)).round().clamp(0, 255).to(torch.uint8)


def validate(clips: int, things: int, degraded: bool, size: int = 128) -> dict[str, float]:
    """Shares of true renders that are read correctly, by attribute; "all" includes the size. No walls with two things."""
    scenes = (sample_scene(1, index, split="any", things=things) for index in range(100 * clips))
    chosen = [scene for _, scene in zip(range(clips), (scene for scene in scenes if things == 1 or scene.wall is None), strict=False)]
    results = []
    for number, scene in enumerate(chosen):
        frames = render([scene], size=size)[0]
        results.append(matches(detect(degrade(frames, number) if degraded else frames, things), scene, size=True))
    return {key: sum(result[key] for result in results) / len(results) for key in results[0]}


def uneven(path: np.ndarray, off: float, rng: np.random.Generator, every: int = 4) -> np.ndarray:
    """A path (F, 2) drawn by an unsteady hand: every `every` frames off by `off` pixels (sd) in x and y, evenly between."""
    time = np.arange(len(path))
    knots = np.arange(0, len(path) + every, every)
    return path + np.stack([np.interp(time, knots, rng.normal(0, off, len(knots))) for _ in range(2)], -1)


def validate_motions(courses: int, off: float) -> dict[str, float]:
    """Shares of true courses, `off` pixels uneven (see `uneven`), whose motion is named right, by motion."""
    shares = {}
    for motion in MOTIONS:
        rng = np.random.default_rng(0)
        scenes = (sample_scene(2, index, split="any", things=1, motions=[motion]) for index in range(courses))
        names = [motion_of(uneven(path, off, rng), np.ones(len(path), bool)) for path in (simulate(scene)[:, 0] for scene in scenes)]
        shares[motion] = names.count(motion) / courses
    return shares


def validate_going_on(clips: int, degraded: bool) -> float:
    """Share of true renders, frames 448 to 480, of which it is read rightly whether the thing moves (`toybox.goes_on`)."""
    right = []
    for number, scene in enumerate(scenes(clips, "train", 1)):
        frames = render([scene], start=448)[0]
        right.append(goes_on(detect(degrade(frames, number) if degraded else frames), scene)["goes on"])
    return sum(right) / clips


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description="Share of toybox renders that the detector reads correctly.")
    parser.add_argument("--clips", type=int, default=512, help="clips per row, from 1 (default: 512)")
    parser.add_argument("--size", type=int, default=128, help="side of the frames in pixels, from 32 (default: 128)")
    options = parser.parse_args()
    head = ("colour", "shape", "size", "motion", "background", "all")
    sys.stdout.write(f"{'':28}" + "".join(f"{key:>12}" for key in head) + "\n")
    for things, degraded in ((1, False), (2, False), (1, True), (2, True)):
        shares = validate(options.clips, things, degraded, options.size)
        name = f"{'one thing' if things == 1 else 'two things'}, {'degraded' if degraded else 'clean'}"
        sys.stdout.write(f"{name:28}" + "".join(f"{100 * shares[key]:11.1f}%" for key in head) + "\n")
        sys.stdout.flush()
    sys.stdout.write(f"\n{'':28}{'goes on':>12}\n")
    for degraded in (False, True):
        name = f"frames 448 on, {'degraded' if degraded else 'clean'}"
        sys.stdout.write(f"{name:28}{100 * validate_going_on(options.clips, degraded):11.1f}%\n")
    sys.stdout.write(f"\n{'motion':28}" + "".join(f"{motion:>13}" for motion in MOTIONS) + "\n")
    for off in (0, 1, 2, 3):
        shares = validate_motions(options.clips, off)
        sys.stdout.write(f"{f'one course, {off} px off':28}" + "".join(f"{100 * shares[motion]:12.1f}%" for motion in MOTIONS) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
