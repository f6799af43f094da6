"""What is minimised: exact negative log-likelihood, and flow-score matching for the denoiser.

Shapes: B batch, F latent frames, C channels, h × w places, L text tokens, E text channels.
"""

from __future__ import annotations

from torch import Tensor

from reelflow.denoise import SCORE_UNIT
from reelflow.flow import StarFlow


def nll(model: StarFlow, x_BFChw: Tensor, text_BLE: Tensor | None) -> Tensor:
    """0.5 z² − log|det| averaged over all values, in nats per value, without the constant ½ log 2π. Scalar."""
    z, log_det = model(x_BFChw, text_BLE)
    return (0.5 * z.square() - log_det).mean()


def score_target(model: StarFlow, slope_BFChw: Tensor) -> Tensor:
    """The denoiser's target σ²/0.3 · ∇_x(−log p), from the gradient of the mean loss that its backward pass left on x."""
    return model.config.noise_std**2 / SCORE_UNIT * slope_BFChw.numel() * slope_BFChw


def score_loss(model: StarFlow, x_BFChw: Tensor, target_BFChw: Tensor, text_BLE: Tensor | None) -> Tensor:
    """Mean squared error of the denoiser's output. `x`, target and text are detached: this never reaches the flow."""
    text = None if text_BLE is None else text_BLE.detach()
    return (model.score(x_BFChw.detach(), text) - target_BFChw.detach()).square().mean()
