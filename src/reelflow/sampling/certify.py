"""Is this the sample? One parallel pass over it has to give back the noise it was made from.

Shapes: B clips, F latent frames, C latent channels, h × w places.
"""

from __future__ import annotations

from typing import NamedTuple, Unpack

import torch
from torch import Tensor

from reelflow.flow import Affine, StarFlow, order, to_tokens
from reelflow.flow.affine import wide
from reelflow.sampling.deep import Settings, Texts, check, conditioner
from reelflow.sampling.schedules import Schedule, Solver, silent


class Certificate(NamedTuple):
    """How far the noise of a sample is from the noise it was asked for, in standard deviations: the largest, and the root mean
    square. As x = shift + scale · z, it is also each value's distance from its equation, in units of its scale.
    """

    largest: float
    rms: float


@torch.no_grad()
def certify(
    model: StarFlow, latents_BFChw: Tensor, noise_BFChw: Tensor, texts: Tensor | Texts | None = None, guidance: float = 0.0,
    given: int = 0, **settings: Unpack[Settings],
) -> Certificate:  # fmt: skip
    """The residual of latents that `sample` made with these arguments, of which the first `given` frames were its prefix.

    Whatever way they were sampled, they are read here as the forward map reads data: all tokens at once, no iteration.
    """
    block, size = model.deep_block, (noise_BFChw.shape[-2], noise_BFChw.shape[-1])
    stride = size[0] * size[1]
    plan = check(model, noise_BFChw, texts, guidance, latents_BFChw[:, :given] if given else None, settings)
    z = order(wide(to_tokens(noise_BFChw)), block).flatten(1, 2)
    u = order(model.to_deep(latents_BFChw)[0], block).flatten(1, 2)
    solver = Solver("deep block", block, z, stride, Schedule("sequential"), silent)
    solver.give(u)
    reader, ring, read = conditioner(model, noise_BFChw, guidance, solver.window, settings), settings.get("ring", False), 0
    errors = []
    for window in plan:
        reader.read_text(window.text)
        base, new = 0 if ring else window.start * stride, slice(window.first * stride, window.stop * stride)
        solver.read(reader, base, max(base, read), new.stop)
        errors.append(Affine(solver.shift[:, new], solver.scale[:, new]).forward(u[:, new])[0] - z[:, new])
        read = new.stop if ring else 0
    error = torch.cat(errors, 1)
    return Certificate(float(error.abs().max()), float(error.square().mean().sqrt()))
