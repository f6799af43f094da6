"""How much of an edit's target is read off its source: bits a latent frame costs more with the source of another edit.

    python benchmarks/edit_source.py [--model mini] [--count 16]

First after the target's true frames, which tell most of what comes next; then, for the frame in the middle, after frames of a motion
that goes only 0.6 times as far: as after frames that a sampler got wrong, only the source says where the thing should be.
"""

from __future__ import annotations

import argparse
import math
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from reelflow.data.scene import Scene
from reelflow.data.toybox import CLIP, edit_pair, render
from reelflow.likelihood import add_noise
from reelflow.pipelines import load
from reelflow.pipelines.starflow import StarFlowPipeline

SEED, BATCH, PACE = 30_000, 8, 0.6


def pairs(count: int) -> list[tuple[Scene, Scene, str]]:
    """Edits of one thing that moves, without a wall."""
    drawn = (edit_pair(SEED, index) for index in range(100 * count))
    plain = (pair for pair in drawn if len(pair[0].things) == 1 and pair[0].wall is None)
    return list(islice((pair for pair in plain if pair[0].things[0].motion != "stays still"), count))


def slowed(frames_BFChw: Tensor, until: int) -> Tensor:
    """With the frames 1 … until − 1 of a motion that goes `PACE` times as far."""
    order = np.arange(frames_BFChw.shape[1])
    order[1:until] = np.rint(order[1:until] * PACE).clip(1)
    return frames_BFChw[:, order]


@torch.no_grad()
def bits(pipe: StarFlowPipeline, source: Tensor, target: Tensor, words: list[str]) -> Tensor:
    """Of every latent frame of the target, (B, F), up to a constant."""
    z, log_det = pipe.flow(torch.cat((source, target), 1), pipe.prompting.states([f"(v2v) {text}" for text in words], "1:1", image=False))
    return (0.5 * z.square() - log_det).flatten(2).sum(2)[:, source.shape[1] :] / math.log(2)


def gains(pipe: StarFlowPipeline, edits: list[tuple[Scene, Scene, str]], frames: int = CLIP) -> tuple[list[float], float]:
    """Bits saved by the own source: of every latent frame of the target; of the middle one after frames that went astray."""
    plain, astray = [], []
    for start in range(0, len(edits), BATCH):
        before, after, words = zip(*edits[start : start + BATCH], strict=True)
        generator = torch.Generator().manual_seed(start)
        source, target = (
            add_noise(pipe.codec.encode(render(scenes, frames)).cpu(), pipe.flow.config.noise_std, generator).to(pipe.device)
            for scenes in (before, after)
        )  # fmt: skip
        half, other = target.shape[1] // 2 + 1, source.roll(1, 0)
        plain.append(bits(pipe, other, target, list(words)) - bits(pipe, source, target, list(words)))
        drifted = slowed(target, half)
        astray.append((bits(pipe, other, drifted, list(words)) - bits(pipe, source, drifted, list(words)))[:, half])
    return torch.cat(plain).mean(0).tolist(), float(torch.cat(astray).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini", help="packaged name or folder (default: mini)")
    parser.add_argument("--count", type=int, default=16, help="edits (default: 16)")
    options = parser.parse_args()
    pipe = load(options.model)
    assert isinstance(pipe, StarFlowPipeline)
    plain, astray = gains(pipe, pairs(options.count))
    print(f"{pipe.about.name}, {options.count} edits of {CLIP} frames, bits a latent frame that the source saves\n")
    print(f"| {' | '.join(map(str, range(1, 1 + len(plain))))} | {len(plain) // 2 + 2}, after frames that went astray |")
    print("|---" * (1 + len(plain)) + "|")
    print(f"| {' | '.join(f'{value:.0f}' for value in plain)} | {astray:.0f} |")


if __name__ == "__main__":
    main()
