"""Stable Video Diffusion: picture to video by latent diffusion, on diffusers' components.

`pipeline` reads top to bottom; `blocks`, `attention`, `unet` and `decoder` are the networks, rearranged for sampling.
"""

from reelflow.pipelines.svd.pipeline import SvdPipeline
from reelflow.pipelines.svd.settings import Diffusion

__all__ = ["Diffusion", "SvdPipeline"]
