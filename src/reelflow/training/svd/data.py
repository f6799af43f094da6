"""What Stable Video Diffusion is trained on: clips at many playback rates, as latents, and pictures as the model is shown them.

`train prepare` shows every clip at a playback rate drawn for it between `rates`, evenly in its logarithm, and keeps

    i.mean, i.std   of all frames' latents (1, F, C, h, w), not scaled
    i.picture       (K, C, h, w): mode of the latents of every `starts`-th frame, with noise added to its pixels
    i.noise         (K,): standard deviations of that noise, log-normal
    i.states        (K, E): CLIP's embedding of these frames, without noise
    i.speed         (F − 1,): movement from frame to frame, see `speeds`
    i.rate          frames per second

so that training needs neither VAE nor CLIP. `svd.shows` makes batches of that, or of the clips themselves by the same means.

**Motion strength** is 1 + 254 · min(1, 2 v), v the movement in sides of the frame per second, averaged over the row. It is per second,
not per frame: at one motion strength, things move less from frame to frame the higher the rate.

Shapes: F frames, H × W pixels, C latent channels, h × w places, K pictures, E channels of CLIP's embedding.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reelflow.adapters.hub import resolve
from reelflow.adapters.svd import CLIP_MEAN, CLIP_STD, clip_norm
from reelflow.adapters.text import no_progress_bar
from reelflow.data.decode import Measure, Piece, View
from reelflow.data.failures import UnusableError
from reelflow.data.scene import FPS, Scene
from reelflow.data.source import Media, Sample
from reelflow.data.toybox import render
from reelflow.pipelines.svd.picture import UNIT, VIEW, clip_view
from reelflow.training.encoder import PIXELS, Lengths
from reelflow.training.shards import Prepared, fingerprint
from reelflow.training.svd.codec import TemporalPass
from reelflow.training.svd.config import SPEEDS, SvdConfig
from reelflow.training.svd.model import TOWER, new_image_encoder, open_image_encoder, open_vae


@dataclass(frozen=True)
class Played(View):
    """Clips at a playback rate of their own, which follows from seed and name; `fps` is not used."""

    rates: tuple[float, float] = SPEEDS

    def rate(self, key: str) -> float:
        low, high = map(math.log, self.rates)
        rng = np.random.default_rng((self.seed, 7, int.from_bytes(sha256(key.encode()).digest()[:8])))
        return round(math.exp(rng.uniform(low, high)), 2)

    def measure(self, sample: Sample) -> Measure:
        """Captions are not needed. Raises UnusableError for a still."""
        found = self._at(sample.key)._measure(sample.key, sample.media)
        if found.still:
            raise UnusableError("a picture", f"{sample.key}: one picture; motion is learned from videos")
        return found

    def take(self, sample: Sample, measure: Measure, frames: int, least: int, epoch: int) -> Piece:
        """Of an edit, the clip after it."""
        view = self._at(sample.key)
        return super(Played, view).take(replace(sample, source=None), measure, frames, least, epoch)

    def _at(self, key: str) -> Played:
        return replace(self, fps=self.rate(key))

    def _decode(self, key: str, media: Media | None, start: int, length: int, sieve: Any) -> np.ndarray:
        if isinstance(media, Scene):
            return render([media], length, self.side, pace=FPS / self.fps)[0].numpy()
        return super()._decode(key, media, start, length, sieve)


def to_pixels(piece: Piece) -> Tensor:
    """(F, 3, H, W), −1 … 1."""
    return torch.from_numpy(piece.frames[0]).permute(0, 3, 1, 2).float() / 127.5 - 1


def speeds(pixels_F3HW: Tensor) -> Tensor:
    """Movement from each frame to the next, (F − 1,), in sides of the frame (√(H·W)).

    2 Σ |x(t + 1) − x(t)| / Σ (|∂x/∂row| + |∂x/∂column|): for something round that moves over even ground, its displacement; of
    several things, the average by the length of their outlines.
    """
    x = pixels_F3HW.float()
    change = x.diff(dim=0).abs().flatten(1).sum(1)
    outline = sum(x[:-1].diff(dim=axis).abs().flatten(1).sum(1) for axis in (2, 3))
    return 2 * change / torch.as_tensor(outline).clamp_min(1e-3) / math.sqrt(x.shape[2] * x.shape[3])


def motion_strength(sides_per_second: float) -> int:
    """1 … 255; the usual 127 is a quarter of the frame's side in a second, about the median of toybox."""
    return round(1 + 254 * min(1.0, max(0.0, 2 * sides_per_second)))


def seen_by(config: SvdConfig) -> dict[str, Any]:
    """What makes a model see clips as it does."""
    given = resolve(config.init) / TOWER if config.init else config.image_encoder
    tower = fingerprint(given) if isinstance(given, Path) else dict(sorted(given.items()))
    picture = {"rates": list(config.rates), "starts": config.starts, "noise_mean": config.noise_mean, "noise_std": config.noise_std}
    return {"family": "svd", "about.size": config.about.size, "codec": fingerprint(config.vae), TOWER: tower, **picture}


class SvdKeeper:
    """What is kept of clips; see the top of the file. A new CLIP tower is written beside the latents."""

    def __init__(self, config: SvdConfig, device: str | torch.device):
        assert config.data is not None
        self.config, self.data, self.device = config, config.data, torch.device(device)
        self.codec = TemporalPass(open_vae(config, device))
        if config.init:
            self.tower, self.norm = open_image_encoder(config, device), clip_norm(resolve(config.init))
        else:
            self.tower, self.norm = new_image_encoder(config), (CLIP_MEAN, CLIP_STD)
            if config.latents and not (config.latents / TOWER).is_dir():
                with no_progress_bar():
                    self.tower.save_pretrained(str(config.latents / TOWER))
            self.tower.to(self.device)
        if self.tower.config.image_size != VIEW:
            raise ValueError(f"image_encoder: sees {self.tower.config.image_size} pixels; the pipeline shows it {VIEW}")
        self.view = Played(FPS, config.about.size, UNIT, 1, aspects_of(config), self.data.crop == "random", config.seed, config.rates)
        frames = self.data.frames or config.about.frames
        self.lengths = Lengths(frames, frames, self.data.min_frames or frames)

    def seen(self) -> dict[str, Any]:
        return seen_by(self.config)

    def states(self, samples: list[Prepared]) -> dict[str, Tensor]:
        """This family reads no text."""
        return {}

    def encode(self, pieces: list[tuple[Sample, Piece]]) -> list[Prepared]:
        return [self._one(sample.key, piece) for sample, piece in pieces]

    def _one(self, key: str, piece: Piece) -> Prepared:
        pixels = to_pixels(piece)
        mean, std = self.posterior(pixels)
        noise, pictures = self.pictures(key, pixels)
        more = {
            "picture": self.posterior(pictures)[0].to(torch.bfloat16),
            "states": self.embedded(pixels[:: self.config.starts]).to(torch.bfloat16),
            "noise": noise, "speed": speeds(pixels), "rate": torch.tensor(self.view.rate(key)),
        }  # fmt: skip
        return Prepared(key, (), piece.aspect, mean[None], std[None] if self.data.posterior == "sample" else None, more)

    def pictures(self, key: str, pixels_F3HW: Tensor) -> tuple[Tensor, Tensor]:
        """Every `starts`-th frame with noise added: its standard deviations (K,), and pixels (K, 3, H, W)."""
        shown = pixels_F3HW[:: self.config.starts]
        generator = torch.Generator().manual_seed(int.from_bytes(sha256(f"{self.config.seed} {key}".encode()).digest()[:7]))
        noise = (self.config.noise_mean + self.config.noise_std * torch.randn(len(shown), generator=generator)).exp()
        return noise, shown + noise[:, None, None, None] * torch.randn(shown.shape, generator=generator)

    @torch.no_grad()
    def embedded(self, pixels_K3HW: Tensor) -> Tensor:
        """CLIP's embedding (K, E), on the CPU."""
        views = [clip_view(some.to(self.device), *self.norm) for some in pixels_K3HW.split(8)]
        return torch.cat([self.tower(view).image_embeds.cpu() for view in views])

    @torch.no_grad()
    def posterior(self, pixels_F3HW: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (F, C, h, w) on the CPU, some frames at a time."""
        found = []
        for some in pixels_F3HW.split(max(1, PIXELS // pixels_F3HW[0, 0].numel())):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"):
                found.append(self.codec.encode(some.to(self.device).transpose(0, 1)[None])[0].transpose(0, 1).float().cpu())
        mean, log_variance = torch.cat(found).chunk(2, 1)
        return mean, (0.5 * log_variance.clamp(-30, 20)).exp()


def aspects_of(config: SvdConfig) -> tuple[str, ...]:
    """Of clips: square for a model whose own size is square, else 16:9 and upright."""
    unet = config.unet or json.loads((resolve(config.init or "") / "unet" / "config.json").read_text(encoding="utf-8"))
    side = unet.get("sample_size", [1, 1])
    return ("1:1",) if isinstance(side, list) and side[0] == side[1] else ("16:9", "9:16")


__all__ = ["SvdKeeper", "motion_strength", "seen_by", "speeds", "to_pixels"]
