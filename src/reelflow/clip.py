"""A clip: decoded frames, their rate, and how they were made.

The value that every pipeline takes and gives, and its pictures for looking at results. Files are read and written by
`reelflow.media`.

Shapes: F frames of H x W pixels, 3 = red, green, blue; uint8 sRGB.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image

from reelflow.media.comment import MediaError
from reelflow.media.picture import fitted
from reelflow.media.read import read
from reelflow.media.timeline import Limits, rational
from reelflow.media.write import ClipWriter, check_output

__all__ = ["Clip", "ClipWriter", "Limits", "MediaError", "check_output", "contact_sheet", "heat_map", "side_by_side"]

# From dark to bright, lightness rising evenly: the same order for colour-blind eyes and in grey print.
HEAT = np.array(
    [(0, 0, 4), (33, 12, 74), (87, 16, 110), (138, 34, 106), (188, 55, 84), (227, 89, 51), (249, 142, 9), (249, 203, 53), (252, 255, 164)]
)


@dataclass(frozen=True, eq=False)
class Clip:
    """Video as an array.

    frames: uint8 (F, H, W, 3), sRGB, at least one. fps: frames per second, 0.001 to 1000. metadata: how it was made, JSON.

    >>> clip = Clip(np.zeros((33, 128, 128, 3), np.uint8), fps=16, metadata={"prompt": "night"})
    >>> len(clip), clip.height, clip.width, clip.seconds
    (33, 128, 128, 2.0625)
    >>> len(clip.resample(8)), clip.resized(64, 96)[:4].frames.shape
    (17, (4, 64, 96, 3))
    """

    frames: np.ndarray
    fps: float
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape, kind = (getattr(self.frames, "shape", None), getattr(self.frames, "dtype", type(self.frames).__name__))
        if not isinstance(self.frames, np.ndarray) or kind != np.uint8 or len(self.frames.shape) != 4 or self.frames.shape[3] != 3:
            raise ValueError(f"frames are {kind} {shape}: give a NumPy array uint8 (F, H, W, 3)")
        if 0 in self.frames.shape:
            raise ValueError(f"frames are empty, {shape}: give at least one frame of at least one pixel")
        if not (isinstance(self.fps, (int, float)) and 0.001 <= self.fps <= 1000):
            raise ValueError(f"fps is {self.fps!r}: give frames per second, a number from 0.001 to 1000")
        if not isinstance(self.metadata, Mapping):
            raise ValueError(f"metadata is {self.metadata!r}: give a dictionary")

    @classmethod
    def open(cls, path: str | Path, max_frames: int | None = None, start: float = 0.0, limits: Limits | None = None) -> Self:
        """Read a video (mp4, mov, mkv, webm, avi, gif, animated webp and png), a picture, or a folder of numbered pictures.

        max_frames: read at most the first so many. start: seconds to leave out at the beginning. limits: what to refuse.
        Frames come upright (rotation and EXIF tags), with transparency over white, 16 bits scaled to 8, colour profiles
        applied. A file with a varying rate comes at its average rate, every frame at its time. A still has one frame; stills
        and folders that do not say have 16 frames per second.

        Raises `MediaError` (a ValueError), one line that says what is wrong and what to do; a file that is cut off or
        damaged is never read in part unless `max_frames` asks for no more than its whole part.
        """
        return cls(*read(path, max_frames, start, limits))

    def save(self, path: str | Path, metadata: bool = True, overwrite: bool = True) -> None:
        """Write to .mp4, .webm, .gif, .png (one frame), or a folder of PNGs, as `ClipWriter` does.

        metadata=False leaves out how the clip was made. Raises `MediaError` and, on a full disk, OSError.
        """
        if len(self) > 1 and check_output(path, overwrite) == ".png":
            raise MediaError(f"{path} holds one frame, the clip has {len(self)}: use .mp4, .webm, .gif, a folder, or save clip[:1]")
        with ClipWriter(path, self.fps, self.height, self.width, self.metadata if metadata else None, overwrite) as out:
            out.write(self.frames)

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def height(self) -> int:
        """Pixels."""
        return int(self.frames.shape[1])

    @property
    def width(self) -> int:
        """Pixels."""
        return int(self.frames.shape[2])

    @property
    def seconds(self) -> float:
        """How long the clip is shown."""
        return len(self) / self.fps

    def __getitem__(self, part: slice) -> Self:
        """Frames a to b, `clip[a:b]`, sharing memory with this clip."""
        if not isinstance(part, slice) or part.step not in (None, 1):
            raise TypeError(f"clip[{part!r}]: use clip[a:b] for frames a to b, clip.frames[k] for one picture, resample for another rate")
        frames = self.frames[part]
        if not len(frames):
            raise ValueError(f"clip[{part.start}:{part.stop}] is empty: the clip has {len(self)} frames")
        return replace(self, frames=frames)

    def __add__(self, other: "Clip") -> Self:
        """This clip, then the other; size and rate must agree, the metadata is this clip's."""
        if self.frames.shape[1:] != other.frames.shape[1:]:
            raise ValueError(f"clips of {self.width} x {self.height} and {other.width} x {other.height} pixels: use resized first")
        if rational(self.fps) != rational(other.fps):
            raise ValueError(f"clips of {self.fps:g} and {other.fps:g} frames per second: use resample first")
        return replace(self, frames=np.concatenate([self.frames, other.frames]))

    def resample(self, fps: float) -> Self:
        """The same seconds at another rate: frame k is the one nearest in time to k / fps, the later one of two as near."""
        if not (isinstance(fps, (int, float)) and 0.001 <= fps <= 1000):
            raise ValueError(f"fps is {fps!r}: give frames per second, a number from 0.001 to 1000")
        step = rational(self.fps) / rational(fps)
        count = math.ceil(len(self) / step)
        nearest = [min(math.floor(k * step + Fraction(1, 2)), len(self) - 1) for k in range(count)]
        return replace(self, frames=self.frames[nearest], fps=float(fps))

    def resized(self, height: int, width: int) -> Self:
        """Another size in pixels: the largest centred part of the same shape, scaled with an antialiased filter, never squashed."""
        if not all(isinstance(side, (int, np.integer)) and side >= 1 for side in (height, width)):
            raise ValueError(f"size {width} x {height} is not possible: give whole pixels, 1 or more")
        if (height, width) == (self.height, self.width):
            return self
        return replace(self, frames=np.stack([fitted(frame, height, width) for frame in self.frames]))


def contact_sheet(clip: Clip, columns: int = 8, rows: int = 1, tile: int = 256) -> Image.Image:
    """One picture of the clip: columns x rows frames, evenly spaced from first to last, in reading order.

    A clip with fewer frames fills fewer places. tile: longest side of a frame in pixels, smaller ones keep their size.
    """
    if columns < 1 or rows < 1 or tile < 1:
        raise ValueError(f"a sheet of {columns} columns, {rows} rows and tiles of {tile} pixels: each must be 1 or more")
    shrink = min(1.0, tile / max(clip.height, clip.width))
    height, width = (max(1, round(clip.height * shrink)), max(1, round(clip.width * shrink)))
    count = min(columns * rows, len(clip))
    columns = min(columns, count)
    sheet = Image.new("RGB", (columns * (width + 2) - 2, -(-count // columns) * (height + 2) - 2), "white")
    for place, index in enumerate(np.linspace(0, len(clip) - 1, count).round().astype(int)):
        picture = Image.fromarray(clip.frames[index]).resize((width, height), Image.Resampling.LANCZOS)
        sheet.paste(picture, (place % columns * (width + 2), place // columns * (height + 2)))
    return sheet


def side_by_side(left: Clip, right: Clip) -> Clip:
    """Two clips of the same height, length and rate as one; the metadata is the left one's."""
    for what, a, b in (
        ("pixels high", left.height, right.height),
        ("frames long", len(left), len(right)),
        ("frames per second", rational(left.fps), rational(right.fps)),
    ):
        if a != b:
            raise ValueError(f"clips of {a} and {b} {what} cannot stand side by side: use resized, resample or clip[a:b] first")
    return replace(left, frames=np.concatenate([left.frames, right.frames], axis=2))


def heat_map(values: np.ndarray, clip: Clip, low: float | None = None, high: float | None = None) -> Clip:
    """The clip, and beside it the clip in grey under a map of values: dark where low, bright where high.

    values: float (F, h, w), one map per frame of the clip, scaled up smoothly to its size.
    low, high: the values for black and for brightest; by default the 1st and the 99th percentile.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 3 or len(values) != len(clip) or 0 in values.shape:
        raise ValueError(f"values are {values.shape}: give one map per frame, ({len(clip)}, h, w)")
    if not np.isfinite(values).all():
        raise ValueError(f"values hold {np.count_nonzero(~np.isfinite(values))} places that are not finite: the score is not valid there")
    low = float(np.percentile(values, 1)) if low is None else low
    high = float(np.percentile(values, 99)) if high is None else high
    table = np.stack([np.interp(np.linspace(0, 1, 256), np.linspace(0, 1, len(HEAT)), HEAT[:, c]) for c in range(3)], axis=1)
    blends = []
    for value, frame in zip(values, clip.frames, strict=True):
        level = np.clip((value - low) / max(high - low, 1e-12), 0.0, 1.0).astype(np.float32)
        level = np.asarray(Image.fromarray(level).resize((clip.width, clip.height), Image.Resampling.BILINEAR))
        grey = frame @ np.array([0.2126, 0.7152, 0.0722])
        blends.append(np.round(0.7 * table[np.round(level * 255).astype(np.uint8)] + 0.3 * grey[:, :, None]).astype(np.uint8))
    return side_by_side(clip, replace(clip, frames=np.stack(blends)))
