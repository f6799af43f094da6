"""Train the small CLIP tower of `mini-svd` on toybox pictures, and write its folder.

    python -m reelflow.training.svd.tower runs/svd-tower

What the released models' CLIP learned from captions, this one learns from what captions name: a linear layer has to read off its
embedding which shapes, colours, sizes and backgrounds a picture shows; another one, off each patch that lies on a thing, which thing
it is, without which shapes are not found in such a short time. Both are then left aside. Stable Video Diffusion hears of a picture's
content in this embedding, at every place and noise level alike.

Shapes: B pictures, K words, P patches.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from reelflow.adapters.checkpoint import new_folder
from reelflow.adapters.svd import CLIP_MEAN, CLIP_STD
from reelflow.adapters.text import no_progress_bar
from reelflow.data.scene import BACKGROUNDS, CLIP, COLOURS, FRAME, SHAPES, SIZES, Scene, Split, sample_scene
from reelflow.data.toybox import render, simulate
from reelflow.pipelines.svd.picture import VIEW, clip_view
from reelflow.training.allocator import keep_freed_memory
from reelflow.training.muon import Muon

WORDS: dict[str, tuple[str, ...]] = {"shape": SHAPES, "colour": tuple(COLOURS), "size": tuple(SIZES), "background": tuple(BACKGROUNDS)}
KNOWN = [word for known in WORDS.values() for word in known]
COLOURLESS = torch.tensor([float(word in (*SHAPES, *SIZES)) for word in KNOWN])
"""Words for what is seen without colour."""
SETTINGS: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 16, "projection_dim": 64,
}  # fmt: skip
FRAMES = 2
"""Of every scene, spread over a clip: things are seen wherever they come to."""


class PatchConvolution(nn.Conv2d):
    """A convolution of patches side by side as one product, whose way back is several times faster on CPUs."""

    def forward(self, x: Tensor) -> Tensor:
        side = self.kernel_size[0]
        cut = x.unflatten(3, (-1, side)).unflatten(2, (-1, side)).permute(0, 2, 4, 1, 3, 5).flatten(3)
        return F.linear(cut, self.weight.flatten(1)).permute(0, 3, 1, 2)


def new_tower() -> Any:
    """The untrained tower."""
    tower = CLIPVisionModelWithProjection(CLIPVisionConfig(**SETTINGS, attn_implementation="eager"))
    embeddings, side = tower.vision_model.embeddings, tower.config.patch_size
    conv = PatchConvolution(3, tower.config.hidden_size, side, side, bias=False)
    conv.weight = embeddings.patch_embedding.weight
    embeddings.patch_embedding = conv
    return tower


class Pictures(NamedTuple):
    """What is learned from."""

    pixels: Tensor
    """0 … 1, at the size of CLIP's view, (B, 3, 224, 224)."""
    words: Tensor
    """Which they show, (B, K), 0 or 1."""
    things: Tensor
    """Those of the thing that each patch lies on, (B, P, K)."""
    on_thing: Tensor
    """Whether there is one, (B, P)."""


def pictures(scenes: Sequence[Scene], frames: int = FRAMES, patches: int = 14) -> Pictures:
    """Some frames of each scene, spread over a clip. patches: of a row."""
    pace = (CLIP - 1) / max(1, frames - 1)
    row = (torch.arange(patches) + 0.5) * (FRAME / patches)
    place_P2 = torch.cartesian_prod(row, row).flip(1)
    found = []
    for scene in scenes:
        tracks = torch.from_numpy(simulate(scene, frames, int(FRAME), 0, pace)).float()
        of_patch, covered = torch.zeros(frames, len(place_P2), len(KNOWN)), torch.zeros(frames, len(place_P2), dtype=torch.bool)
        for index, thing in enumerate(scene.things):
            on = (place_P2 - tracks[:, index, None]).norm(dim=-1) < thing.radius
            of_patch[on], covered = told(thing.shape, thing.colour, thing.size, scene.background), covered | on
        found.append((words(scene).expand(frames, -1), of_patch, covered))
    pixels = render(scenes, frames, VIEW, pace=pace).flatten(0, 1).permute(0, 3, 1, 2).float() / 255
    return Pictures(pixels, *(torch.cat(column) for column in zip(*found, strict=True)))


def told(*named: str) -> Tensor:
    """(K,), 1 for each of these words."""
    return torch.tensor([float(word in named) for word in KNOWN])


def words(scene: Scene) -> Tensor:
    """(K,): those that a picture of it shows."""
    return told(scene.background, *(word for thing in scene.things for word in (thing.shape, thing.colour, thing.size)))


def grey(pixels_B3HW: Tensor) -> Tensor:
    """Pictures without colour, and so dim that nothing is white: shapes have to be told without it, or a colour that comes with three
    shapes in training would rule out the fourth.
    """
    return (0.8 * pixels_B3HW.mean(1, keepdim=True)).expand_as(pixels_B3HW)


def train(steps: int, batch: int = 32, rate: float = 3e-3, seed: int = 0, log_every: int = 100) -> tuple[Any, nn.Linear]:
    """A trained tower, and the layer that reads its embedding.

    Args:
        batch: scenes a step, of `FRAMES` pictures each.
    """
    torch.manual_seed(seed)
    tower = new_tower()
    reader, patch_reader = (nn.Linear(width, len(KNOWN)) for width in (tower.config.projection_dim, tower.config.hidden_size))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    named = dict(tower.named_parameters())
    matrices = [p for name, p in named.items() if ".layers." in name and p.ndim == 2]
    others = [p for p in (*named.values(), *reader.parameters(), *patch_reader.parameters()) if not any(p is q for q in matrices)]
    adam = torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    patches = tower.config.image_size // tower.config.patch_size
    indices, began, recent = np.random.default_rng(seed), time.monotonic(), []
    optimisers = (adam, Muon(matrices, lr=rate))
    for step in range(steps):
        shown = pictures([sample_scene(seed, int(index)) for index in indices.integers(2**40, size=batch)], patches=patches)
        half = len(shown.pixels) // 2
        pixels = torch.cat((shown.pixels[:half], grey(shown.pixels[half:])))
        told_BK = torch.cat((torch.ones(half, len(KNOWN)), COLOURLESS.expand(len(pixels) - half, -1)))
        with torch.autocast("cpu", torch.bfloat16):
            seen = tower((pixels - mean) / std)
        on, of_patch = shown.on_thing, seen.last_hidden_state[:, 1:].float()
        whole, patch = (
            (counts * F.binary_cross_entropy_with_logits(read, true, reduction="none")).sum() / counts.sum()
            for counts, read, true in (
                (told_BK, reader(seen.image_embeds.float()), shown.words),
                (told_BK[:, None].expand(-1, on.shape[1], -1)[on], patch_reader(of_patch[on]), shown.things[on]),
            )
        )
        loss = whole + patch
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"step {step}: loss is {loss.item()}; give a lower --rate")
        loss.backward()
        nn.utils.clip_grad_norm_([*matrices, *others], 1.0)
        for optimiser in optimisers:
            optimiser.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimiser.step()
            optimiser.zero_grad()
        recent.append((whole.item(), patch.item()))
        if (step + 1) % log_every == 0 or step + 1 == steps:
            left = (time.monotonic() - began) / (step + 1) * (steps - step - 1) / 60
            of_picture, of_patches = np.mean(recent, 0)
            sys.stderr.write(f"step {step + 1}/{steps}  picture {of_picture:.4f}  patches {of_patches:.4f}  {left:.1f} min left\n")
            recent.clear()
    return tower.eval(), reader


@torch.no_grad()
def measure(tower: Any, reader: nn.Linear, split: Split, count: int = 256) -> dict[str, float]:
    """Shares of fresh pictures of one thing, of that split's colour–shape pairs, whose words of each kind are read right."""
    scenes = [sample_scene(10**6, index, split=split, things=1) for index in range(count)]
    true_BK = torch.stack([words(scene) for scene in scenes]).repeat_interleave(FRAMES, 0)
    small = render(scenes, FRAMES, pace=CLIP - 1).flatten(0, 1)
    views = clip_view(small.permute(0, 3, 1, 2).float() / 127.5 - 1, CLIP_MEAN, CLIP_STD)
    read = torch.cat([reader(tower(some).image_embeds) for some in views.split(64)])
    widths = [len(known) for known in WORDS.values()]
    pairs = zip(WORDS, read.split(widths, 1), true_BK.split(widths, 1), strict=True)
    return {kind: float((own.argmax(1) == true.argmax(1)).float().mean()) for kind, own, true in pairs}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train the small CLIP tower of mini-svd on toybox pictures.")
    parser.add_argument("folder", type=Path, help="where the tower goes; must not exist")
    parser.add_argument("--steps", type=int, default=1200, help="default: %(default)s")
    parser.add_argument("--rate", type=float, default=3e-3, help="highest learning rate; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    options = parser.parse_args()
    if options.folder.exists():
        parser.error(f"{options.folder} exists; give another folder")
    tower, reader = train(options.steps, rate=options.rate, seed=options.seed)
    for split in ("train", "held_out"):
        found = "  ".join(f"{kind} {share:.1%}" for kind, share in measure(tower, reader, split).items())
        sys.stderr.write(f"read right of fresh pictures, {split} pairs:  {found}\n")
    with new_folder(options.folder) as folder, no_progress_bar():
        tower.half().save_pretrained(str(folder))


if __name__ == "__main__":
    keep_freed_memory()
    main()
