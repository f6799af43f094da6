"""What the VAE trainers are asked for and what they see: settings, and batches of pieces of toybox clips.

Shape suffixes: B batch, F frames, H height, W width, S side of a piece. Pixels lie in [-1, 1].
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from reelflow.config import Strict
from reelflow.data.toybox import CLIP, render, sample_scene


class VaeTraining(Strict):
    """How to train: `steps` optimiser steps, each on pieces of clips, all of one of the `shapes` (frames, side in pixels)."""

    seed: int = 0
    steps: int = 1400
    pixels: int = 3 * 9 * 64 * 64
    """Pixels per batch and process; the number of clips follows from their length and size."""
    shapes: tuple[tuple[int, int], ...] = ((1, 64), (5, 64), (9, 64), (17, 64))
    last_shapes: tuple[tuple[int, int], ...] = ((1, 128), (9, 128), (17, 64), (33, 64))
    last_share: float = 0.25
    """Share of the steps, at the end, that take `last_shapes`: longer clips and whole frames."""
    learning_rate: float = 2.5e-3
    warmup: int = 100
    foreground: float = 4.0
    """Additional weight of the pixels on and around objects."""
    knee: float = 0.01
    """Errors of pixels (they lie in [-1, 1]) far below it count by their square, far above it as they are. Small: sharp edges. Large:
    what is thin is not lost (where it is not sure, its median is nothing, and its mean is not)."""
    edges: float = 0.5
    """Weight of the error of horizontal and vertical differences."""
    kl: float = 2e-5
    """Weight of the Kullback-Leibler term, per latent value, relative to the error per pixel value."""
    colours: float = 0.5
    """Share of the pieces whose colour channels are swapped and inverted at random: a codec of eight colours knows no ninth."""
    noise: float = 0.0
    """Standard deviation of noise on the latents beyond the posterior's own: what the decoder is to forgive a flow."""
    ema: float = 0.998
    decoder_only: bool = False
    """Leave the encoder, and so all latents, as they are."""

    def rate(self, step: int) -> float:
        """Learning rate: linear warm-up, then half a cosine down to 1/200."""
        cosine = 0.5 + 0.5 * math.cos(math.pi * min(step / self.steps, 1.0))
        return self.learning_rate * min((step + 1) / self.warmup, 1.0) * (0.005 + 0.995 * cosine)


def to_pixels(frames: Tensor) -> Tensor:
    """uint8 (B, F, H, W, 3) → float (B, 3, F, H, W) in [-1, 1]."""
    return frames.permute(0, 4, 1, 2, 3).to(torch.float32) / 127.5 - 1


def backdrop(frames: Tensor) -> Tensor:
    """Median colour of every row over a whole clip uint8 (B, F, H, W, 3): int16 (B, 1, H, 1, 3)."""
    columns = frames[:, ::4, :, ::12].transpose(2, 3).flatten(1, 2)
    return columns.float().median(1).values[:, None, :, None].to(torch.int16)


def foreground(frames: Tensor, ground: Tensor) -> Tensor:
    """Where frames uint8 (B, F, H, W, 3) differ from their backdrop: bool (B, F, H, W)."""
    return ((frames.to(torch.int16) - ground).abs() > 10).any(-1)


def around(mask: Tensor, reach: int = 5) -> Tensor:
    """A mask (B, F, H, W) and what lies within `reach` pixels of it.

    Were objects alone to weigh more, an edge too far out would cost less than one too far in, and every object come out fat.
    """
    return F.max_pool2d(mask.to(torch.float32), 2 * reach + 1, 1, reach) > 0


def batch(config: VaeTraining, step: int, rank: int = 0) -> tuple[Tensor, Tensor]:
    """Clip pieces of one step, pixels (B, 3, F, S, S) and what is `around` objects (B, 1, F, S, S), where most of the pieces lie."""
    rng = np.random.Generator(np.random.Philox(key=[config.seed, step], counter=[0, 0, rank, 1]))
    shapes = config.last_shapes if step >= config.steps * (1 - config.last_share) else config.shapes
    length, size = shapes[int(rng.integers(len(shapes)))]
    count = max(config.pixels // (length * size**2), 1)
    scenes = [sample_scene(config.seed, int(index)) for index in rng.integers(2**40, size=count)]
    frames = render(scenes, length, start=int(rng.integers(CLIP - length + 1)))
    ground = backdrop(frames)
    pieces, grounds = [], []
    for clip, mask, rows in zip(frames, foreground(frames[:, length // 2, None], ground)[:, 0], ground, strict=True):
        row, column = rng.integers(128, size=2)
        places = mask.nonzero()
        if len(places) and rng.random() < 0.85:
            row, column = places[int(rng.integers(len(places)))].tolist()
        top, left = (int(np.clip(place - rng.integers(size), 0, 128 - size)) for place in (row, column))
        pieces.append(clip[:, top : top + size, left : left + size])
        grounds.append(rows[:, top : top + size])
    x = torch.stack(pieces)
    mask = around(foreground(x, torch.stack(grounds))).unsqueeze(1)
    for piece in x:
        if rng.random() < config.colours:
            inverted = torch.from_numpy(rng.random(3) < 0.5)
            piece.copy_(piece[..., torch.from_numpy(rng.permutation(3))])
            piece.copy_(torch.where(inverted, 255 - piece, piece))
    return to_pixels(x), mask
