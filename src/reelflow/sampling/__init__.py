"""The inverse: noise to latents, by schedules that all agree with the sequential one."""

from reelflow.sampling.inverse import default_context, sample
from reelflow.sampling.schedules import Report, Schedule

__all__ = ["Report", "Schedule", "default_context", "sample"]
