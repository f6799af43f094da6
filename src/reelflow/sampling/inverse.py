"""Noise → latents: the deep block over the video, then the shallow blocks, for all frames at once or as they come.

Shapes: B clips, F latent frames, S places of a frame, C latent channels, h × w places, L text tokens, E text channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Unpack

import torch
from torch import Tensor

from reelflow.flow import StarFlow, from_tokens, order
from reelflow.flow.affine import wide
from reelflow.sampling.conditioner import Conditioner
from reelflow.sampling.deep import Settings, Texts, deep_frames
from reelflow.sampling.schedules import Progress, Report, Schedule, Solver, silent


@torch.no_grad()
def sample(
    model: StarFlow, noise_BFChw: Tensor, texts: Tensor | Texts | None = None, guidance: float = 0.0, prefix_BFChw: Tensor | None = None,
    **settings: Unpack[Settings],
) -> tuple[Tensor, dict[str, Report]]:  # fmt: skip
    """Latents from noise: the inverse of `StarFlow.forward`.

    Args:
        noise_BFChw: standard normal noise for all frames, those of the prefix included (its values there are not used).
        texts: text states (B, L, E), or (first latent frame, states) for each part of the video, the first from frame 0.
            With guidance the conditional ones first, then as many unconditional ones, (2B, L, E).
        guidance: weight w ≥ 0 of the deep block's guidance; 0 runs the conditional branch only.
        prefix_BFChw: latents of given first frames, noise σ already added; returned unchanged.
        settings: see `Settings`.

    Returns:
        Latents (B, F, C, h, w) and a report per block kind, "deep" and "shallow".

    Raises:
        ValueError: guidance that is negative or not finite, a context or prefix outside its range, text missing; values that
            are not finite, with block and frame.
    """
    size, reports = (noise_BFChw.shape[-2], noise_BFChw.shape[-1]), dict[str, Report]()
    u = torch.stack(list(deep_frames(model, noise_BFChw, texts, guidance, prefix_BFChw, reports, False, **settings)), 1)
    x, reports["shallow"] = shallow(model, u, size, settings.get("schedule", Schedule()), settings.get("progress", silent))
    latents = from_tokens(x, *size)
    return latents if prefix_BFChw is None else torch.cat((wide(prefix_BFChw), latents), 1), reports


@torch.no_grad()
def stream(
    model: StarFlow, noise_BFChw: Tensor, texts: Tensor | Texts | None = None, guidance: float = 0.0, prefix_BFChw: Tensor | None = None,
    reports: dict[str, Report] | None = None, **settings: Unpack[Settings],
) -> Iterator[Tensor]:  # fmt: skip
    """The latents of `sample` frame by frame, (B, C, h, w) each, as they are finished; given ones first.

    `reports` is filled as they come. Stopping early leaves nothing behind.
    """
    size, reports = (noise_BFChw.shape[-2], noise_BFChw.shape[-1]), {} if reports is None else reports
    if prefix_BFChw is not None:
        yield from wide(prefix_BFChw).unbind(1)
    for u_BSC in deep_frames(model, noise_BFChw, texts, guidance, prefix_BFChw, reports, True, **settings):
        x, found = shallow(model, u_BSC[:, None], size, settings.get("schedule", Schedule()), settings.get("progress", silent))
        reports["shallow"] = reports.get("shallow", Report()) + found
        yield from_tokens(x, *size)[:, 0]


def shallow(model: StarFlow, u_BFSC: Tensor, size: tuple[int, int], schedule: Schedule, progress: Progress) -> tuple[Tensor, Report]:
    """The shallow blocks from last to first, (B, F, S, C); every frame is a sequence of its own."""
    clips, _, stride, _ = u_BFSC.shape
    x, report = u_BFSC.flatten(0, 1), Report()
    for index, block in reversed([*enumerate(model.blocks[:-1])]):
        solver = Solver(f"shallow block {index}", block, order(x[:, None], block)[:, 0], stride, schedule, progress)
        conditioner = Conditioner(model, block, len(x), size, stride + solver.window)
        solver.solve(conditioner, 0, stride, stride)
        x, report = order(solver.tokens(0, stride)[:, None], block)[:, 0], report + solver.report
    return x.unflatten(0, (clips, -1)), report
