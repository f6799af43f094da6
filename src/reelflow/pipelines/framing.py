"""What of the world fits a model: lengths, sizes, aspects, and clips cut to them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from reelflow.adapters.vae import Codec
from reelflow.clip import Clip
from reelflow.config import ModelConfig
from reelflow.media.aspect import ASPECTS, SMALLEST, aspects, frame_size, nearest_aspect
from reelflow.pipelines.base import check_length, say


@dataclass(frozen=True)
class Framing:
    """The rules of one model and its codec."""

    about: ModelConfig
    codec: Codec

    def frame_size(self, aspect: str) -> tuple[int, int]:
        """(height, width) in pixels at the model's area: side / √R and side · √R, rounded to the codec's multiple."""
        if not self.about.prompt.aspect and aspect != "1:1":
            raise ValueError(f"aspect {aspect!r}: {self.about.name} makes square clips only; use 1:1")
        if aspect not in ASPECTS:
            raise ValueError(f"aspect {aspect!r} is not one of {', '.join(ASPECTS)}")
        return frame_size(self.about.size, aspect, self.codec.spatial_factor)

    def nearest_aspect(self, height: float, width: float) -> str:
        """The model's aspect nearest to a picture's."""
        return nearest_aspect(height, width, aspects(self.about.prompt.aspect))

    def length(self, seconds: float | None, frames: int | None) -> int:
        """Frames of a clip: as asked, or the nearest to `seconds` that the codec takes, or the trained length."""
        check_length(seconds, frames)
        if frames is not None:
            return frames
        if seconds is None:
            return self.about.frames
        step = self.codec.temporal_factor
        return 1 + step * round(max(0.0, seconds * self.about.fps - 1) / step)

    def fit(self, clip: Clip) -> tuple[Clip, str]:
        """Centre-crop to the nearest aspect of the model and resize to its size there."""
        if min(clip.height, clip.width) < SMALLEST:
            raise ValueError(f"the picture is {clip.width} × {clip.height} pixels; give one of at least {SMALLEST} × {SMALLEST}")
        aspect = self.nearest_aspect(clip.height, clip.width)
        return clip.resized(*self.frame_size(aspect)), aspect

    def source(self, clip: Clip, most: int | None) -> tuple[Clip, str]:
        """A given video at the model's rate and size, its end cut to a length the codec takes (at most `most` frames)."""
        clip = clip.resample(self.about.fps)
        step = self.codec.temporal_factor
        length = 1 + (len(clip) - 1) // step * step
        if most is not None and length > most:
            say(f"the video has {len(clip)} frames at {self.about.fps:g} per second; the first {most} are used")
            length = most
        return self.fit(clip[:length])

    def whole(self, clip: Clip) -> Clip:
        """A video to edit, as the model reads it: of the trained length, the last frame repeated, where it has learned no other."""
        if not self.about.whole_edits:
            return clip
        return replace(clip, frames=clip.frames[np.arange(self.about.frames).clip(max=len(clip) - 1)])
