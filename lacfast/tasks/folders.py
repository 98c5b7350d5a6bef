"""A small module on disk: a folder with the arguments that rebuild it and its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

_CONFIG = "config.json"
_WEIGHTS = "model.safetensors"


def write_folder(module: nn.Module, config: dict[str, Any], directory: Path) -> None:
    """Writes `config`, the module's keyword arguments, and its weights."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / _CONFIG).write_text(json.dumps(config))
    weights = {name: tensor.contiguous() for name, tensor in module.state_dict().items()}
    save_file(weights, directory / _WEIGHTS)


def read_folder(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `write_folder` wrote: keyword arguments and weights.

    Raises:
        ValueError: the directory holds no such module.
    """
    for name in (_CONFIG, _WEIGHTS):
        if not (directory / name).is_file():
            raise ValueError(f"no {name} in {directory}; give a directory written by save_pretrained")
    return json.loads((directory / _CONFIG).read_text()), load_file(directory / _WEIGHTS)
