"""From decoded frames to a clip: what is kept of a file, within limits, and placed at a constant rate.

Shapes: F frames of H x W pixels, 3 = red, green, blue; uint8 sRGB. Times are seconds.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path

import numpy as np

from reelflow.media.comment import MediaError
from reelflow.media.picture import fitted


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a file may ask for; beyond it `read` refuses, before decoding where the header tells.

    pixels: of one frame. frames, seconds: of what is read. memory: bytes of all decoded frames together.
    """

    pixels: int = 64_000_000
    frames: int = 20_000
    seconds: float = 3600.0
    memory: int = 4 * 2**30

    def check(self, path: Path, height: int, width: int, frames: float = 1, seconds: float = 0.0) -> None:
        """Raise `MediaError` if a clip of this size is beyond the limits."""
        needed = frames * height * width * 3
        if height * width > self.pixels:
            raise MediaError(f"{path} has frames of {width} x {height} pixels, over the limit of {self.pixels:,}: make it smaller")
        if frames > self.frames or seconds > self.seconds:
            what, limit = (f"{frames:.0f} frames ({seconds:.1f} s)", f"{self.frames} frames ({self.seconds:g} s)")
        elif needed > self.memory:
            what, limit = (f"{needed / 2**30:.1f} GiB of decoded frames", f"{self.memory / 2**30:.1f} GiB")
        else:
            return
        raise MediaError(f"{path} has {what}, over the limit of {limit}: read a part with max_frames, or make it smaller")


@dataclass(frozen=True)
class Shown:
    """One frame, shown from `time` for `duration` seconds; `picture()` converts it to (H, W, 3), before the next one comes."""

    time: float
    duration: float
    picture: Callable[[], np.ndarray]


def gather(
    path: Path, shown: Iterator[Shown], max_frames: int | None, start: float, limits: Limits
) -> tuple[list[np.ndarray], np.ndarray, float]:
    """Decode: the pictures from `start` on, their times (F,) in seconds from the first of them, and when the last one ends."""
    pictures: list[np.ndarray] = []
    times: list[float] = []
    end = 0.0
    try:
        for frame in shown:
            if frame.time + frame.duration / 2 < start:
                continue
            pictures.append(frame.picture())
            times.append(frame.time)
            end = frame.time + frame.duration - times[0]
            height, width, _ = pictures[-1].shape
            if pictures[-1].shape != pictures[0].shape:
                raise MediaError(f"{path} changes its size to {width} x {height} at {frame.time:.2f} s: bring all frames to one size")
            limits.check(path, height, width, len(pictures), frame.time - times[0])
            if len(pictures) == max_frames:
                break
    except MediaError:
        raise
    except Exception as error:  # decoders of strangers' files raise anything
        count = len(pictures)
        whole = f"only its first {count} frames can be read, with max_frames={count}" if count else "no frame can be read"
        raise MediaError(f"{path} is damaged or cut off ({reason(error)}): {whole}; make or download it again") from error
    if not pictures:
        why = f"at or after start={start:g} s: use a smaller start" if start else "in it: make or download it again"
        raise MediaError(f"{path} has no frames {why}")
    return pictures, np.array(times) - times[0], end


@dataclass(frozen=True)
class Sieve:
    """Another rate and size, made while a file is decoded, so that memory holds the result alone.

    Picture k is the one nearest in time to k / fps after the start, the later one of two as near, as `Clip.resample` has it;
    `height` x `width` pixels of it are made by `fitted`, at `place`.
    """

    fps: float
    height: int
    width: int
    place: tuple[float, float] = (0.5, 0.5)

    def __call__(self, path: Path, shown: Iterator[Shown], start: float) -> Iterator[Shown]:
        """The chosen pictures, scaled. A picture of `shown` is converted only if it is chosen, once the next one has come."""
        before: Shown | None = None
        begin, index, shape = start, 0, (0, 0)

        def picture(frame: Shown) -> np.ndarray:
            nonlocal shape
            found = frame.picture()
            shape = shape if any(shape) else found.shape[:2]
            if found.shape[:2] != shape:
                height, width = found.shape[:2]
                raise MediaError(f"{path} changes its size to {width} x {height} at {frame.time:.2f} s: bring all frames to one size")
            return fitted(found, self.height, self.width, self.place)

        def until(end: float, frame: Shown) -> Iterator[Shown]:
            nonlocal index
            made = cache(lambda: picture(frame))
            while (time := begin + index / self.fps) < end - 1e-6:
                yield Shown(time, 1 / self.fps, made)
                index += 1

        for frame in shown:
            if before is None:
                begin = max(start, frame.time)
            else:
                yield from until((before.time + frame.time) / 2, before)
            before = frame
        if before is not None:
            yield from until(before.time + before.duration, before)


def rational(fps: float | Fraction) -> Fraction:
    """The frame rate as the fraction that was meant: 29.97002997002997 is 30000/1001."""
    return Fraction(fps).limit_denominator(100_000)


def constant_rate(times: np.ndarray, end: float, tick: float, said: list[float | Fraction | None]) -> Fraction:
    """The first rate that explains every time within one tick of the file's clock, else the average rate."""
    average = (len(times) - 1) / times[-1] if times[-1] > 0 else len(times) / max(end, 1e-3)
    for rate in [*said, round(average)]:
        if rate and 0.001 <= rate <= 1000:
            drift = np.abs(times - np.arange(len(times)) / float(rate)).max()
            if drift <= min(tick, 0.25 / float(rate)) + 1e-6:
                return rational(rate)
    return rational(min(max(average, 0.001), 1000.0))


def on_grid(
    path: Path, pictures: list[np.ndarray], times: np.ndarray, end: float, rate: Fraction, max_frames: int | None, limits: Limits
) -> np.ndarray:
    """Frames (F, H, W, 3) at a constant rate: place k holds the last picture that began by k / rate, to the nearest place."""
    places = np.floor(times * float(rate) + 0.5).astype(np.int64)
    count = max(int(places[-1]) + 1, round(end * float(rate)))
    count = count if max_frames is None else min(count, max_frames)
    limits.check(path, pictures[0].shape[0], pictures[0].shape[1], count, count / float(rate))
    return np.stack([pictures[i] for i in np.searchsorted(places, np.arange(count), side="right") - 1])


def reason(error: Exception) -> str:
    """What an exception says, without its number."""
    return str(getattr(error, "strerror", None) or error or type(error).__name__)
