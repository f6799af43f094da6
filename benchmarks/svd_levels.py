"""At which noise levels a Stable Video Diffusion loses what its picture shows: true toybox clips in noise of level σ, sampled from there.

    python benchmarks/svd_levels.py [--model mini-svd] [--count 32]

What is kept from a level is what all lower ones keep; where a row falls off, more training at the levels just below it
(`p_mean`, `p_std`) is what helps. Clips of 14 frames at 12 per second, the motion strength of each its own, 25 steps, no guidance.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from reelflow.data.scene import FPS, Scene
from reelflow.data.toybox import render
from reelflow.evaluation.detect import detect
from reelflow.evaluation.toybox_svd import FRAMES, LAST, pictured
from reelflow.pipelines import load
from reelflow.pipelines.svd import Diffusion, SvdPipeline
from reelflow.pipelines.svd.picture import clip_view
from reelflow.pipelines.svd.sampling import rows, velocity
from reelflow.pipelines.svd.settings import REFERENCES, euler
from reelflow.training.svd.data import motion_strength, speeds

LEVELS, RATE = (1.0, 2.5, 5.0, 10.0, 25.0, 100.0), 12


@torch.no_grad()
def from_level(pipe: SvdPipeline, scene: Scene, level: float, seed: int) -> tuple[float, Tensor]:
    """The level that was begun from, the greatest of the schedule's up to `level`, and the frames (F, 3, S, S)."""
    shown = render([scene], FRAMES, min(pipe.own_size), pace=FPS / RATE)[0].permute(0, 3, 1, 2).float() / 127.5 - 1
    sampling = Diffusion(motion=motion_strength(float(speeds(shown).mean()) * RATE))
    clean = pipe.encoder(shown)[None].float() * pipe.decoder.scaling_factor
    generator = torch.Generator().manual_seed(seed)
    picture = pipe.encoder(shown[:1] + sampling.noise_aug * torch.randn(shown[:1].shape, generator=generator))
    weight = pipe.image_encoder.visual_projection.weight
    states = pipe.image_encoder(clip_view(shown[:1], *pipe.clip_norm).to(weight.dtype)).image_embeds
    times, steps, _ = euler(pipe.scheduler, sampling.steps)
    first = next(index for index, step in enumerate(steps) if step.sigma <= level)
    ids = [RATE - 1.0, float(sampling.motion), sampling.noise_aug]
    given = pipe.denoiser.conditions(picture, states, ids, times, FRAMES, False, REFERENCES[sampling.reference])
    x = clean + steps[first].sigma * torch.randn(clean.shape, generator=generator)
    for index, step in enumerate(steps[first:], first):
        v, _ = velocity(pipe.denoiser, x * step.scale, rows(given), torch.tensor([index]), None)
        x = x * step.keep + v * step.move
    return steps[first].sigma, pipe.decoder(x)[0]


def kept(scene: Scene, frames_F3SS: Tensor) -> tuple[bool, bool]:
    """Whether shape and colour are the scene's in the last frames."""
    pixels = ((frames_F3SS[-LAST:].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    seen, thing = detect(pixels, 1), scene.things[0]
    return any(one.shape == thing.shape for one in seen), any(one.colour == thing.colour for one in seen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini-svd", help="packaged name or folder (default: mini-svd)")
    parser.add_argument("--count", type=int, default=32, help="clips of each level (default: 32)")
    options = parser.parse_args()
    pipe = load(options.model, "cpu", "bfloat16")
    assert isinstance(pipe, SvdPipeline)
    print("| σ | shape kept | colour kept |\n|---|---|---|")
    for level in LEVELS:
        found = []
        for seed, scene in enumerate(pictured(options.count, "train")):
            sigma, frames = from_level(pipe, scene, level, seed)
            found.append(kept(scene, frames))
        shape, colour = torch.tensor(found).float().mean(0).tolist()
        print(f"| {sigma:.2f} | {shape:.0%} | {colour:.0%} |", flush=True)


if __name__ == "__main__":
    main()
