"""Latent actor-critic post-training of diffusion models, fast."""
