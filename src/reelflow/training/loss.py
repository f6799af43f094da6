"""What is minimised: exact negative log-likelihood, and flow-score matching for the denoiser.

Shapes: B batch, F latent frames, C channels, h × w places, L text tokens, E text channels.
"""

from __future__ import annotations

from torch import Tensor

from reelflow.denoise import SCORE_UNIT
from reelflow.flow import StarFlow


def nll(model: StarFlow, x_BFChw: Tensor, text_BLE: Tensor | None, learned_BF: Tensor | None = None) -> Tensor:
    """0.5 z² − log|det| averaged over a clip's values, (B,), in nats per value, without the constant ½ log 2π.

    learned_BF: 1 for the latent frames that count, 0 for the others; None: all of them count.
    """
    z, log_det = model(x_BFChw, text_BLE)
    return mean_of_frames(0.5 * z.square() - log_det, learned_BF)


def mean_of_frames(values_BF: Tensor, learned_BF: Tensor | None) -> Tensor:
    """The mean (B,) of what frames have (B, F, …), of those that `learned_BF` says."""
    values_BF = values_BF.flatten(2).mean(2)
    return values_BF.mean(1) if learned_BF is None else (values_BF * learned_BF).sum(1) / learned_BF.sum(1)


def noise_weight(noise_std_B: Tensor, told: bool) -> Tensor:
    """Factor σ/0.3 of every clip's loss where the model is told its noise level (else 1), (B,): the noisier a clip, the
    smaller the slope of its log p.
    """
    return noise_std_B / SCORE_UNIT if told else noise_std_B.new_ones(noise_std_B.shape)


def score_target(slope_BFChw: Tensor, noise_std_B: Tensor, weight_B: Tensor) -> Tensor:
    """The denoiser's target σ²/0.3 · ∇_x(−log p), from the gradient that the flow's backward pass left on x.

    Args:
        slope_BFChw: of Σ_b weight_b · nll_b.
        noise_std_B: σ.
        weight_B: of every clip's mean over its values.
    """
    values = slope_BFChw[0].numel()
    return (noise_std_B.square() / (SCORE_UNIT * weight_B) * values)[:, None, None, None, None] * slope_BFChw


def score_loss(model: StarFlow, x_BFChw: Tensor, target_BFChw: Tensor, text_BLE: Tensor | None) -> Tensor:
    """Mean squared error of the denoiser's output. `x`, target and text are detached: this never reaches the flow."""
    text = None if text_BLE is None else text_BLE.detach()
    return (model.score(x_BFChw.detach(), text) - target_BFChw.detach()).square().mean()
