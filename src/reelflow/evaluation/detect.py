"""Reads a toybox clip back: which things of which colour, shape, size and motion are seen, on which background.

A judge of generated clips that needs no learned model. It expects what a lossy codec and a small model do to a picture:
soft edges, colours off by up to 25, noise. `reelflow.evaluation.validate` measures how well it reads true renders.

Legend: F frames, H height, W width, P patch side, K things. Lengths are in pixels of a 128 x 128 frame unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import permutations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from reelflow.data.render import coverage
from reelflow.data.scene import BACKGROUNDS, COLOURS, SHAPES, SIZES, WALL_COLOUR, Scene
from reelflow.evaluation.motion import motion_of

FRAME = 128
REACH = 26  # half of the window that holds any thing
FAINT = 0.25  # opacities below this are taken for noise
CONTRAST = 40.0  # RGB distance from the background from which a pixel can belong to a thing
SAME = 55.0  # RGB distance within which pixels are of one colour


@dataclass(frozen=True, eq=False)
class Detection:
    """One thing seen. `track` (F, 2): x, y of its centre in pixels of the clip; `present` (F,): frames where it is in full view."""

    colour: str
    shape: str
    size: str
    motion: str
    background: str
    track: np.ndarray
    present: np.ndarray


def detect(frames: Tensor | np.ndarray, things: int = 1) -> list[Detection]:
    """The one or two most prominent things of a square clip, uint8 (F, S, S, 3), the larger first; fewer if fewer are seen.

    The motion is that of the first 33 frames; for a straight motion the direction is the initial one.
    ValueError for anything but 1 or 2 things, a clip that is not square, or one of less than 9 frames.
    """
    if things not in (1, 2):
        raise ValueError(f"things {things}: the detector looks for 1 or 2")
    clip = torch.as_tensor(frames)
    if clip.ndim != 4 or clip.shape[0] < 9 or clip.shape[1] != clip.shape[2] or clip.shape[3] != 3:
        raise ValueError(f"clip of shape {tuple(clip.shape)}: need (frames >= 9, side, side, 3)")
    clip = clip.to(torch.float32)
    ground = _background(clip)
    difference = clip - ground[:, None]
    difference[:, :, _wall_columns(clip)] = 0
    colours = _colours(difference, ground.mean(0), things)
    opacities = _unmix(difference, colours) if len(colours) else []
    if len(opacities) == 1 and things == 2:
        opacities = _split(opacities[0])
        colours = colours.repeat(2, 1)
    middle = ground.mean(0)
    background = _nearest(middle, BACKGROUNDS)
    pairs = zip(opacities, colours, strict=True)
    found = [_describe(opacity, _nearest(colour + middle, COLOURS), background) for opacity, colour in pairs]
    return [detection for detection in found if detection is not None]


def _nearest(colour: Tensor, palette: dict[str, tuple[int, int, int]]) -> str:
    return min(palette, key=lambda name: float((colour - torch.tensor(palette[name])).norm()))


def _background(clip: Tensor) -> Tensor:
    """Colour of each row of the background (H, 3): a robust straight line through the rows' medians."""
    rows = clip[:: max(len(clip) // 8, 1)].permute(1, 3, 0, 2).flatten(2).median(-1).values.to(torch.float64)  # (H, 3)
    height = torch.linspace(-1, 1, len(rows), dtype=torch.float64)
    design = torch.stack([torch.ones_like(height), height], 1)
    line = rows.median(0).values.expand_as(rows)
    for reach in (45, 25, 15, 15):
        good = ((rows - line).norm(dim=1) < reach).to(torch.float64)[:, None]
        line = design @ torch.linalg.lstsq(design * good, rows * good).solution
    return line.to(torch.float32)


def _wall_columns(clip: Tensor) -> Tensor:
    """Which columns (W,) an occluding wall covers, its soft edges included."""
    grey = ((clip[:: max(len(clip) // 8, 1)] - torch.tensor(WALL_COLOUR)).abs().amax(-1) < 35).to(torch.float32).mean((0, 1))
    return F.max_pool1d((grey > 0.6).to(torch.float32)[None], 5, 1, 2)[0] > 0


def _colours(difference: Tensor, ground: Tensor, things: int) -> Tensor:
    """Colours of the things as differences from the background, (K, 3), the one that covers more first."""
    distance = difference.norm(dim=-1)
    inside = F.pad((distance > CONTRAST).to(torch.float32), (1, 1, 1, 1), value=1.0)
    core = (_box_sum(_box_sum(inside, 1, 1), 1, 2) == 9)[:, 1:-1, 1:-1]
    pixels = difference[core]
    palette = torch.tensor(list(COLOURS.values())) - ground
    enough = 8 * len(difference) * (difference.shape[1] / FRAME) ** 2
    found: list[Tensor] = []
    while len(found) < things and len(pixels) > enough:
        votes = torch.cdist(pixels, palette).argmin(1).bincount(minlength=len(palette))
        if votes.max() < enough:
            break
        colour = palette[votes.argmax()]
        for _ in range(5):
            close = (pixels - colour).norm(dim=1) < SAME
            if not close.any():
                break
            colour = pixels[close].mean(0)
        found.append(colour)
        part = (pixels @ colour / colour.square().sum()).clamp(0, 1)  # what is left is no mixture of it and the background
        pixels = pixels[(pixels - part[:, None] * colour).norm(dim=1) > CONTRAST]
    return torch.stack(found) if found else torch.empty(0, 3)


def _unmix(difference: Tensor, colours: Tensor) -> list[Tensor]:
    """Opacity (F, H, W) of each thing: every pixel as a non-negative mixture of background and the things' colours."""
    alone = [difference @ colour / colour.square().sum() for colour in colours]
    if len(colours) == 2:
        both = difference @ torch.linalg.pinv(colours)
        first, second = both.unbind(-1)
        alone = [torch.where(second < 0, alone[0], first), torch.where(first < 0, alone[1], second)]
    return [torch.where(opacity < FAINT, 0, opacity.clamp(max=1)) for opacity in alone]


def _split(opacity: Tensor) -> list[Tensor]:
    """Two things of one colour: each pixel goes to the nearer of the two centres, which are followed from frame to frame."""
    first = _centres(opacity)
    side = opacity.shape[-1]
    place = torch.arange(side) + 0.5
    far = (place[None, None, :] - first[:, 0, None, None]) ** 2 + (place[None, :, None] - first[:, 1, None, None]) ** 2
    area = opacity.sum((1, 2)).quantile(0.8) / 2
    second = _centres(opacity * (far > 1.4 * area / torch.pi))
    for frame in range(1, len(first)):
        a, b = first[frame - 1], second[frame - 1]
        stay = (first[frame] - a).norm() + (second[frame] - b).norm()
        swap = (second[frame] - a).norm() + (first[frame] - b).norm()
        if swap < stay:
            first[frame], second[frame] = second[frame].clone(), first[frame].clone()
    near, other = (
        (place[None, None, :] - centre[:, 0, None, None]) ** 2 + (place[None, :, None] - centre[:, 1, None, None]) ** 2
        for centre in (first, second)
    )
    return [opacity * (near <= other), opacity * (near > other)]


def _centres(opacity: Tensor) -> Tensor:
    """Centroid (F, 2) of the densest blob of each frame, in pixels of the clip."""
    side = opacity.shape[-1]
    dense = _box_sum(_box_sum(opacity, round(8 * side / FRAME), 1), round(8 * side / FRAME), 2)
    peak = dense.flatten(1).argmax(1)
    centre = torch.stack([peak % side, peak // side], 1) + 0.5
    place = torch.arange(side) + 0.5
    for _ in range(5):
        column, row = ((place - centre[:, axis, None]).abs() < REACH * side / FRAME for axis in (0, 1))
        inside = opacity * column[:, None, :] * row[:, :, None]
        mass = inside.sum((1, 2)).clamp_min(1e-6)
        moved = torch.stack([inside.sum(1) @ place, inside.sum(2) @ place], 1) / mass[:, None]
        centre = torch.where(mass[:, None] > 1, moved, centre)
    return centre


def _box_sum(values: Tensor, reach: int, axis: int) -> Tensor:
    """Sum over the neighbours within `reach` along one of the last two axes; nothing lies outside."""
    pad = (reach + 1, reach) if axis == 2 else (0, 0, reach + 1, reach)
    running = F.pad(values, pad).cumsum(axis)
    count = values.shape[axis]
    return running.narrow(axis, 2 * reach + 1, count) - running.narrow(axis, 0, count)


def _describe(opacity: Tensor, colour: str, background: str) -> Detection | None:
    """Shape, size, track and motion of one thing from its opacity (F, H, W); None if it is hardly ever there."""
    scale = opacity.shape[-1] / FRAME
    centre = _centres(opacity)
    grid = torch.arange(-REACH, REACH + 1, dtype=torch.float32)
    where = torch.stack(torch.meshgrid(grid, grid, indexing="xy"), -1) * scale + centre[:, None, None]  # (F, P, P, 2)
    patches = F.grid_sample(opacity[:, None], 2 * where / opacity.shape[-1] - 1, align_corners=False)[:, 0]
    area = patches.sum((1, 2))
    present = (area > 0.6 * area.quantile(0.8)) & (area > 50)
    if present.sum() < len(present) / 3:
        return None
    picture = patches[present].mean(0)
    whole = float(picture.sum())
    scores = {}
    for shape in SHAPES:
        for blur in (0.0, 1.0, 2.0):
            template = _template(shape, round((whole / _area(shape)) ** 0.5, 1), blur)
            scores[shape, blur] = float((template * picture).sum() / (template.norm() * picture.norm()))
    shape = max(scores, key=lambda key: scores[key])[0]
    radius = (whole / _area(shape)) ** 0.5
    size = min(SIZES, key=lambda name: abs(np.log(SIZES[name] / radius)))
    track = centre.numpy().astype(np.float64)
    track[:, 1] -= _sag(shape) * radius * scale
    return Detection(colour, shape, size, motion_of(track / scale, present.numpy()), background, track, present.numpy())


@cache
def _template(shape: str, radius: float, blur: float) -> Tensor:
    """Opacity (P, P) of a shape with its centroid in the middle, softened by a Gaussian of `blur` pixels."""
    grid = torch.arange(-REACH, REACH + 1, dtype=torch.float32)
    picture = coverage(shape, grid[None, :].expand(len(grid), -1), (grid + _sag(shape) * radius)[:, None].expand(-1, len(grid)), radius)
    soft = gaussian_blur(picture[None, :, :, None], blur)[0, :, :, 0] if blur else picture
    return torch.where(soft < FAINT, 0, soft)


@cache
def _moments(shape: str) -> tuple[float, float]:
    grid = torch.arange(-150, 151, dtype=torch.float32)
    picture = coverage(shape, grid[None, :].expand(len(grid), -1), grid[:, None].expand(-1, len(grid)), 100.0).to(torch.float64)
    return float(picture.sum() / 1e4), float((picture * grid[:, None]).sum() / picture.sum() / 100)


def _area(shape: str) -> float:
    """Area of the shape of radius 1."""
    return _moments(shape)[0]


def _sag(shape: str) -> float:
    """How far below the centre the centroid of the shape of radius 1 lies."""
    return _moments(shape)[1]


def matches(detections: Sequence[Detection], scene: Scene, size: bool = False) -> dict[str, bool]:
    """What of a scene the detections agree with: "colour", "shape", "size", "motion", "background", and "all" of them.

    Things are paired as fits best. `size`: whether the size was asked for and so counts for "all". Everything is False if
    fewer things are seen than the scene has.
    """
    keys = ("colour", "shape", "size", "motion")
    counting = [key for key in keys if key != "size" or size] + ["background"]
    best = dict.fromkeys([*keys, "background", "all"], False)
    for order in permutations(detections, len(scene.things)):
        pairs = list(zip(order, scene.things, strict=True))
        result = {key: all(getattr(seen, key) == getattr(thing, key) for seen, thing in pairs) for key in keys}
        result["background"] = all(seen.background == scene.background for seen in order)
        result["all"] = all(result[key] for key in counting)
        best = max(best, result, key=lambda candidate: (candidate["all"], sum(candidate.values())))
    return best


def apart(one: Detection, other: Detection) -> float:
    """Mean distance of two things in the frames where both are in full view, in pixels of their clips; infinity if there is none."""
    both = one.present & other.present
    return float(np.linalg.norm(one.track[both] - other.track[both], axis=1).mean()) if both.any() else np.inf


def gaussian_blur(frames: Tensor, sigma: float) -> Tensor:
    """Float frames (F, H, W, C) softened by a Gaussian of `sigma` pixels; edges are repeated outwards."""
    reach = int(np.ceil(3 * sigma))
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, dtype=frames.dtype) / sigma) ** 2)
    weights = weights / weights.sum()
    for axis in (1, 2):
        side = frames.shape[axis]
        repeated = frames.index_select(axis, torch.arange(-reach, side + reach).clamp(0, side - 1))
        frames = sum(weight * repeated.narrow(axis, shift, side) for shift, weight in enumerate(weights.tolist()))
    return frames
