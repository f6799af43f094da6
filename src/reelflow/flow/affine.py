"""The affine step: the only copy of its formulas. All of it in float32, whatever the network's precision.

    forward (data → noise)   z = (x − shift) / scale        log|det| per element = −log scale
    inverse (noise → data)   x = scale · z + shift

Shapes: any; the channels of a token are last.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from reelflow.config import FlowConfig

SOFTPLUS_ONE = 0.541324854612918  # softplus(this) = 1, so an untrained block is the identity


class Affine(NamedTuple):
    """Parameters of some tokens, each (…, c) float32; scale > 0."""

    shift: Tensor
    scale: Tensor

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(z, log_det per element)."""
        return (x - self.shift) / self.scale, -self.scale.log()

    def inverse(self, z: Tensor) -> Tensor:
        return self.scale * z + self.shift


def wide(x: Tensor) -> Tensor:
    """In float32, or in float64 where it is that already (a model in float64 computes in float64 throughout)."""
    return x if x.dtype == torch.float64 else x.float()


def parameters(raw: Tensor, config: FlowConfig) -> Affine:
    """(shift, scale) from a block's raw outputs (…, 2c): soft clip to ±k, first half the scale, second the shift."""
    raw = wide(raw)
    if config.soft_clip:
        raw = config.soft_clip * torch.tanh(raw / config.soft_clip)
    a, shift = raw.chunk(2, dim=-1)
    return Affine(shift, a.exp() if config.scale == "exp" else F.softplus(a + SOFTPLUS_ONE))


def guide(conditional: Affine, unconditional: Affine, weight: float) -> Affine:
    """Classifier-free guidance: the Gaussian ∝ p(x | text)^(1 + w) / p(x)^w, its variance ratio r clipped at 1.

    r = min(σ_c / σ_u, 1)²,   σ = σ_c / √(1 + w − w r),   μ = ((1 + w) μ_c − w r μ_u) / (1 + w − w r)
    """
    ratio = (conditional.scale / unconditional.scale).clamp(max=1.0).square()
    precision = 1 + weight - weight * ratio
    shift = ((1 + weight) * conditional.shift - weight * ratio * unconditional.shift) / precision
    return Affine(shift, conditional.scale / precision.sqrt())
