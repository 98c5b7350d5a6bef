"""Images as arrays of 8 bits and as JPEG or PNG files, for what is not a network on the same device."""

from __future__ import annotations

import io
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor


def to_uint8(images: Tensor) -> npt.NDArray[np.uint8]:
    """(B, H, W, 3) uint8 on the CPU of images (B, 3, H, W) float in [0, 1], rounded to nearest."""
    levels = (images.detach().float() * 255).round_().clamp_(0, 255).to(torch.uint8)
    pixels: npt.NDArray[np.uint8] = levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return pixels


def pictures(images: Tensor) -> list[Image.Image]:
    """Images (B, 3, H, W) float in [0, 1] as B RGB images of Pillow."""
    return [Image.fromarray(pixels) for pixels in to_uint8(images)]


def encode_picture(picture: Image.Image, *, image_format: str, **settings: Any) -> bytes:
    """A file, in the format that Pillow knows by that name, with its settings."""
    buffer = io.BytesIO()
    picture.save(buffer, format=image_format, **settings)
    return buffer.getvalue()


def encode_images(images: Tensor, *, image_format: str, **settings: Any) -> list[bytes]:
    """One file per image, encoded by as many threads as there are processors.

    Args:
        images: (B, 3, H, W) float in [0, 1].
        image_format: "JPEG" or "PNG", as Pillow names it.
        settings: Pillow's settings of the format, such as quality.
    """

    def encode(pixels: npt.NDArray[np.uint8]) -> bytes:
        return encode_picture(Image.fromarray(pixels), image_format=image_format, **settings)

    arrays = to_uint8(images)
    # The codecs release the interpreter's lock.
    with ThreadPoolExecutor(min(len(arrays), os.cpu_count() or 1) or 1) as pool:
        return list(pool.map(encode, arrays))
