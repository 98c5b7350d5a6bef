"""Where the numbers and pictures of a run go besides metrics.jsonl: TensorBoard, Weights & Biases."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from torch import Tensor


class Tracker(Protocol):
    """One service that plots runs."""

    def numbers(self, iteration: int, values: Mapping[str, float]) -> None:
        """Curves' next points, by name."""

    def picture(self, iteration: int, name: str, image: Image.Image) -> None:
        """A grid of samples."""

    def close(self) -> None:
        """Flush what is pending."""


class TensorBoardTracker:
    """Event files in a directory, for `tensorboard --logdir`."""

    def __init__(self, directory: Path) -> None:
        """
        Raises:
            ValueError: when TensorBoard is not installed.
        """
        _require("tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(directory))

    def numbers(self, iteration: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, iteration)
        self._writer.flush()

    def picture(self, iteration: int, name: str, image: Image.Image) -> None:
        self._writer.add_image(name, np.asarray(image.convert("RGB")), iteration, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class WandbTracker:
    """A run of Weights & Biases; offline when its own settings say so."""

    def __init__(self, project: str, directory: Path, config: Mapping[str, Any]) -> None:
        """`config` is shown beside the run.

        Raises:
            ValueError: when wandb is not installed.
        """
        self._wandb = _require("wandb")
        self._run: Any = self._wandb.init(project=project, dir=str(directory), config=dict(config))

    def numbers(self, iteration: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=iteration)

    def picture(self, iteration: int, name: str, image: Image.Image) -> None:
        self._run.log({name: self._wandb.Image(image)}, step=iteration)

    def close(self) -> None:
        self._run.finish()


def curve_points(phase: str, values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of one log line, "phase/name"; a vector over the steps: "phase/name/03"."""
    points: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Tensor) and value.ndim == 1:
            points |= {f"{phase}/{name}/{step:02d}": number for step, number in enumerate(value.tolist())}
        elif isinstance(value, bool | int | float) and name != "iteration":
            points[f"{phase}/{name}"] = float(value)
    return points


def _require(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(f"{package} is not installed: pip install 'lacfast[{package}]'") from error
