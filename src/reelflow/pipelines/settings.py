"""How a flow's clips are sampled; `svd.settings` has those of Stable Video Diffusion."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from reelflow.sampling import Schedule


@dataclass(frozen=True)
class Sampling:
    """How a clip is sampled; common to all tasks.

    guidance: weight w ≥ 0 of the prompt, None for the model's own default.  temperature: standard deviation 0 … 1 of the noise a
    clip is made from, None for the model's own; below 1 the likelier clips, less various.  denoise: take the data noise away at the end.
    context: latent frames read again beyond the trained length.  ring: keep what was read of them instead (an approximation,
    see `reelflow.sampling.conditioner.Ring`).  certify: check the sample in one parallel pass, into the metadata.
    """

    guidance: float | None = None
    schedule: Schedule = Schedule()
    denoise: bool = True
    context: int | None = None
    ring: bool = False
    certify: bool = False
    temperature: float | None = None

    def __post_init__(self) -> None:
        if self.guidance is not None and not 0 <= self.guidance < inf:
            raise ValueError(f"guidance {self.guidance} is not usable; give a number ≥ 0 (0 switches it off)")
        if self.temperature is not None and not 0 <= self.temperature <= 1:
            raise ValueError(f"temperature {self.temperature} is not usable; give a number from 0 to 1")


EXACTLY = Sampling(schedule=Schedule(tolerance=1e-6))
"""For decoding: so close that an encoding's latents come back to 1e-4."""


__all__ = ["EXACTLY", "Sampling"]
