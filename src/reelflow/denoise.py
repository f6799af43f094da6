"""Removing the data noise from sampled latents: the learned denoiser, and the Tweedie step through the flow.

Shapes: B batch, F latent frames, C channels, h × w places, L text tokens, E text channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice

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


@torch.no_grad()
def denoise_frames(
    model: StarFlow, frames: Iterable[Tensor], text: Callable[[int], Tensor | None], window: int | None = None
) -> Iterator[Tensor]:
    """`denoise` by the learned denoiser, frame by frame (B, C, h, w), each as soon as the look-ahead allows.

    `text`: states by the first new frame of a chunk.  Raises ValueError for a model without a learned denoiser.
    """
    if model.denoiser is None:
        raise ValueError("this model has no learned denoiser, and a Tweedie step reads the whole video; do not stream, or do not denoise")
    window = window or model.config.window
    context = min(model.denoiser.config.window or window - 1, window - 1)
    source, chunk, done = iter(frames), list[Tensor](), 0
    while (new := next(source, None)) is not None:
        kept = chunk[-context:]
        chunk = []
        rest = islice(source, window - len(kept) - 1)
        for index, score in enumerate(model.score_frames(_kept(chain(kept, (new,), rest), chunk), _size(new), text(done))):
            if index >= len(kept):
                yield chunk[index] - SCORE_UNIT * score
                done += 1


def _kept(frames: Iterable[Tensor], into: list[Tensor]) -> Iterator[Tensor]:
    """The frames, each added to `into` as it passes."""
    for frame in frames:
        into.append(frame)
        yield frame


def _size(x_BChw: Tensor) -> tuple[int, int]:
    return x_BChw.shape[-2], x_BChw.shape[-1]


def tweedie(model: StarFlow, x_BFChw: Tensor, text_BLE: Tensor | None = None) -> Tensor:
    """The posterior mean E[clean | x] = x + σ² ∇_x log p(x), one gradient through the flow."""
    with torch.enable_grad():
        x = x_BFChw.detach().clone().requires_grad_()
        (slope,) = torch.autograd.grad(log_prob(model, x, text_BLE).map.sum(), x)
    return x_BFChw + model.config.noise_std**2 * slope
