"""Batches of clips as Stable Video Diffusion is shown them, from what was prepared or from the clips themselves.

A row of a batch is every s-th frame from one of a clip's K pictures on, shown at the clip's rate / s; s and the picture are drawn
among those that give enough frames at no less than the lowest rate. `svd.data` says what a clip is told.

Shapes: F frames, H × W pixels, C latent channels, h × w places, K pictures, E channels of CLIP's embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from reelflow.data.decode import Piece
from reelflow.training.batches import Plan, Planner
from reelflow.training.config import AnyBucket
from reelflow.training.raw import Pieces
from reelflow.training.shards import Entry, PreparedLatents, require_fit
from reelflow.training.svd.config import SvdConfig
from reelflow.training.svd.data import SvdKeeper, motion_strength, seen_by, speeds, to_pixels
from reelflow.training.svd.model import codec_of


class Shown(NamedTuple):
    """A row of a batch."""

    latents: Tensor
    """(F, C, h, w), scaled."""
    picture: Tensor
    """(C, h, w), not scaled."""
    states: Tensor
    """(E,)."""
    ids: Tensor
    """fps − 1, motion, noise of the picture."""


class Shows(NamedTuple):
    """A batch: its rows, each made when it is asked for."""

    row: Callable[[int], Shown]
    size: int


class Choice(NamedTuple):
    """What a row shows of its clip: every `stride`-th frame from `start` on, picture number `place`, over `span` frames."""

    stride: int
    place: int
    start: int
    span: int


def choose(config: SvdConfig, plan: Plan, row: int, frames: int, rate: float) -> Choice:
    """Drawn among what a clip of so many frames at that rate allows."""
    rng = np.random.default_rng((config.seed, plan.step, row, 2))
    steps = plan.bucket.frames - 1
    usable = [s for s in range(1, (frames - 1) // steps + 1) if s == 1 or rate / s >= config.rates[0]]
    stride = usable[int(rng.integers(len(usable)))]
    place = int(rng.integers((frames - 1 - steps * stride) // config.starts + 1))
    return Choice(stride, place, place * config.starts, steps * stride)


def drawn(config: SvdConfig, plan: Plan, row: int, mean: Tensor, std: Tensor) -> Tensor:
    """From the posterior."""
    seed = np.random.SeedSequence((config.seed, plan.step, row, 1)).generate_state(1)[0]
    return mean + std * torch.randn(mean.shape, generator=torch.Generator().manual_seed(int(seed)))


def told(choice: Choice, rate: float, speed: Tensor, noise: Tensor) -> Tensor:
    """fps − 1, motion, noise of the picture. speed: of the frames that the row spans."""
    motion = motion_strength(float(speed.mean()) * rate)
    return torch.tensor([rate / choice.stride - 1, motion, float(noise[choice.place])])


class PreparedShows:
    """Batches from what was prepared. `source(step)` is a function of (seed, step) alone, whatever was asked before.

    Raises:
        ValueError: nothing is prepared, it does not fit the model, or a bucket for which no clip is long enough.
    """

    def __init__(self, config: SvdConfig):
        assert config.latents is not None
        codec = codec_of(config)
        require_fit(config.latents, seen_by(config))
        self.config, self.scaling, self.prepared = config, codec.scaling, PreparedLatents(config.latents)
        self.planner = Planner(config, self.prepared.entries, config.latents)
        self.states = self.prepared.tensor(self.prepared.entries[0], "states").shape[1]
        """Channels of CLIP's embedding."""
        self.sampled = config.data is not None and config.data.posterior == "sample"

    def close(self) -> None:
        """Nothing runs in the background."""

    def __call__(self, step: int) -> Shows:
        plan = self.planner.plan(step)
        return Shows(lambda row: self._row(plan, row), len(plan.draws))

    def _row(self, plan: Plan, row: int) -> Shown:
        entry, _ = next(self.planner.draw(plan.bucket, plan.aspect, plan.draws[row]))
        picture, states, noise, speed, rates = (
            self.prepared.tensor(entry, name) for name in ("picture", "states", "noise", "speed", "rate")
        )
        choice = choose(self.config, plan, row, entry.frames, float(rates))
        mean, std = (None if x is None else x[0, :: choice.stride] for x in self.prepared.read(entry, choice.start, choice.span + 1))
        assert mean is not None
        if self.sampled:
            if std is None:
                raise ValueError(f"{entry.file}: holds means without deviations; use data.posterior=mean, or prepare the data anew")
            mean = drawn(self.config, plan, row, mean, std)
        ids = told(choice, float(rates), speed[choice.start : choice.start + choice.span], noise)
        return Shown(mean * self.scaling, picture[choice.place], states[choice.place], ids)


class RawShows(Pieces):
    """Batches from the clips themselves, encoded when they are asked for; else as `PreparedShows`. Args and errors: as `Pieces`."""

    def __init__(self, config: SvdConfig, folder: Path, device: str | torch.device = "cpu", rank: int = 0, ranks: int = 1):
        self.config, self.scaling, self.keeper = config, codec_of(config).scaling, SvdKeeper(config, device)
        self.states = self.keeper.tower.config.projection_dim
        super().__init__(config, folder, self.keeper.view, self.keeper.lengths, Planner, rank, ranks)

    def taken(self, bucket: AnyBucket) -> int:
        return self.keeper.lengths.clips

    def __call__(self, step: int) -> Shows:
        plan, found = self.decoded(step)

        def row_of(row: int) -> Shown:
            return self._row(plan, row, *(found.get(row) or self._piece(plan, row)))

        return Shows(row_of, len(plan.draws))

    def _row(self, plan: Plan, row: int, entry: Entry, piece: Piece) -> Shown:
        keeper, pixels, rate = self.keeper, to_pixels(piece), self.keeper.view.rate(entry.key)
        choice = choose(self.config, plan, row, len(pixels), rate)
        spanned = pixels[choice.start : choice.start + choice.span + 1]
        mean, std = keeper.posterior(spanned[:: choice.stride])
        if self.data.posterior == "sample":
            mean = drawn(self.config, plan, row, mean, std)
        noise, pictures = keeper.pictures(entry.key, pixels)
        picture = keeper.posterior(pictures[choice.place : choice.place + 1])[0][0]
        states = keeper.embedded(spanned[:1])[0]
        return Shown(mean * self.scaling, picture, states, told(choice, rate, speeds(spanned), noise))


__all__ = ["PreparedShows", "RawShows", "Shown", "Shows"]
