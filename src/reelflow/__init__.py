"""reelflow: video by normalizing flows and latent diffusion."""

__version__ = "0.1.0"
