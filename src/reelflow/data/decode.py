"""From a sample to frames as a model takes them: at its rate and size, from a place that follows from seed, epoch and name alone.

Shapes: F frames of H x W pixels, 3 = red, green, blue; uint8 sRGB.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np

from reelflow.clip import MediaError
from reelflow.data.failures import UnusableError
from reelflow.data.scene import Scene
from reelflow.data.source import Blob, Media, Member, Sample
from reelflow.data.toybox import render
from reelflow.media.aspect import SMALLEST, frame_size, nearest_aspect
from reelflow.media.read import probe, read
from reelflow.media.timeline import Sieve

ENDLESS = 10**6
"""Frames of a scene that is rendered."""


class Piece(NamedTuple):
    """Frames (clips, F, H, W, 3): one clip, or both of an edit; and their aspect."""

    frames: np.ndarray
    aspect: str


class Measure(NamedTuple):
    """What can be taken of a sample: frames at the model's rate (1 of a still), the nearest aspect."""

    frames: int
    aspect: str
    still: bool


@dataclass(frozen=True)
class View:
    """What a model sees of the world: frames per second, area side² in pixels, sides in multiples of `unit`, 1 + `step` · k frames."""

    fps: float
    side: int
    unit: int
    step: int
    aspects: tuple[str, ...]
    random_crop: bool
    seed: int

    def length(self, most: int) -> int:
        """The longest usable length up to `most` frames."""
        return 1 + (most - 1) // self.step * self.step

    def measure(self, sample: Sample) -> Measure:
        """Look at a sample's header and first frame. Raises UnusableError: without a caption, not readable, too small."""
        if not sample.captions:
            raise UnusableError("without a caption", f"{sample.key} has no caption")
        target = self._measure(sample.key, sample.media)
        if sample.source is None:
            return target
        source = self._measure(f"{sample.key}, its source", sample.source)
        return target._replace(frames=min(target.frames, source.frames))

    def _measure(self, key: str, media: Media | None) -> Measure:
        if isinstance(media, Scene):
            return Measure(ENDLESS, "1:1", False)
        with _readable(key, media) as path:
            facts = probe(path)
        if min(facts.height, facts.width) < SMALLEST:
            size = f"{facts.width} × {facts.height} pixels"
            raise UnusableError("too small", f"{key}: {size}; at least {SMALLEST} × {SMALLEST} are needed")
        count = max(1, math.floor(facts.seconds * self.fps + 0.25))  # headers are not exact
        return Measure(count, nearest_aspect(facts.height, facts.width, self.aspects), facts.seconds == 0)

    def require(self, sample: Sample, measure: Measure, least: int) -> None:
        """Raise UnusableError where a video, not a still, has fewer frames."""
        if measure.frames < least and not measure.still:
            words = f"{measure.frames} frames at {self.fps:g} per second; at least {least} are asked for"
            raise UnusableError("too short", f"{sample.key}: {words} (data.min_frames)")

    def take(self, sample: Sample, measure: Measure, frames: int, least: int, epoch: int) -> Piece:
        """The clip of a sample in an epoch, `frames` long or as long as it can be, if that is `least` or more.

        A still has one frame. The place follows from (seed, epoch, key).

        Raises:
            UnusableError: too short, or it cannot be decoded.
        """
        self.require(sample, measure, least)
        length = self.length(min(frames, measure.frames))
        rng = np.random.default_rng((self.seed, epoch, int.from_bytes(sha256(sample.key.encode()).digest()[:8])))
        start = int(rng.integers(measure.frames - length + 1))
        place = (float(rng.random()), float(rng.random())) if self.random_crop else (0.5, 0.5)
        height, width = frame_size(self.side, measure.aspect, self.unit)
        sieve = Sieve(self.fps, height, width, place)
        media = [sample.media] if sample.source is None else [sample.source, sample.media]
        return Piece(np.stack([self._decode(sample.key, some, start, length, sieve) for some in media]), measure.aspect)

    def _decode(self, key: str, media: Media | None, start: int, length: int, sieve: Sieve) -> np.ndarray:
        if isinstance(media, Scene):
            return render([media], length, self.side)[0].numpy()
        with _readable(key, media) as path:
            found = read(path, length, start / self.fps, sieve=sieve)[0]
        if len(found) < length:
            words = f"stops after {len(found)} of {length} frames from {start / self.fps:.2f} s on"
            raise UnusableError("that cannot be decoded", f"{key}: {words}")
        return found


@contextmanager
def _readable(key: str, media: Media | None) -> Iterator[Path]:
    """The file of a sample, for a while, under whatever name; an error in reading it becomes UnusableError, by its key."""
    if media is None:
        raise UnusableError("that cannot be decoded", f"{key}: no video or picture in it")
    assert not isinstance(media, Scene)
    with nullcontext(media) if isinstance(media, Path) else _unpacked(media) as path:
        try:
            yield path
        except MediaError as error:
            words = str(error) if path == media else str(error).replace(str(path), key)
            raise UnusableError("that cannot be decoded", words) from None


@contextmanager
def _unpacked(media: Member | Blob) -> Iterator[Path]:
    """As a file: decoders seek, and formats are told by content."""
    with tempfile.NamedTemporaryFile(prefix="reelflow-") as file:
        file.write(media.read())
        file.flush()
        yield Path(file.name)
