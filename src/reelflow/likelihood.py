"""Exact log-likelihood of latents.

The density is that of the flow's own input: standardised latents of the video codec (frames after the first times the
model's latent scale) with Gaussian noise of standard deviation σ added, per latent value, given the text. By the change
of variables, with N values in all,

    log p(x) = −½ Σ z² − ½ N log 2π + Σ log|det|       (nats)
    bits per dimension = −log p(x) / (N log 2)

The noise is part of what the model is a density of, so it is drawn from a seed and named in the result.

Shapes: B batch, F latent frames, C channels, h × w places.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from reelflow.flow import StarFlow

HALF_LOG_TAU = 0.5 * math.log(2 * math.pi)


@dataclass(frozen=True)
class LogProb:
    """Log-probability in nats of every latent place; sums over places are exact log-densities.

    map: (B, F, h, w), the channels of a place summed.
    """

    map: Tensor
    channels: int

    @property
    def per_frame(self) -> Tensor:
        """(B, F): log p of each latent frame given those before it."""
        return self.map.sum((2, 3))

    @property
    def total(self) -> Tensor:
        """(B,): log p of the clip."""
        return self.map.sum((1, 2, 3))

    @property
    def bits_per_dim(self) -> Tensor:
        """(B,): −log₂ p per latent value."""
        return -self.total / (self.map[0].numel() * self.channels * math.log(2))


def log_prob(model: StarFlow, x_BFChw: Tensor, text_BLE: Tensor | None = None) -> LogProb:
    """log p(x | text) of latents that already carry the data noise, place by place.

    A place's share is that of its own conditional in the deep block plus its part of the shallow blocks' log-determinant.
    """
    z, log_det = model(x_BFChw, text_BLE)
    return LogProb((log_det - 0.5 * z.square() - HALF_LOG_TAU).sum(2), x_BFChw.shape[2])


def add_noise(x_BFChw: Tensor, noise_std: float, generator: torch.Generator) -> Tensor:
    """x + σ ε, ε from a CPU generator, so that a seed means the same on every device."""
    return x_BFChw + noise_std * torch.randn(x_BFChw.shape, generator=generator).to(x_BFChw)
