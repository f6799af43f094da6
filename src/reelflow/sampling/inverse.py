"""Noise → latents: the deep block over the video, then the shallow blocks, for a window of frames at once or as they come.

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
    shared, made, parts = (size, settings.get("schedule", Schedule()), settings.get("progress", silent)), dict[int, Shallow](), []
    for some in u.split(settings.get("window") or model.config.window, 1):  # what a long video holds does not grow with it
        frames = some.shape[0] * some.shape[1]
        made[frames] = made.get(frames) or Shallow(model, frames, *shared)
        parts.append(from_tokens(made[frames](some), *size))
    reports["shallow"] = sum((shallow.report for shallow in made.values()), Report())
    latents = torch.cat(parts, 1)
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
    shallow = Shallow(model, len(noise_BFChw), size, settings.get("schedule", Schedule()), settings.get("progress", silent))
    for u_BSC in deep_frames(model, noise_BFChw, texts, guidance, prefix_BFChw, reports, True, **settings):
        latents = from_tokens(shallow(u_BSC[:, None]), *size)[:, 0]
        reports["shallow"] = shallow.report
        yield latents


class Shallow:
    """The shallow blocks from last to first; every frame is a sequence of its own, and ranks share them out. For as many frames
    at a time as it is made for, again and again.
    """

    def __init__(self, model: StarFlow, frames: int, size: tuple[int, int], schedule: Schedule, progress: Progress):
        self.stride, self.ranks, self.frames = size[0] * size[1], model.ranks, frames
        nothing = model.deep_block.proj_in.weight.new_zeros(frames, self.stride, model.config.channels)[self.ranks.part(frames)]
        tell: Progress = lambda tokens: progress(round(tokens * frames / len(nothing)))  # noqa: E731 - the other ranks' too
        self.steps = []
        for index, block in reversed([*enumerate(model.blocks[:-1])] if len(nothing) else []):
            solver = Solver(f"shallow block {index}", block, nothing, self.stride, schedule, tell)
            self.steps.append((solver, Conditioner(model, block, len(nothing), size, self.stride + solver.window)))

    @property
    def report(self) -> Report:
        """Of all frames so far, on this rank."""
        return sum((solver.report for solver, _ in self.steps), Report())

    def __call__(self, u_BFSC: Tensor) -> Tensor:
        """Tokens of the latents, (B, F, S, C), from those of the deep block; B · F frames."""
        x = u_BFSC.flatten(0, 1)[self.ranks.part(self.frames), None]
        for solver, conditioner in self.steps:
            solver.begin(order(x, solver.block)[:, 0])
            solver.solve(conditioner, 0, self.stride, self.stride)
            x = order(solver.tokens(0, self.stride)[:, None], solver.block)
        return self.ranks.whole(x[:, 0], self.frames).unflatten(0, u_BFSC.shape[:2])
