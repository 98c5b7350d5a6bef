"""What decoding takes in memory: images of a batch together, videos one after the other."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from lacfast.backbone import Backbone
from lacfast.rewards.frames import judged_frames

Followed = Callable[[Callable[[], Tensor]], tuple[int, Tensor]]
"""Runs what it is given: the bytes that it has at its peak, and what it returns."""


class DecodedBytes(NamedTuple):
    peak: int
    images: int
    kept: int
    """What an evaluation keeps: the images, or the frames of videos that rewards of images judge."""


class Decoding:
    """Follows a backbone's decoder."""

    def __init__(self, backbone: Backbone, followed: Followed) -> None:
        self.backbone = backbone
        self.followed = followed
        # A decoder of videos runs so often as there are latent frames.
        self._video = cache(self._followed_video)

    def of(self, latents: Tensor) -> DecodedBytes:
        """What clean latents (B, ...) take."""
        count = len(latents)
        if not self.backbone.judged_frames:
            peak, images = self.followed(lambda: self.backbone.decode(latents))
            return DecodedBytes(peak, images.nbytes, images.nbytes)
        peak, video, kept = self._video(latents.device)
        # Beside those that are done.
        return DecodedBytes(peak + (count * video if count > 1 else 0), count * video, count * kept)

    def _followed_video(self, device: torch.device) -> DecodedBytes:
        latents = torch.empty((1, *self.backbone.latent_shape), device=device)
        peak, video = self.followed(lambda: self.backbone.decode(latents))
        return DecodedBytes(peak, video.nbytes, judged_frames(video, self.backbone.judged_frames).nbytes)
