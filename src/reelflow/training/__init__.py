"""Training: the flow, the small video VAE, and the cache of latents that the flow is trained on."""
