"""How well a flow knows where things go: the first half of a true clip continued, and how far from its true place the thing then is.

    python benchmarks/motion_ahead.py [--model mini] [--count 24] [--temperature 0.8]

Of one thing and no wall, pixels of 128 in the last frame of every new latent frame (4 frames, a quarter of a second), median over the
clips. What is off in the first of them was not foreseen from a true past; later ones also build on what is off before.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
from motion_bits import MOTIONS, scenes

from reelflow.data.scene import Scene
from reelflow.data.toybox import CLIP, FPS, canonical
from reelflow.evaluation.detect import detect
from reelflow.evaluation.toybox import shown
from reelflow.pipelines import load
from reelflow.pipelines.starflow import Sampling, StarFlowPipeline

KNOWN = 17


def off(pipe: StarFlowPipeline, some: Sequence[Scene], sampling: Sampling) -> np.ndarray:
    """Pixels at the end of every new latent frame, (clips, latent frames); NaN where nothing is seen."""
    found = np.full((len(some), CLIP - KNOWN), np.nan)
    for index, scene in enumerate(some):
        whole = shown(scene)
        clip = pipe.extend(whole[:KNOWN], canonical(scene), seconds=CLIP / FPS, seed=index, sampling=sampling)
        true, seen = detect(whole.frames, 1)[0], detect(clip.frames, 1)
        if seen:
            there = seen[0].present[KNOWN:CLIP] & true.present[KNOWN:CLIP]
            apart = np.hypot(*(seen[0].track - true.track)[KNOWN:CLIP].T)
            found[index, there] = apart[there]
    step = pipe.codec.temporal_factor
    return found[:, step - 1 :: step]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini", help="packaged name or folder (default: mini)")
    parser.add_argument("--count", type=int, default=24, help="clips of each motion (default: 24)")
    parser.add_argument("--temperature", type=float, help="of the noise (default: the model's own)")
    options = parser.parse_args()
    pipe = load(options.model)
    assert isinstance(pipe, StarFlowPipeline)
    print("| pixels off, after latent frames | 1 | 2 | 3 | 4 | lost |\n|---|---|---|---|---|---|")
    for motion in MOTIONS:
        pixels = off(pipe, scenes(motion, options.count), Sampling(temperature=options.temperature))
        numbers = " | ".join(f"{value:.1f}" for value in np.nanmedian(pixels, 0))
        print(f"| {motion} | {numbers} | {np.isnan(pixels).any(1).sum()} |", flush=True)


if __name__ == "__main__":
    main()
