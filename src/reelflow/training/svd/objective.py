"""The objective of diffusion: v-prediction after Karras et al. (EDM) with σ_data = 1, as Stable Video Diffusion was trained.

With x clean latents, ε noise of standard deviation 1 and x̃ = x + σ ε, the UNet sees x̃ / √(σ² + 1) at the time 0.25 ln σ and says
v; its estimate of x is D = x̃ / (σ² + 1) − v σ / √(σ² + 1). The paper's weight (1 + σ²) / σ² of |D − x|² makes that

    |v − (ε − σ x) / √(σ² + 1)|²,   averaged over all values.

Shapes: B rows, F frames, C latent channels, h × w places, E channels of CLIP's embedding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from reelflow.pipelines.svd.settings import REFERENCES
from reelflow.training import parallel
from reelflow.training.adapter import add_adapters, fill_adapters
from reelflow.training.feed import Feed, Source, row_generator
from reelflow.training.parallel import Ranks
from reelflow.training.svd.blocks import activation
from reelflow.training.svd.config import SvdConfig
from reelflow.training.svd.shows import Shows
from reelflow.training.svd.unet import flops, trained, velocity


class Rows(NamedTuple):
    """Some rows of a batch."""

    x: Tensor
    """Clean latents (B, F, C, h, w), scaled."""
    noise: Tensor
    """ε."""
    sigma_B: Tensor
    picture: Tensor
    """(B, C, h, w), zero where it was dropped."""
    states: Tensor
    """(B, E), zero where they were dropped."""
    ids: Tensor
    """(B, 3)."""
    share: float
    """Of these rows among all of the batch."""


class SvdFeed(Feed[Rows]):
    """Clips with what is drawn for them: level and noise, and which conditions are dropped."""

    def __init__(self, config: SvdConfig, source: Source, rank: int = 0, ranks: int = 1, pin: bool = False):
        super().__init__(config, source, rank, ranks, pin)
        self.config = config

    def part(self, batch: Shows, step: int, rows: Sequence[int]) -> Rows:
        config, made = self.config, []
        for row in rows:
            shown, generator = batch.row(row), row_generator(self.config.seed, step, row)
            sigma = (config.p_mean + config.p_std * torch.randn((), generator=generator)).exp()
            noise = torch.randn(shown.latents.shape, generator=generator)
            chance = float(torch.rand((), generator=generator)) / config.drop if config.drop else math.inf
            states, picture = shown.states * (chance >= 2), shown.picture * (chance < 1 or chance >= 3)  # CLIP's, both, the picture's
            made.append((shown.latents, noise, sigma, picture, states, shown.ids))
        stacked = (torch.stack(column) for column in zip(*made, strict=True))
        x, eps, sigma_B, pictures, embeddings, ids = (value.pin_memory() if self.pin else value for value in stacked)
        return Rows(x, eps, sigma_B, pictures, embeddings, ids, len(rows) / batch.size)


def target(x: Tensor, noise: Tensor, sigma_B1111: Tensor) -> Tensor:
    """v of clean latents and their noise."""
    return (noise - sigma_B1111 * x) / (sigma_B1111**2 + 1).sqrt()


class SvdObjective:
    """The UNet, all of it or adapters.

    Args:
        unet: diffusers' module, on the run's device.
        ranks: this process among those of the run, None: it is alone.
    """

    losses: tuple[str, ...] = ("loss",)

    def __init__(self, config: SvdConfig, unet: nn.Module, ranks: Ranks | None = None):
        self.config, self.unet = config, unet
        self.ranks = ranks or Ranks(torch.device(config.device))
        if config.lora:
            add_adapters(unet, config.lora)
            fill_adapters(unet, config.seed)
        self.activate = activation(REFERENCES["stability"], config.compile)
        self.weights: dict[str, nn.Parameter] = {f"unet.{name}": p for name, p in trained(unet).items() if p.requires_grad}
        self.matrices: frozenset[str] = frozenset(name for name, p in self.weights.items() if "block" in name and p[0].numel() > 1)
        self._flops: dict[torch.Size, float] = {}

    def feed(self, source: Source) -> SvdFeed:
        return SvdFeed(self.config, source, self.ranks.rank, self.ranks.count, pin=self.ranks.device.type == "cuda")

    def velocity(self, x: Tensor, noise: Tensor, sigma_B: Tensor, picture: Tensor, states: Tensor, ids: Tensor) -> Tensor:
        """The UNet's v (B, F, C, h, w), float32."""
        sigma = sigma_B[:, None, None, None, None]
        seen = torch.cat(((x + sigma * noise) / (sigma**2 + 1).sqrt(), picture[:, None].expand_as(x)), 2)
        with parallel.precision(self.config, self.ranks.device):
            return velocity(self.unet, seen, 0.25 * sigma_B.log(), states, ids, self.activate, self.config.recompute).float()

    def backward(self, rows: Rows, step: int) -> Tensor:
        x, noise, sigma_B, picture, states, ids = (value.to(self.ranks.device, non_blocking=True) for value in rows[:6])
        v = self.velocity(x, noise, sigma_B, picture, states, ids)
        loss = (v - target(x, noise, sigma_B[:, None, None, None, None])).square().mean() * (rows.share * self.ranks.count)
        loss.backward()
        return loss.detach()[None]

    def separate(self, step: int) -> bool:
        return False

    def work(self, shape: torch.Size, step: int) -> tuple[float, float]:
        if shape[1:] not in self._flops:
            self._flops[shape[1:]] = flops(self.unet, shape[1], shape[3], shape[4]) * (2 if self.config.lora else 3)
        rows, frames, _, height, width = shape
        return rows * frames * height * width, rows * self._flops[shape[1:]]

    @staticmethod
    def explain(means: dict[str, float]) -> dict[str, float]:
        return means


__all__ = ["Rows", "SvdFeed", "SvdObjective", "target"]
