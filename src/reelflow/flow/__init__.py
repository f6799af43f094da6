"""The model: an exactly invertible map between latents and noise (torch only)."""
