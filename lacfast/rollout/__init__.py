"""Trajectories: the denoising step on static buffers, the loop around it, and their scores."""
