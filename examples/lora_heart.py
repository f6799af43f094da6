"""A new thing for `mini`: pink hearts, which toybox does not have. Clips of them, and what a LoRA trained on them knows.

    python examples/lora_heart.py draw runs/heart                       # clips and captions
    reelflow train prepare examples/lora_heart.yaml                     # their latents
    reelflow train examples/lora_heart.yaml --folder runs/lora_heart    # minutes on a CPU
    python examples/lora_heart.py measure runs/lora_heart/pink-heart.safetensors
    reelflow generate "a pink heart moves right on a black background" --lora runs/lora_heart/pink-heart.safetensors

`measure` makes clips of captions that were held out, without and with the LoRA, and prints: the shares of frames whose thing is
pink, and heart-shaped; bits per dimension of drawn clips of those captions (exact likelihood); and of what was known before, the
share of toybox prompts that are met in all they ask for.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

import reelflow
from reelflow import Clip

SIDE, FRAMES, FPS, FINE = 128, 33, 16, 4
PINK = (250, 120, 180)
BACKGROUNDS = {"black": (10, 10, 10), "grey": (90, 90, 90), "navy": (20, 25, 60), "brown": (70, 50, 35)}
TOYBOX = {"red": (220, 40, 40), "orange": (240, 140, 30), "purple": (150, 60, 200), "white": (240, 240, 240), "blue": (50, 80, 220)}
SIZES = {"small": 11.0, "large": 19.0}
MOTIONS = {"moves right": (2, 0), "moves left": (-2, 0), "moves up": (0, -2), "moves down": (0, 2), "stays still": (0, 0)}
ANGLES = np.linspace(0, 2 * np.pi, 120, endpoint=False)
CORNERS = np.linspace(-np.pi / 2, 1.5 * np.pi, 10, endpoint=False)
OUTLINES = {
    "heart": np.stack(
        [16 * np.sin(ANGLES) ** 3, -(13 * np.cos(ANGLES) - 5 * np.cos(2 * ANGLES) - 2 * np.cos(3 * ANGLES) - np.cos(4 * ANGLES)) - 2.5], 1
    ) / 16,
    "ball": np.stack([np.cos(ANGLES), np.sin(ANGLES)], 1),
    "box": np.array([(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]),
    "triangle": np.array([(0, -1), (0.87, 0.5), (-0.87, 0.5)]),
    "star": np.stack([np.cos(CORNERS), np.sin(CORNERS)], 1) * np.where(np.arange(10) % 2, 0.5, 1.0)[:, None],
}  # fmt: skip


class Scene(NamedTuple):
    size: str
    motion: str
    background: str

    @property
    def caption(self) -> str:
        return f"a {self.size} pink heart {self.motion} on a {self.background} background"


EVERY = [Scene(*parts) for parts in product(SIZES, MOTIONS, BACKGROUNDS)]
HELD_OUT = EVERY[::5]
"""A fifth of the combinations; every size, background and direction is among them."""


def outline(shape: str, centre: np.ndarray, radius: float) -> Image.Image:
    """A silhouette, anti-aliased, as a mask."""
    mask = Image.new("L", (SIDE * FINE, SIDE * FINE))
    ImageDraw.Draw(mask).polygon([tuple(point) for point in (OUTLINES[shape] * radius + centre) * FINE], fill=255)
    return mask.resize((SIDE, SIDE), Image.Resampling.BOX)


def draw(scene: Scene, seed: int) -> Clip:
    """A heart that bounces off the edges, from a place of its own."""
    rng, radius = np.random.default_rng(seed), SIZES[scene.size]
    room = SIDE - 2 * radius
    start, frames = rng.uniform(0, room, 2), []
    for frame in range(FRAMES):
        path = (start + np.array(MOTIONS[scene.motion]) * frame) % (2 * room)
        centre = radius + np.where(path > room, 2 * room - path, path)
        picture = Image.new("RGB", (SIDE, SIDE), BACKGROUNDS[scene.background])
        picture.paste(PINK, mask=outline("heart", centre, radius))
        frames.append(np.asarray(picture))
    return Clip(np.stack(frames), FPS)


def write_clips(folder: Path) -> None:
    """One clip of every combination that is not held out, and two with a caption that leaves the size open."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, scene in enumerate(scene for scene in EVERY if scene not in HELD_OUT):
        draw(scene, index).save(folder / f"{index:03d}.mp4")
        open_size = scene.caption.replace(f"a {scene.size} ", "a ")
        row = {"file_name": f"{index:03d}.mp4", "caption": [scene.caption, open_size]}
        with (folder / "metadata.jsonl").open("w" if index == 0 else "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    print(f"{folder}: {len(EVERY) - len(HELD_OUT)} clips; {len(HELD_OUT)} combinations held out")


def seen(clip: Clip, background: str) -> Iterator[tuple[str, str]]:
    """Colour and shape of the thing in every fourth frame, by the nearest of what there is; "nothing" where there is none."""
    for frame in clip.frames[::4].astype(float):
        difference = np.abs(frame - BACKGROUNDS[background]).sum(-1)
        inside = difference > 90
        if inside.sum() < 60:
            yield "nothing", "nothing"
            continue
        colour = np.median(frame[inside], 0)
        rows, columns = np.nonzero(inside)
        box = Image.fromarray(inside).crop((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)).resize((32, 32))
        palette = {**TOYBOX, "pink": PINK}
        yield min(palette, key=lambda name: np.abs(colour - palette[name]).sum()), max(OUTLINES, key=lambda name: overlap(box, name))


def overlap(box: Image.Image, shape: str) -> float:
    """Intersection over union with a silhouette that fills the box as well."""
    mask = np.asarray(outline(shape, np.array([64.0, 64.0]), 40)) > 127
    rows, columns = np.nonzero(mask)
    other = Image.fromarray(mask).crop((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)).resize((32, 32))
    a, b = np.asarray(box) > 0, np.asarray(other) > 0
    return float((a & b).sum() / (a | b).sum())


def measure(lora: Path, model: str, count: int) -> None:
    from reelflow.evaluation.toybox import generate, scenes
    from reelflow.pipelines.starflow import Sampling

    rows = {}
    for name in ("without", "with"):
        pipe = reelflow.load(model)
        if name == "with":
            pipe.load_lora(lora)
        found, bits = [], []
        for index in range(count):
            scene = HELD_OUT[index % len(HELD_OUT)]
            found += list(seen(pipe.generate(scene.caption, seed=index), scene.background))
            bits.append(pipe.score(draw(scene, 1000 + index), scene.caption).bits_per_dim)
        before = generate(pipe, scenes(count, "train", 1), 0, 8, Sampling(), lambda share: None)
        rows[name] = {
            "pink": np.mean([colour == "pink" for colour, _ in found]), "heart": np.mean([shape == "heart" for _, shape in found]),
            "bits_per_dim": np.mean(bits), "toybox_met": before["all"],
        }  # fmt: skip
        print(f"{name:>8}: " + ", ".join(f"{key} {value:.3f}" for key, value in rows[name].items()), flush=True)
    print(json.dumps({name: {key: round(float(value), 4) for key, value in row.items()} for name, row in rows.items()}))


def main() -> None:
    parser = argparse.ArgumentParser(description="Pink hearts for mini.")
    commands = parser.add_subparsers(dest="command", required=True)
    drawing = commands.add_parser("draw", help="write clips and captions")
    drawing.add_argument("folder", type=Path)
    measuring = commands.add_parser("measure", help="what a LoRA changed")
    measuring.add_argument("lora", type=Path)
    measuring.add_argument("--model", default="mini")
    measuring.add_argument("--count", type=int, default=16, help="clips per row (default %(default)s)")
    options = parser.parse_args()
    if options.command == "draw":
        write_clips(options.folder)
    else:
        measure(options.lora, options.model, options.count)


if __name__ == "__main__":
    main()
