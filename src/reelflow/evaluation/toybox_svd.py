"""How well a Stable Video Diffusion knows toybox: pictures of things set in motion, read back by the detector.

    reelflow evaluate toybox --model runs/mini_svd/model --count 128

Every picture and seed is fixed, so a number is a number of the model. What is asked of clips of 14 frames:

    kept, held_out   first frame against the picture (decibels, mean and the share above 28), and against the codec's own; thing kept:
                     in the last nine frames, and in the very last, the same colour and shape on the same ground;
                     held_out: colour–shape pairs that training never showed
    motion           pixels that things move from frame to frame, by motion strength; the same pictures and seeds for all
    fps              the same, by the rate the motion is meant for, at one motion strength
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from reelflow.data.scene import Scene, Split, sample_scene
from reelflow.data.toybox import render
from reelflow.evaluation.detect import detect
from reelflow.pipelines.svd import Diffusion, SvdPipeline
from reelflow.pipelines.svd.settings import USUAL

SEED = 20_000
"""Of the scenes whose pictures are shown; training uses others."""
FRAMES, LAST, CLEAR = 14, 9, 28.0
MOTIONS, RATES = (32, 64, 127, 190, 255), (6, 9, 14, 20, 30)
MEASURES = ("kept", "held_out", "motion", "fps")
Progress = Callable[[str, float], None]


def run(
    pipe: SvdPipeline, count: int = 128, seed: int = 0, batch: int = 8, sampling: Diffusion = USUAL, only: Sequence[str] = (),
    progress: Progress = lambda phase, share: None,
) -> dict[str, Any]:  # fmt: skip
    """Shares (0 … 1), decibels, and pixels per frame.

    Args:
        count: pictures, 1 …; of held-out pairs, and for motion and rate, a quarter of it, at least 4.
        seed: of the clips, 0 …; the pictures stay the same.
        only: which of `MEASURES`; by default all.
    """
    few = max(4, count // 4)
    found: dict[str, Any] = {"model": pipe.about.name, "revision": pipe.about.revision, "count": count, "count_other_tasks": few}
    rows: tuple[tuple[str, Split, int], ...] = (("kept", "train", count), ("held_out", "held_out", few))
    for name, split, many in (row for row in rows if not only or row[0] in only):
        found[name] = kept(pipe, pictured(many, split), seed, batch, sampling, partial(progress, name))
    scenes = pictured(few, "train")
    for name, values in (("motion", MOTIONS), ("fps", RATES)):
        if only and name not in only:
            continue
        made = {}
        for index, value in enumerate(values):
            changed = Diffusion(**(vars(sampling) | {name: value}))
            made[value] = moved(pipe, scenes, seed, batch, changed, lambda share: progress(name, (index + share) / len(values)))  # noqa: B023 - called at once
        found[name] = {str(value): round(speed, 3) for value, speed in made.items()}
        steps = np.diff(list(made.values())) * (1 if name == "motion" else -1)
        found[f"{name}_in_order"] = bool((steps > 0).all())
    return found


def pictured(count: int, split: Split) -> list[Scene]:
    """Scenes of one thing, without a wall."""
    drawn = (sample_scene(SEED, index, split=split, things=1) for index in range(100 * count))
    return [scene for scene, _ in zip((scene for scene in drawn if scene.wall is None), range(count), strict=False)]


def animated(
    pipe: SvdPipeline, scenes: Sequence[Scene], seed: int, batch: int, sampling: Diffusion, progress: Callable[[float], None]
) -> list[np.ndarray]:
    """Clips (F, S, S, 3) that begin with the scenes' first frames."""
    found: list[np.ndarray] = []
    side = min(pipe.own_size)
    for start in range(0, len(scenes), batch):
        pictures = list(render(scenes[start : start + batch], 1, side)[:, 0].numpy())
        seeds = [seed + start + index for index in range(len(pictures))]
        found += [clip.frames for clip in pipe.animate_batch(pictures, seeds, frames=FRAMES, size=(side, side), sampling=sampling)]
        progress(len(found) / len(scenes))
    return found


def kept(
    pipe: SvdPipeline, scenes: Sequence[Scene], seed: int, batch: int, sampling: Diffusion, progress: Callable[[float], None]
) -> dict[str, float]:
    clips, side = animated(pipe, scenes, seed, batch, sampling, progress), min(pipe.own_size)
    results, first, codec = [], [], []
    for scene, clip in zip(scenes, clips, strict=True):
        seen, thing, picture = detect(clip[-LAST:], 1), scene.things[0], render([scene], 1, side)[0, 0]
        results.append((False,) * 4)
        for one in seen:
            same = one.colour == thing.colour, one.shape == thing.shape, one.background == scene.background
            results[-1] = (*same, bool(one.present[-1]))
        first.append(psnr(clip[0], picture.numpy()))
        codec.append(psnr(through(pipe, picture), picture.numpy()))
    shares = np.array(results).mean(0)
    return {
        "thing_kept": round(float(np.array(results).all(1).mean()), 4),
        **{name: round(float(share), 4) for name, share in zip(("colour", "shape", "background", "there"), shares, strict=True)},
        "first_frame_psnr": round(float(np.mean(first)), 2), f"above_{CLEAR:g}_db": round(float(np.mean(np.array(first) >= CLEAR)), 4),
        "codec_psnr": round(float(np.mean(codec)), 2),
    }  # fmt: skip


def moved(
    pipe: SvdPipeline, scenes: Sequence[Scene], seed: int, batch: int, sampling: Diffusion, progress: Callable[[float], None]
) -> float:
    """Pixels of a 128-pixel frame from frame to frame, averaged over the clips in which a thing is seen."""
    speeds = []
    for clip in animated(pipe, scenes, seed, batch, sampling, progress):
        for seen in detect(clip, 1):
            steps = np.hypot(*np.diff(seen.track, axis=0).T)[seen.present[1:] & seen.present[:-1]]
            if len(steps):
                speeds.append(float(steps.mean()) * 128 / clip.shape[1])
    return float(np.mean(speeds)) if speeds else 0.0


def through(pipe: SvdPipeline, picture: torch.Tensor) -> np.ndarray:
    """A picture uint8 (S, S, 3) as the codec gives it back."""
    pixels = picture.permute(2, 0, 1)[None].float().to(pipe.device) / 127.5 - 1
    with torch.no_grad():
        back = pipe.decoder(pipe.encoder(pixels)[None] * pipe.decoder.scaling_factor)[0, 0]
    values: np.ndarray = ((back.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return values


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Decibels between uint8 arrays."""
    return float(10 * np.log10(255**2 / max(1e-9, np.square(a.astype(float) - b.astype(float)).mean())))
