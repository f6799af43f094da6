"""Training of Stable Video Diffusion: its networks with gradients, its data, its objective, its small VAE."""
