"""What hooks and scripts ask of TRL's accelerator: one process, its log, and pictures in it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lacfast.metrics import MetricsLog


class HookLog:
    """What an image_samples_hook gets in place of accelerate's tracker: metrics, PNG files, the service."""

    def __init__(self, directory: Path, metrics: MetricsLog) -> None:
        self.directory = directory
        self.metrics = metrics
        self.iteration = 0
        """The services' step: theirs counts epochs, the files' is the caller's."""

    def log(self, values: Mapping[str, Any], step: int | None = None) -> None:
        """Write numbers to metrics.jsonl and the service, and pictures as `log_images` does.

        Raises:
            ValueError: for what is neither.
        """
        numbers: dict[str, Any] = {}
        for name, value in values.items():
            plain = value.item() if isinstance(value, Tensor | np.generic) and value.ndim == 0 else value
            if isinstance(plain, int | float | str):
                numbers[name] = plain
            else:
                self.log_images({name: value}, step)
        taken = sorted({"phase", "iteration", "step"} & set(numbers))
        if taken:
            raise ValueError(f"metrics.jsonl has {taken} of its own; log them by other names")
        if numbers:
            self.metrics.write("hook", self.iteration, step=step, **numbers)

    def log_images(
        self, values: Mapping[str, Any], step: int | None = None, *, dataformats: str | None = None
    ) -> None:
        """Write every image of `values` under the step.

        Args:
            values: name -> images: a tensor (B, 3, H, W), an array (B, H, W, 3) or (B, 3, H, W), in [0, 1] or
                of bytes, a PIL image, or a list of such without B.
            step: of the caller's.
            dataformats: "NHWC" or "NCHW" where the shape leaves it open.
        """
        target = self.directory / f"{step or 0:08d}"
        target.mkdir(parents=True, exist_ok=True)
        for position, (name, images) in enumerate(values.items()):
            label = re.sub(r"[^A-Za-z0-9.-]+", "_", name).strip("_")
            for row, picture in enumerate(_pictures(name, images, dataformats)):
                picture.save(target / f"{position:03d}-{row}-{label}.png")
                self.metrics.picture(self.iteration, name, picture)


class SingleProcess:
    """The parts of accelerate's Accelerator that mean something in one process that the engine drives."""

    num_processes = 1
    process_index = 0
    local_process_index = 0
    is_main_process = True
    is_local_main_process = True

    def __init__(self, device: torch.device, mixed_precision: str, log: HookLog) -> None:
        self.device = device
        self.mixed_precision = mixed_precision
        self.trackers = [log]

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"there is no accelerator, and so no accelerator.{name}: the engine trains in one process; "
            "trainer.engine is a LatentActorCriticTrainer"
        )

    def log(self, values: Mapping[str, Any], step: int | None = None) -> None:
        """Numbers and pictures, as a hook's log."""
        self.trackers[0].log(values, step)

    def gather(self, tensor: Any) -> Any:
        """The tensor: there is one process."""
        return tensor

    def unwrap_model(self, model: Any) -> Any:
        """The model: it is not wrapped."""
        return model

    def wait_for_everyone(self) -> None:
        """Nothing: there is one process."""

    def print(self, *words: Any) -> None:
        print(*words)


def _pictures(name: str, images: Any, dataformats: str | None) -> list[Image.Image]:
    if isinstance(images, Image.Image):
        return [images]
    if isinstance(images, Tensor):
        images = (
            images.detach().float().cpu().numpy() if images.dtype != torch.uint8 else images.cpu().numpy()
        )
    if isinstance(images, np.ndarray):
        batch = images if images.ndim == 4 else images[None]
        return [_picture(name, image, dataformats) for image in batch]
    if isinstance(images, Sequence) and not isinstance(images, str):
        return [picture for image in images for picture in _pictures(name, image, dataformats)]
    raise ValueError(
        f"{name!r} is a {type(images).__name__}, which cannot be logged; pass numbers, or images as tensors, "
        "arrays or PIL images"
    )


def _picture(name: str, image: np.ndarray[Any, Any], dataformats: str | None) -> Image.Image:
    channels = (1, 3)
    first = image.ndim == 3 and image.shape[0] in channels
    last = image.ndim == 3 and image.shape[-1] in channels
    if not first and not last:
        raise ValueError(
            f"{name!r} has an image of shape {image.shape}; pass one or three channels, first or last"
        )
    if last and (not first or (dataformats or "CHW").endswith("C")):
        image = image.transpose(2, 0, 1)
    if image.dtype != np.uint8:
        image = (np.clip(image, 0, 1) * 255).round().astype(np.uint8)
    return Image.fromarray(
        np.ascontiguousarray(np.broadcast_to(image, (3, *image.shape[1:])).transpose(1, 2, 0))
    )
