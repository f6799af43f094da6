"""How a clip is sampled from Stable Video Diffusion, and the arithmetic of its steps.

Shapes: F frames, T steps. σ is the noise level, from 700 down to 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from diffusers.schedulers import AysSchedules
from torch import Tensor

FPS, MOTION, STEPS = (3, 30), (1, 255), (1, 1000)
REFERENCES = {"stability": 1e-5, "diffusers": None}
"""Epsilon of the group norms in the UNet's residual blocks: as the weights were trained, and as diffusers built each."""

SCHEDULES, REUSE = ("karras", "ays"), 10


@dataclass(frozen=True)
class Diffusion:
    """How a clip is sampled; common to all tasks.

    steps: of Euler's method, 1 … 1000.  fps: the rate the motion is meant for, 3 … 30; None: 7, or a given video's own.
    motion: how much of it, 1 … 255.  noise_aug: standard deviation of the noise on the picture (values −1 … 1), 0 … 1;
    more lets the clip move away from it.  guidance: weight of the picture in the last frame, None for the model's own; it
    rises evenly from first_guidance in the first one.  1 in both: no guidance, half the work.  playback: frames per second of
    the file, None: as fps.  reference: whose numbers, Stability's (as the weights were trained) or diffusers'.

    Three ways to less work that give another clip. schedule: "ays" takes the noise levels of Align Your Steps (Sabour et al. 2024),
    made for 10 steps.  guided: the least and the greatest noise level σ at which guidance applies (Kynkäänniemi et al. 2024);
    elsewhere a step is half the work. None: everywhere.  reuse: the inner levels of the UNet are computed in every n-th step only
    (DeepCache, Ma et al. 2024), 1 … 10.
    """

    steps: int = 25
    fps: int | None = None
    motion: int = 127
    noise_aug: float = 0.02
    guidance: float | None = None
    first_guidance: float = 1.0
    playback: float | None = None
    reference: Literal["stability", "diffusers"] = "stability"
    schedule: Literal["karras", "ays"] = "karras"
    guided: tuple[float, float] | None = None
    reuse: int = 1

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
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule {self.schedule!r} is not one of {', '.join(SCHEDULES)}")
        if self.guided is not None and not 0 <= self.guided[0] < self.guided[1]:
            raise ValueError("guided {:g}-{:g} is not usable; give a lower and a higher noise level, 0-700 is all".format(*self.guided))
        if not (isinstance(self.reuse, int) and 1 <= self.reuse <= REUSE):
            raise ValueError(f"reuse {self.reuse} is not usable; give a whole number from 1 (compute everything) to {REUSE}")


USUAL = Diffusion()


class Step(NamedTuple):
    """x ← keep · x + move · v, where v is the network's answer to scale · x at its time, in noise of level sigma."""

    scale: float
    keep: float
    move: float
    sigma: float


def euler(scheduler: Any, steps: int, schedule: str = "karras") -> tuple[Tensor, list[Step], float]:
    """The network's times (T,), the steps, and the standard deviation of the noise they begin with.

    Euler's method on dx/dσ = (x − D) / σ with D = x / (σ² + 1) − v σ / √(σ² + 1) is affine in x and v. "karras": the levels of the
    model's own scheduler. "ays": those of Align Your Steps, evenly in between on a scale of log σ for other than 10 steps.
    """
    own = type(scheduler).from_config(scheduler.config)
    own.set_timesteps(steps)
    sigmas, times, spread = own.sigmas.double(), own.timesteps.float(), float(own.init_noise_sigma)
    if schedule == "ays":
        found = np.log(AysSchedules["StableDiffusionVideoSigmas"][:-1])
        found = np.interp(np.linspace(0, 1, steps), np.linspace(0, 1, len(found)), found)
        sigmas, times = torch.from_numpy(np.append(np.exp(found), 0.0)), torch.from_numpy(found / 4).float()
        spread = float((sigmas[0] ** 2 + 1).sqrt())
    now, then = sigmas[:-1], sigmas[1:]
    root = torch.sqrt(now**2 + 1)
    table = torch.stack((1 / root, 1 + (then - now) * now / root**2, (then - now) / root, now), 1)
    return times, [Step(*row) for row in table.tolist()], spread


def guides(sampling: Diffusion, step: Step) -> bool:
    """Whether guidance applies in a step."""
    return sampling.guided is None or sampling.guided[0] <= step.sigma <= sampling.guided[1]


def ramp(sampling: Diffusion, default: float, frames: int) -> Tensor:
    """Guidance weights of the frames (F,)."""
    last = default if sampling.guidance is None else sampling.guidance
    return torch.linspace(sampling.first_guidance, last, frames)


__all__ = ["Diffusion", "Step", "euler", "guides", "ramp"]
