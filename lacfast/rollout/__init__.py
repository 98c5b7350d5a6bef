"""Trajectories: the denoising step on static buffers, the loop around it, decoding and scoring."""
