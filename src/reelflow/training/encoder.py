"""Frames to latents, many clips at a time: what data is prepared with, and what raw clips go through.

Legend: N clips, F frames, H × W pixels, f latent frames, h × w latent places, C latent channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from reelflow.adapters.vae import VideoCodec, load_codec
from reelflow.adapters.wan_fast import WanPass
from reelflow.data.decode import View
from reelflow.media.aspect import aspects
from reelflow.training.config import TrainConfig
from reelflow.training.one_pass import channels_last, one_pass

PIXELS = 4 * 33 * 128 * 128
"""Encoded at once: small clips together, a larger one alone."""


class Encoder:
    """The posterior of clips, as the flow sees latents; bfloat16 arithmetic unless `exact`.

    A small Wan VAE on the CPU sees whole clips in one pass, three times faster; large clips go latent frame by latent frame.
    """

    def __init__(self, folder: str | Path, exact: bool = False, device: str | torch.device = "cpu") -> None:
        self.codec, self.exact, self.device = load_codec(folder, device=device), exact, torch.device(device)
        self.one_pass: WanPass | None = None
        if self.device.type == "cpu" and isinstance(self.codec, VideoCodec) and self.codec.vae.config.is_residual:
            channels_last(self.codec.vae)
            self.one_pass = one_pass(self.codec.vae)

    def __call__(self, frames: Tensor) -> Tensor:
        """The mean: uint8 (N, F, H, W, 3), F = 1 + 4n → float32 (N, f, C, h, w) on the CPU."""
        return self.posterior(frames)[0]

    @torch.no_grad()
    def posterior(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, float32 (N, f, C, h, w) each, on the CPU; a few clips at a time."""
        found = [self._posterior(some) for some in frames.split(max(PIXELS // frames[0, ..., 0].numel(), 1))]
        mean, std = (torch.cat([pair[index].cpu() for pair in found]) for index in range(2))
        return mean, std

    def _posterior(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=not self.exact):
            if self.one_pass is None or frames[..., 0].numel() > PIXELS:
                return self.codec.posterior(frames)
            self.codec.latent_shape(*frames.shape[1:4])
            pixels = frames.permute(0, 4, 1, 2, 3).to(torch.float32) / 127.5 - 1
            moments = self.one_pass.encode(pixels)
        return self.codec.standardised(*moments.float().transpose(1, 2).chunk(2, 2))


@dataclass
class Lengths:
    """Frames of what is taken from the data: clips (at least `least`), and each clip of an edit."""

    clips: int
    edits: int
    least: int


def view_of(config: TrainConfig, encoder: Encoder) -> tuple[View, Lengths]:
    """How the model sees clips, and how long they are prepared. Raises ValueError for a length that the codec cannot take."""
    data, about, codec = config.data, config.about, encoder.codec
    assert data is not None
    usable = aspects(about.prompt.aspect)
    view = View(about.fps, about.size, codec.spatial_factor, codec.temporal_factor, usable, data.crop == "random", config.seed)
    frames = data.frames or about.frames
    lengths = Lengths(frames, data.edit_frames or 1 + view.step * round((frames / 2 - 1) / view.step), data.min_frames or frames)
    for length in (lengths.clips, lengths.edits):
        codec.latent_shape(length, about.size // view.unit * view.unit, about.size // view.unit * view.unit)
    return view, lengths
