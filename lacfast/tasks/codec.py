"""The codec of the embedded tasks: one linear map per 4x4-pixel patch, fitted once on ground truth by PCA."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lacfast.tasks import scenes
from lacfast.tasks.folders import read_folder, write_folder
from lacfast.tasks.task import Task

PATCH_SIZE = 4
CHANNELS = 16
FIT_SEED = 4
FIT_IMAGES_PER_PROMPT = 4
WHITENING = 0.5


class PatchCodec(nn.Module):
    """Images (B, 3, H, W) in [0, 1] to latents (B, C, H/p, W/p) of about unit variance, and back.

    latent = encoder (patch - mean);   patch = decoder latent + mean

    The encoder's rows are the first C principal components, each divided by its standard deviation to the
    power `whitening`, with one common scale. Differentiable both ways, but for the final clamp to [0, 1].
    """

    encoder: Tensor
    decoder: Tensor
    mean: Tensor

    def __init__(self, *, patch_size: int = PATCH_SIZE, channels: int = CHANNELS) -> None:
        super().__init__()
        features = 3 * patch_size**2
        self.patch_size = patch_size
        self.register_buffer("encoder", torch.zeros(channels, features))
        self.register_buffer("decoder", torch.zeros(features, channels))
        self.register_buffer("mean", torch.zeros(features))

    @classmethod
    def from_pretrained(cls, directory: Path) -> PatchCodec:
        """What `save_pretrained` wrote, in eval mode.

        Raises:
            ValueError: the directory holds no codec.
        """
        config, weights = read_folder(directory)
        codec = cls(**config)
        codec.load_state_dict(weights)
        return codec.eval()

    def save_pretrained(self, directory: Path) -> None:
        """Writes what `from_pretrained` reads."""
        write_folder(self, {"patch_size": self.patch_size, "channels": len(self.encoder)}, directory)

    def encode(self, images: Tensor) -> Tensor:
        """Latents (B, C, H/p, W/p) of images (B, 3, H, W) in [0, 1]."""
        patches = nn.functional.pixel_unshuffle(images, self.patch_size).movedim(1, -1)
        return ((patches - self.mean) @ self.encoder.T).movedim(-1, 1)

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] of latents (B, C, H/p, W/p)."""
        patches = latents.movedim(1, -1) @ self.decoder.T + self.mean
        return nn.functional.pixel_shuffle(patches.movedim(-1, 1), self.patch_size).clamp(0, 1)


def fit_codec(task: Task = scenes.TASK) -> PatchCodec:
    """The codec whose basis is fitted on a task's ground truth, in float64 and with fixed signs."""
    prompts = task.prompts() * FIT_IMAGES_PER_PROMPT
    images = torch.from_numpy(task.draw(prompts, np.random.default_rng(FIT_SEED))).double()
    patches = nn.functional.pixel_unshuffle(images, PATCH_SIZE).movedim(1, -1).flatten(0, 2)
    # The empty patch is latent zero: the commonest patch lies at the centre of the prior.
    mean = torch.full_like(patches[0], task.background)
    covariance = (patches - mean).T @ (patches - mean) / len(patches)
    variances, components = torch.linalg.eigh(covariance)
    variances, components = variances.flip(0)[:CHANNELS], components.flip(1)[:, :CHANNELS]
    signs = components.gather(0, components.abs().argmax(0, keepdim=True)).sign()
    std = variances.sqrt()
    scale = std**WHITENING
    # One common factor makes the variance over all channels one.
    scale = scale * ((std / scale) ** 2).mean().sqrt()
    codec = PatchCodec()
    codec.encoder.copy_((components * signs / scale).T)
    codec.decoder.copy_(components * signs * scale)
    codec.mean.copy_(mean)
    return codec
