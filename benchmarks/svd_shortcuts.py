"""What the ways to less work with Stable Video Diffusion save and change, on one model and the pictures it was made for.

    python benchmarks/svd_shortcuts.py --model runs/mini_svd/model [--pictures 8] [--frames 14] [--threads 2]

Every way animates the same pictures with the same seeds. Time is that of sampling, without encoding and decoding, the median over the
pictures against the usual one's, taken in turns. Two distances in decibels (PSNR of all frames): from the usual clip, and from the clip
of 200 steps, which is the one that all of them approximate.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable

import numpy as np
import torch

import reelflow
from reelflow import Clip
from reelflow.data.toybox import render, sample_scene
from reelflow.pipelines.svd import Diffusion

WAYS = {
    "25 steps, the usual": Diffusion(),
    "10 steps": Diffusion(steps=10),
    "10 steps, ays": Diffusion(steps=10, schedule="ays"),
    "guided at 0.5-50": Diffusion(guided=(0.5, 50.0)),
    "reuse 2": Diffusion(reuse=2),
    "reuse 3": Diffusion(reuse=3),
    "10 steps, ays, reuse 2": Diffusion(steps=10, schedule="ays", reuse=2),
}
EXACT = Diffusion(steps=200)


def decibels(one: Clip, other: Clip) -> float:
    error = np.square(one.frames.astype(np.float64) - other.frames).mean()
    return float(10 * np.log10(255**2 / max(error, 1e-3)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or name of a trained model")
    parser.add_argument("--pictures", type=int, default=8, help="from 1 (default: 8)")
    parser.add_argument("--frames", type=int, help="(default: the trained number)")
    parser.add_argument("--threads", type=int, help="of the processor (default: all)")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    pipe = reelflow.load(options.model)
    scenes = [sample_scene(11, index, split="any") for index in range(options.pictures)]
    pictures = [render([scene], 1)[0, 0].numpy() for scene in scenes]
    make: Callable[[int, Diffusion], Clip] = lambda i, how: pipe.animate(pictures[i], seed=i, frames=options.frames, sampling=how)  # noqa: E731
    make(0, Diffusion(steps=1))
    rows: dict[str, list[tuple[float, float, float]]] = {name: [] for name in WAYS}
    for i in range(options.pictures):
        exact, usual, took = make(i, EXACT), None, 0.0
        for name, how in WAYS.items():
            clip = make(i, how)
            seconds = clip.metadata["seconds"]["sampling"]
            if usual is None:
                usual, took = clip, seconds
            rows[name].append((seconds / took, decibels(clip, usual), decibels(clip, exact)))
    sys.stdout.write("| way | time | from the usual | from 200 steps |\n| --- | --- | --- | --- |\n")
    for name, found in rows.items():
        time, usual_db, exact_db = (statistics.median(column) for column in zip(*found, strict=True))
        same = "–" if usual_db > 60 else f"{usual_db:.1f} dB"
        sys.stdout.write(f"| {name} | {time:.2f} × | {same} | {exact_db:.1f} dB |\n")


if __name__ == "__main__":
    main()
