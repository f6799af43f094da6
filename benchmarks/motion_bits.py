"""What a flow does not foresee of toybox: bits per latent frame above the drawn noise, by motion; and what a pixel is worth.

    python benchmarks/motion_bits.py [--model mini] [--count 16]

A clip that is known but for its data noise would cost the entropy of that noise. What is above it is what the flow cannot tell from the
frames before: of a thing that stays still, how clean frames look; of one that circles, where it will be, too. The second table says
what a wrong guess of so many pixels costs, |Δx|² / 2σ² in bits: the difference in latents between clips that are shifted by it.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace

import torch
from torch import Tensor

from reelflow.data.scene import Scene, sample_scene
from reelflow.data.toybox import CLIP, canonical, render
from reelflow.likelihood import HALF_LOG_TAU, add_noise
from reelflow.pipelines import load
from reelflow.pipelines.starflow import StarFlowPipeline

SEED, BATCH = 30_000, 8
MOTIONS, SHIFTS = ("stays still", "moves left", "bounces", "circles"), (0.25, 0.5, 1.0, 2.0)


def scenes(motion: str, count: int) -> list[Scene]:
    """Of one thing, without a wall."""
    drawn = (sample_scene(SEED, index, things=1, motions=(motion,)) for index in range(10 * count))
    return [scene for scene, _ in zip((s for s in drawn if s.wall is None), range(count), strict=False)]


@torch.no_grad()
def above_noise(pipe: StarFlowPipeline, shown: list[Scene], seed: int = 0) -> Tensor:
    """Bits of every latent frame (F,) above those of its own noise, averaged over the scenes."""
    std = pipe.flow.config.noise_std
    found = []
    for start in range(0, len(shown), BATCH):
        some = shown[start : start + BATCH]
        clean = pipe.codec.encode(render(some, CLIP)).cpu()
        noisy = add_noise(clean, std, torch.Generator().manual_seed(seed + start))
        z, log_det = pipe.flow(noisy.to(pipe.device), pipe.prompting.states([canonical(scene) for scene in some], "1:1", image=False))
        nats = (0.5 * z.square() - log_det + HALF_LOG_TAU).cpu()
        noise = 0.5 * ((noisy - clean) / std).square() + math.log(std) + HALF_LOG_TAU
        found.append((nats - noise).flatten(2).sum(2) / math.log(2))
    return torch.cat(found).mean(0)


def worth(pipe: StarFlowPipeline, shown: list[Scene], shift: float) -> float:
    """Bits per latent frame of being wrong by so many pixels downwards."""
    moved = [replace(scene, things=(replace(scene.things[0], y=scene.things[0].y + shift),)) for scene in shown]
    one, other = (pipe.codec.encode(render(some, CLIP)) for some in (shown, moved))
    squares = (one - other).square().sum((2, 3, 4)).mean()
    return float(squares / (2 * pipe.flow.config.noise_std**2 * math.log(2)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini", help="packaged name or folder (default: mini)")
    parser.add_argument("--count", type=int, default=16, help="clips of each motion (default: 16)")
    options = parser.parse_args()
    pipe = load(options.model)
    assert isinstance(pipe, StarFlowPipeline)
    frames = [above_noise(pipe, scenes(motion, options.count)) for motion in MOTIONS]
    print(f"{pipe.about.name}, data noise {pipe.flow.config.noise_std:g}, {options.count} clips a row\n")
    print(f"| bits above the noise, latent frame | {' | '.join(map(str, range(1, 1 + len(frames[0]))))} | mean |")
    print("|---" * (2 + len(frames[0])) + "|")
    for motion, bits in zip(MOTIONS, frames, strict=True):
        print(f"| {motion} | {' | '.join(f'{value:.0f}' for value in bits.tolist())} | {bits.mean():.0f} |")
    print("\n| a thing that many pixels off | bits a latent frame |\n|---|---|")
    for shift in SHIFTS:
        print(f"| {shift:g} | {worth(pipe, scenes('moves left', options.count), shift):.0f} |")


if __name__ == "__main__":
    main()
