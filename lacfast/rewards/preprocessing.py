"""A model's own image preprocessing on batches of tensors: resize, crop or pad, normalise, on the device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lacfast.transfer import to_device

_FILTERS = {2: "bilinear", 3: "bicubic"}
"""Pillow's number of a resampling filter -> torch's name; both antialias with the same kernels."""


CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Mean and deviation of OpenAI's CLIP, by which HPSv2 and BLIP normalise too."""


@dataclass(frozen=True, kw_only=True)
class ImagePreprocessing:
    """Resize to `size`, cut or pad to a square, then (x - mean) / std."""

    size: int
    """Side of the square that the model takes, in pixels."""
    mean: tuple[float, ...]
    """Mean per channel of images in [0, 1]."""
    std: tuple[float, ...]
    """Deviation per channel of images in [0, 1]."""
    fit: str = "crop"
    """"crop": the shortest edge becomes `size`, the centre is cut out, as CLIP does; "pad": the longest edge
    becomes `size`, black is added on both sides, as HPSv2 does; "stretch": both edges become `size`, as
    BLIP's processors do."""
    interpolation: str = "bicubic"
    """"bicubic" or "bilinear", antialiased."""
    round_resized: bool = True
    """Round to 8 bits after resizing, as processors that resize with Pillow do."""

    def __post_init__(self) -> None:
        if self.fit not in ("crop", "pad", "stretch"):
            raise ValueError(f"unknown fit {self.fit!r}; known: 'crop', 'pad', 'stretch'")
        if self.interpolation not in _FILTERS.values():
            raise ValueError(f"unknown interpolation {self.interpolation!r}; known: 'bicubic', 'bilinear'")

    @staticmethod
    def from_pretrained(path: str | Path) -> ImagePreprocessing:
        """What the image processor of a directory or hub id does.

        Raises:
            ValueError: when it does something that this class does not.
        """
        from transformers import AutoImageProcessor

        load: Any = AutoImageProcessor.from_pretrained
        return ImagePreprocessing.from_processor(load(path))

    @staticmethod
    def from_processor(processor: Any) -> ImagePreprocessing:
        """What a transformers image processor for CLIP or BLIP does.

        Raises:
            ValueError: when it does something that this class does not.
        """
        # Sizes are dictionaries or objects with None for what is absent, by transformers' version.
        size: dict[str, int] = {key: edge for key, edge in dict(processor.size).items() if edge is not None}
        crop = getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", False) else None
        cropped = (
            {} if crop is None else {key: value for key, value in dict(crop).items() if value is not None}
        )
        edge = size.get("shortest_edge", size.get("height", 0))
        square = set(cropped.values()) in (set(), {edge})
        if "shortest_edge" in size and cropped:
            fit = "crop"
        elif set(size) == {"height", "width"} and size["height"] == size["width"]:
            fit = "stretch"
        else:
            square, fit = False, ""
        steps = [processor.do_resize, processor.do_rescale, processor.do_normalize]
        # The filter is an enumeration or its number.
        resample = int(processor.resample)
        if not square or not all(steps) or resample not in _FILTERS:
            raise ValueError(
                f"the image processor resizes to {size}, crops to {cropped}, with filter {resample}, "
                f"resize/rescale/normalise {steps}; known: bicubic or bilinear to one square, normalised"
            )
        return ImagePreprocessing(
            size=edge,
            mean=tuple(processor.image_mean),
            std=tuple(processor.image_std),
            fit=fit,
            interpolation=_FILTERS[resample],
        )

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, size, size) float32 of images (B, 3, H, W) float in [0, 1]; on their device, no gradient."""
        # Processors are given images of 8 bits: what those lose is lost here too.
        levels = self._fitted((images.detach().float() * 255).round_().clamp_(0, 255)) / 255
        mean = to_device(torch.tensor(self.mean), images.device)[:, None, None]
        std = to_device(torch.tensor(self.std), images.device)[:, None, None]
        return (levels - mean) / std

    def _fitted(self, levels: Tensor) -> Tensor:
        height, width = levels.shape[-2:]
        if self.fit == "stretch":
            return self._resized(levels, self.size, self.size)
        edge = min(height, width) if self.fit == "crop" else max(height, width)
        # transformers truncates the other edge, open_clip rounds it.
        if self.fit == "crop":
            new_height, new_width = self.size * height // edge, self.size * width // edge
            resized = self._resized(levels, new_height, new_width)
            top, left = (new_height - self.size) // 2, (new_width - self.size) // 2
            return resized[..., top : top + self.size, left : left + self.size]
        new_height, new_width = round(height * self.size / edge), round(width * self.size / edge)
        resized = self._resized(levels, new_height, new_width)
        rows, columns = self.size - new_height, self.size - new_width
        return F.pad(resized, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))

    def _resized(self, levels: Tensor, height: int, width: int) -> Tensor:
        if not self.round_resized:
            return self._interpolated(levels, height, width)
        # Pillow filters rows, then columns, with 8 bits in between; bicubic overshoots at edges.
        rows = self._interpolated(levels, levels.shape[-2], width).round_().clamp_(0, 255)
        return self._interpolated(rows, height, width).round_().clamp_(0, 255)

    def _interpolated(self, levels: Tensor, height: int, width: int) -> Tensor:
        return F.interpolate(
            levels, (height, width), mode=self.interpolation, antialias=True, align_corners=False
        )
