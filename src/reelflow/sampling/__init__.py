"""The inverse: noise to latents, by schedules that all agree with the sequential one."""

from reelflow.sampling.certify import Certificate, certify
from reelflow.sampling.deep import Settings, Texts, default_context
from reelflow.sampling.inverse import sample, stream
from reelflow.sampling.schedules import Report, Schedule

__all__ = ["Certificate", "Report", "Schedule", "Settings", "Texts", "certify", "default_context", "sample", "stream"]
