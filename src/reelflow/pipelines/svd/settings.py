"""How a clip is sampled from Stable Video Diffusion, and the arithmetic of its steps.

Shapes: F frames, T steps. σ is the noise level, from 700 down to 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

FPS, MOTION, STEPS = (3, 30), (1, 255), (1, 1000)
REFERENCES = {"stability": 1e-5, "diffusers": None}
"""Epsilon of the group norms in the UNet's residual blocks: as the weights were trained, and as diffusers built each."""


@dataclass(frozen=True)
class Diffusion:
    """How a clip is sampled; common to all tasks.

    steps: of Euler's method, 1 … 1000.  fps: the rate the motion is meant for, 3 … 30; None: 7, or a given video's own.
    motion: how much of it, 1 … 255.  noise_aug: standard deviation of the noise on the picture (values −1 … 1), 0 … 1;
    more lets the clip move away from it.  guidance: weight of the picture in the last frame, None for the model's own; it
    rises evenly from first_guidance in the first one.  1 in both: no guidance, half the work.  playback: frames per second of
    the file, None: as fps.  reference: whose numbers, Stability's (as the weights were trained) or diffusers'.
    """

    steps: int = 25
    fps: int | None = None
    motion: int = 127
    noise_aug: float = 0.02
    guidance: float | None = None
    first_guidance: float = 1.0
    playback: float | None = None
    reference: Literal["stability", "diffusers"] = "stability"

    def __post_init__(self) -> None:
        for name, value, (least, most) in (("steps", self.steps, STEPS), ("fps", self.fps, FPS), ("motion", self.motion, MOTION)):
            if value is not None and not (isinstance(value, int) and least <= value <= most):
                raise ValueError(f"{name} {value} is not usable; give a whole number from {least} to {most}")
        if not 0 <= self.noise_aug <= 1:
            raise ValueError(f"noise_aug {self.noise_aug} is not usable; give a number from 0 to 1 (0.02 is usual)")
        for name, weight in (("guidance", self.guidance), ("first_guidance", self.first_guidance)):
            if weight is not None and not 0 <= weight < inf:
                raise ValueError(f"{name} {weight} is not usable; give a number ≥ 0 (1 switches it off)")
        if self.playback is not None and not 0.1 <= self.playback <= 240:
            raise ValueError(f"playback {self.playback} is not usable; give 0.1 … 240 frames per second")
        if self.reference not in REFERENCES:
            raise ValueError(f"reference {self.reference!r} is not one of {', '.join(REFERENCES)}")


USUAL = Diffusion()


class Step(NamedTuple):
    """x ← keep · x + move · v, where v is the network's answer to scale · x at its time."""

    scale: float
    keep: float
    move: float


def euler(scheduler: Any, steps: int) -> tuple[Tensor, list[Step], float]:
    """The network's times (T,), the steps, and the standard deviation of the noise they begin with.

    Euler's method on dx/dσ = (x − D) / σ with D = x / (σ² + 1) − v σ / √(σ² + 1) is affine in x and v.
    """
    own = type(scheduler).from_config(scheduler.config)
    own.set_timesteps(steps)
    now, then = own.sigmas[:-1].double(), own.sigmas[1:].double()
    root = torch.sqrt(now**2 + 1)
    table = torch.stack((1 / root, 1 + (then - now) * now / root**2, (then - now) / root), 1)
    return own.timesteps.float(), [Step(*row) for row in table.tolist()], float(own.init_noise_sigma)


def ramp(sampling: Diffusion, default: float, frames: int) -> Tensor:
    """Guidance weights of the frames (F,)."""
    last = default if sampling.guidance is None else sampling.guidance
    return torch.linspace(sampling.first_guidance, last, frames)


__all__ = ["Diffusion", "Step", "euler", "ramp"]
