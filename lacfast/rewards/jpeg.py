"""The size of an image as a JPEG file: the reward that needs no model, and no prompt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lacfast.rewards.image_files import encode_images

QUALITY = 95
"""JPEG quality of ddpo-pytorch's reward."""
_BYTES_PER_KILOBYTE = 1000


def jpeg_incompressibility(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    """Size of the image as a JPEG of quality 95, in kB of 1000 bytes (DDPO, arXiv 2305.13301).

    Args:
        images: (B, 3, H, W) float in [0, 1].
        prompts: not used.
        metadata: not used.

    Returns:
        (B,) float32 on the CPU, about 5 for a flat image of 512 x 512 and 300 for noise; no gradient.
    """
    files = encode_images(images, image_format="JPEG", quality=QUALITY)
    return torch.tensor([len(file) / _BYTES_PER_KILOBYTE for file in files], dtype=torch.float32)


def jpeg_compressibility(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    """Minus the size in kB of `jpeg_incompressibility`: ddpo-pytorch's unit (flow_grpo divides it by 500)."""
    return -jpeg_incompressibility(images, prompts, metadata)
