"""Removing the data noise from sampled latents: the learned denoiser, and the Tweedie step through the flow.

Shapes: B batch, F latent frames, C channels, h × w places, L text tokens, E text channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reelflow.flow import StarFlow
from reelflow.likelihood import log_prob

SCORE_UNIT = 0.3
"""The denoiser's output is in units of this: clean latents are x − 0.3 · output, at every noise level."""


def denoise(model: StarFlow, x_BFChw: Tensor, text_BLE: Tensor | None, window: int | None = None) -> Tensor:
    """Clean latents by the learned denoiser, or by one Tweedie step where the model has none.

    Videos beyond the `window` (the trained one by default) go in chunks of it, each of which takes its first
    `denoiser_window` frames from the chunk before as context.
    """
    if model.denoiser is None:
        return tweedie(model, x_BFChw, text_BLE)
    frames, window = x_BFChw.shape[1], window or model.config.window
    context = min(model.denoiser.config.window or window - 1, window - 1)
    clean = torch.empty_like(x_BFChw)
    start = skip = 0
    with torch.no_grad():
        while start + skip < frames:
            chunk = x_BFChw[:, start : start + window]
            found = chunk - SCORE_UNIT * model.score(chunk, text_BLE)
            clean[:, start + skip : start + window] = found[:, skip:]
            start, skip = start + window - context, context
    return clean


def tweedie(model: StarFlow, x_BFChw: Tensor, text_BLE: Tensor | None = None) -> Tensor:
    """The posterior mean E[clean | x] = x + σ² ∇_x log p(x), one gradient through the flow."""
    with torch.enable_grad():
        x = x_BFChw.detach().clone().requires_grad_()
        (slope,) = torch.autograd.grad(log_prob(model, x, text_BLE).map.sum(), x)
    return x_BFChw + model.config.noise_std**2 * slope
