"""From noise to latents: Euler's steps with guidance.

Shapes: B clips, R rows (B, or 2B under guidance), F frames, 4 latent channels or as many as the model has, h × w places, E channels of
the picture's embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from reelflow.pipelines.base import Progress
from reelflow.pipelines.svd.blocks import care
from reelflow.pipelines.svd.settings import REFERENCES, Diffusion, euler, guides, ramp
from reelflow.pipelines.svd.unet import Conditions, Denoiser
from reelflow.sampling.replay import Replay


def denoise(
    network: Denoiser, scheduler: Any, noise_BF4hw: Tensor, picture_B4hw: Tensor, states_BE: Tensor, sampling: Diffusion, progress: Progress
) -> Tensor:
    """Latents (B, F, 4, h, w), float32. The device is never waited for, but for the progress two steps back.

    A step works on tensors that stay where they are, its own number among them, so that it can be recorded once and replayed
    (`sampling.replay`); not with `reuse`, where steps differ.

    sampling: with its fps and guidance.
    """
    assert sampling.fps is not None
    assert sampling.guidance is not None
    frames, device = noise_BF4hw.shape[1], noise_BF4hw.device
    weights_F = ramp(sampling, sampling.guidance, frames)
    guided = bool((weights_F != 1).any())
    weights_F111 = weights_F.to(device).view(-1, 1, 1, 1)
    times_T, steps, spread = euler(scheduler, sampling.steps, sampling.schedule)
    ids = [sampling.fps - 1.0, float(sampling.motion), sampling.noise_aug]
    conditions = network.conditions(picture_B4hw, states_BE, ids, times_T, frames, guided, REFERENCES[sampling.reference])
    x_BF4hw, inner, pending = noise_BF4hw * spread, None, _Pending(device)
    at_1, steps_T4 = torch.zeros(1, dtype=torch.long, device=device), torch.tensor(steps, dtype=x_BF4hw.dtype, device=device)
    replay = Replay(device)

    def advance(asked: Sequence[Conditions], weighted: bool) -> None:
        nonlocal inner
        scale, keep, move, _ = steps_T4.index_select(0, at_1)[0].unbind()
        v, made = velocity(network, x_BF4hw * scale, asked, at_1, inner)
        if weighted:
            without, given = v.chunk(2)
            v = torch.lerp(without, given, weights_F111)
        x_BF4hw.mul_(keep).addcmul_(v, move)
        at_1.add_(1)
        inner = None if sampling.reuse == 1 else made

    for index, step in enumerate(steps):
        here = guided and guides(sampling, step)
        asked = rows(conditions) if here or not guided else conditions.halves()[1:]
        inner = inner if index % sampling.reuse else None  # let go before it is made again
        run = partial(advance, asked, here)
        if network.recorded and sampling.reuse == 1:
            replay(here, run)
        else:
            run()
        progress("sampling", pending.finished(index + 1) / len(steps))
    return x_BF4hw


def rows(conditions: Conditions) -> tuple[Conditions, ...]:
    """All rows at once, or, where memory is short, those of guidance one after the other."""
    return conditions.halves() if care().again and conditions.guided else (conditions,)


def velocity(
    network: Denoiser, scaled_BF4hw: Tensor, asked: Sequence[Conditions], step_1: Tensor, inner: Tensor | None
) -> tuple[Tensor, Tensor]:
    """v (R, F, 4, h, w) float32 of all rows that are asked for; and the UNet's inner levels, for which those of an earlier step are
    taken where it had these rows.
    """
    needed = sum(len(each.picture) for each in asked) * scaled_BF4hw.shape[1]
    kept = inner[-needed:].chunk(len(asked)) if inner is not None and len(inner) >= needed else [None] * len(asked)
    found = [network(scaled_BF4hw, each, step_1, old) for each, old in zip(asked, kept, strict=True)]
    v, inner = (values[0] if len(values) == 1 else torch.cat(values) for values in zip(*found, strict=True))
    return v.float(), inner


class _Pending:
    """Steps that a GPU has finished: two are left to it at any time, so that it never waits and progress tells the truth."""

    def __init__(self, device: torch.device):
        self.events: list[torch.cuda.Event] | None = [] if device.type == "cuda" else None

    def finished(self, asked: int) -> int:
        if self.events is None:
            return asked
        event = torch.cuda.Event()
        event.record()
        self.events.append(event)
        if len(self.events) > 2:
            self.events.pop(0).synchronize()
        return asked - len(self.events)


__all__ = ["denoise", "rows", "velocity"]
