"""What a lower temperature brings and costs: how often clips are as asked, and how various they are.

    python benchmarks/temperature.py [--model mini] [--count 48] [--temperatures 1 0.8 0.6 0.4] [--precision bfloat16]

Scenes and seeds of `reelflow evaluate toybox`, as many of one thing that circles, of one thing and of two. Variety is measured on the
second: the deviation of places in the first frame, of both axes, and of speeds of what goes straight, in pixels of 128 (per frame);
the last row says it of the scenes that the prompts are of, whose places and speeds no prompt tells.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np

from reelflow.data.scene import DIRECTIONS, Scene
from reelflow.data.toybox import canonical
from reelflow.evaluation.detect import detect, matches
from reelflow.evaluation.toybox import scenes
from reelflow.pipelines import load
from reelflow.pipelines.starflow import Sampling, StarFlowPipeline

BATCH = 8


def circles(number: int) -> list[Scene]:
    """Of one thing, from the same series, of which a seventh circles."""
    return [scene for scene in scenes(20 * number, "train", 1) if scene.things[0].motion == "circles"][:number]


def made(pipe: StarFlowPipeline, asked: Sequence[Scene], temperature: float) -> tuple[float, float, float]:
    """Share of clips that are as asked, in all but size; the deviation of first places, and of speeds."""
    right, places, speeds = [], [], []
    for start in range(0, len(asked), BATCH):
        some = asked[start : start + BATCH]
        seeds = list(range(start, start + len(some)))
        clips = pipe.generate_batch([canonical(scene) for scene in some], seeds, sampling=Sampling(temperature=temperature))
        for clip, scene in zip(clips, some, strict=True):
            found = detect(clip.frames, len(scene.things))
            right.append(matches(found, scene)["all"])
            if found and found[0].present[0]:
                places.append(found[0].track[0])
            if found and scene.things[0].motion in DIRECTIONS and found[0].present[:5].all():
                speeds.append(np.hypot(*(found[0].track[4] - found[0].track[0])) / 4)
    return float(np.mean(right)), spread(places), float(np.std(speeds))


def spread(places: Sequence[np.ndarray]) -> float:
    """Deviation (root mean square over both axes) of places (x, y)."""
    return float(np.sqrt(np.var(places, 0).mean()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini", help="packaged name or folder (default: mini)")
    parser.add_argument("--count", type=int, default=48, help="clips of each kind (default: 48)")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[1.0, 0.8, 0.6, 0.4], help="(default: 1 0.8 0.6 0.4)")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="(default: float32)")
    options = parser.parse_args()
    pipe = load(options.model, None, options.precision)
    assert isinstance(pipe, StarFlowPipeline)
    one, two, circling = scenes(options.count, "train", 1), scenes(options.count, "train", 2), circles(options.count)
    print("| temperature | one that circles | one thing | two things | deviation of places | of speeds |\n|---|---|---|---|---|---|")
    for temperature in options.temperatures:
        (share, places, speeds), pairs = made(pipe, one, temperature), made(pipe, two, temperature)[0]
        circled = made(pipe, circling, temperature)[0]
        print(f"| {temperature:g} | {circled:.0%} | {share:.0%} | {pairs:.0%} | {places:.1f} | {speeds:.2f} |", flush=True)
    things = [scene.things[0] for scene in one]
    speeds = np.std([np.hypot(thing.vx, thing.vy) for thing in things if thing.motion in DIRECTIONS])
    print(f"| the scenes | | | | {spread([np.array((thing.x, thing.y)) for thing in things]):.1f} | {speeds:.2f} |")


if __name__ == "__main__":
    main()
