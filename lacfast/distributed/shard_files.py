"""Sharded tensors on disk, by torch's distributed checkpoints: each rank writes its parts, and any number of
ranks reads its own, also as whole tensors.

In a state of plain values a sharded tensor leaves a note of where it is.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lacfast.distributed.sharding import divided_like, is_sharded
from lacfast.distributed.world import World

NOTE = "sharded tensor"
"""The only key of a note, whose value is the tensor's name."""


def without_shards(state: Any) -> tuple[Any, dict[str, Tensor]]:
    """A nested state with notes in place of sharded tensors, and these by the names in the notes."""
    found: dict[str, Tensor] = {}

    def plain(value: Any, name: str) -> Any:
        if isinstance(value, Tensor) and is_sharded(value):
            found[name] = value
            return {NOTE: name}
        if isinstance(value, Mapping):
            return {key: plain(entry, f"{name}.{key}") for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return type(value)([plain(entry, f"{name}.{place}") for place, entry in enumerate(value)])
        return value

    return plain(state, ""), found


def write_shards(tensors: Mapping[str, Tensor], directory: Path, world: World) -> None:
    """Write sharded tensors into a new directory that all ranks see; all of them call it."""
    from torch.distributed.checkpoint.state_dict_saver import save

    with world.waiting("the shards of the checkpoint"):
        save(dict(tensors), checkpoint_id=directory)


@dataclass(frozen=True)
class SavedShard:
    """A tensor of `write_shards`, before it is known how it is to be divided here."""

    directory: Path
    name: str
    shape: torch.Size
    dtype: torch.dtype


def with_shards(state: Any, directory: Path) -> Any:
    """The state that `without_shards` made plain, with what `write_shards` wrote; nothing is read yet."""
    if not directory.is_dir():
        return state
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    saved: dict[str, Any] = FileSystemReader(directory).read_metadata().state_dict_metadata

    def whole(value: Any) -> Any:
        if isinstance(value, dict):
            if value.keys() == {NOTE}:
                name, known = value[NOTE], saved[value[NOTE]]
                return SavedShard(directory, name, known.size, known.properties.dtype)
            return {key: whole(entry) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return type(value)([whole(entry) for entry in value])
        return value

    return whole(state)


def divided_as(saved: Mapping[str, Tensor | SavedShard], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Saved tensors of the same shapes as others, divided over the ranks as these are, or whole.

    No collective: every rank reads what it has.
    """
    found, wanted = {}, {}
    directory = None
    for name, value in saved.items():
        if isinstance(value, SavedShard):
            directory = value.directory
            wanted[value.name] = found[name] = torch.empty_like(like[name], dtype=value.dtype)
        else:
            found[name] = divided_like(value, like[name])
    if directory is not None:
        from torch.distributed.checkpoint.state_dict_loader import load

        with warnings.catch_warnings():
            # Of a process without a group: it reads alone, as asked.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load(wanted, checkpoint_id=directory, no_dist=True)
    return found
