"""Noise → latents: the deep block frame by frame (beyond the trained length in windows), then the shallow blocks.

Shapes: B batch, F latent frames, S places of a frame, C latent channels, L text tokens, E text channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reelflow.flow import StarFlow, from_tokens, order, to_tokens
from reelflow.flow.affine import wide
from reelflow.flow.block import FlowBlock
from reelflow.sampling.conditioner import Conditioner
from reelflow.sampling.schedules import Progress, Report, Schedule


def invert(
    block: FlowBlock, model: StarFlow, z_BFSC: Tensor, size: tuple[int, int], schedule: Schedule, progress: Progress,
    text_BLE: Tensor | None = None, guidance: float = 0.0, given_BFSC: Tensor | None = None,
) -> tuple[Tensor, Report]:  # fmt: skip
    """Invert one block over the frames of `z_BFSC`, one sequence a batch row; the first frames may be `given`.

    Returns the tokens in raster order, (B, F, S, C), and the schedule's report.
    """
    batch, frames, places, channels = z_BFSC.shape
    deep = block is model.deep_block
    table = model.rotary(frames, *size, text=deep, device=z_BFSC.device)
    conditioner = Conditioner(block, table, batch, frames * places, text_BLE if deep else None, guidance)
    stream = z_BFSC.new_zeros(batch, 1 + frames * places, channels)
    if block.sos is not None:
        stream[:, 0] = block.sos
    known = 0
    if given_BFSC is not None:
        known = given_BFSC.shape[1] * places
        stream[:, 1 : 1 + known] = order(given_BFSC, block).flatten(1, 2)
    report = schedule.solve(conditioner, stream, order(z_BFSC, block).flatten(1, 2), known, places, progress)
    return order(stream[:, 1:].unflatten(1, (frames, places)), block), report


def sample_deep(
    model: StarFlow, z_BFSC: Tensor, size: tuple[int, int], schedule: Schedule, progress: Progress,
    text_BLE: Tensor | None, later_BLE: Tensor | None, guidance: float, prefix_BFSC: Tensor | None, window: int, context: int,
) -> tuple[Tensor, Report]:  # fmt: skip
    """The deep block over any number of frames. Beyond the trained window: text and the last `context` frames are read
    again from position 0, and the next `window − context` frames sampled after them.
    """
    frames = z_BFSC.shape[1]
    done = prefix_BFSC if prefix_BFSC is not None else z_BFSC[:, :0]
    report = Report()
    while done.shape[1] < frames:
        start = 0 if done.shape[1] < window else done.shape[1] - context
        given, noise = done[:, start:], z_BFSC[:, start : start + window]
        text = later_BLE if start and later_BLE is not None else text_BLE
        part, passes = invert(model.deep_block, model, noise, size, schedule, progress, text, guidance, given)
        done = torch.cat((done, part[:, given.shape[1] :]), 1)
        report.add(passes)
    return done, report


def sample(
    model: StarFlow, noise_BFChw: Tensor, text_BLE: Tensor | None = None, guidance: float = 0.0, prefix_BFChw: Tensor | None = None,
    window: int | None = None, context: int | None = None, later_BLE: Tensor | None = None,
    schedule: Schedule | None = None, progress: Progress = lambda tokens: None,
) -> tuple[Tensor, dict[str, Report]]:  # fmt: skip
    """Latents from noise: the inverse of `StarFlow.forward`.

    Args:
        noise_BFChw: standard normal noise for all frames, those of the prefix included (its values there are not used).
        text_BLE: text states; with guidance the conditional ones first, then as many unconditional ones.
        guidance: weight w ≥ 0 of the deep block's guidance; 0 runs the conditional branch only.
        prefix_BFChw: latents of given first frames, noise σ already added; returned unchanged.
        window: frames the deep block sees together, by default the trained length.
        context: frames read again when sampling beyond the model's window, 1 … window − 1; by default 3/4 of the window.
        later_BLE: text states for the windows after the first; by default the same text.
        schedule: how each block is inverted.
        progress: called with the number of tokens finished.

    Returns:
        Latents (B, F, C, h, w) and a report per block kind, "deep" and "shallow".

    Raises:
        ValueError: guidance that is negative or not finite, a context or prefix outside its range, text missing.
    """
    frames = noise_BFChw.shape[1]
    size = (noise_BFChw.shape[-2], noise_BFChw.shape[-1])
    window = window or model.config.window
    context = default_context(window) if context is None else context
    prefix = 0 if prefix_BFChw is None else prefix_BFChw.shape[1]
    if not 0 <= guidance < float("inf"):
        raise ValueError(f"guidance {guidance} is not usable; give a number ≥ 0 (0 switches it off)")
    if frames > window and not 1 <= context < window:
        raise ValueError(f"context of {context} frames does not fit the window of {window}; give 1 … {window - 1}")
    if prefix and prefix >= frames:
        raise ValueError(f"{prefix} of {frames} latent frames are given; nothing is left to sample")
    rows, texts = len(noise_BFChw) * (2 if guidance else 1), 0 if text_BLE is None else len(text_BLE)
    if model.deep_block.proj_text is not None and texts != rows:
        raise ValueError(f"{texts} text states for {len(noise_BFChw)} clips at guidance {guidance:g}; this model needs {rows}")
    schedule = schedule or Schedule()
    with torch.no_grad():
        u_prefix = model.to_deep(prefix_BFChw) if prefix_BFChw is not None else None
        z = wide(to_tokens(noise_BFChw))
        u, deep = sample_deep(model, z, size, schedule, progress, text_BLE, later_BLE, guidance, u_prefix, window, context)
        x, shallow = sample_shallow(model, u[:, prefix:], size, schedule, progress)
        latents = from_tokens(x, *size)
        if prefix_BFChw is not None:
            latents = torch.cat((wide(prefix_BFChw), latents), 1)
    return latents, {"deep": deep, "shallow": shallow}


def sample_shallow(model: StarFlow, u_BFSC: Tensor, size: tuple[int, int], schedule: Schedule, progress: Progress) -> tuple[Tensor, Report]:
    """The shallow blocks from last to first; every frame is a sequence of its own."""
    batch, frames = u_BFSC.shape[:2]
    report = Report()
    x = u_BFSC.flatten(0, 1).unsqueeze(1)
    for block in reversed(model.blocks[:-1]):
        x, passes = invert(block, model, x, size, schedule, lambda places: progress(places * frames))
        report.add(passes)
    return x.unflatten(0, (batch, frames)).squeeze(2), report


def default_context(window: int) -> int:
    """Frames read again beyond the window: 16 of 21 in the reference, the same share elsewhere; 1 … window − 1."""
    return max(1, min(window - 1, round(window * 16 / 21)))
