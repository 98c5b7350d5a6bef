"""The memory of a rollout: allocated once, on the device or the host, and written by its parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lacfast.distributed import ALONE, World
from lacfast.records import Conditioning, NoiseKey, Rollout
from lacfast.runtime.host_memory import HOST_SHARE, free_host_bytes
from lacfast.transfer import to_device

STACKED = ("latents", "model_outputs", "log_probs", "values")
"""Tensors of a rollout with trajectories in their second dimension, besides the features."""


def trajectory_bytes(rollout: Rollout) -> int:
    """Bytes of one of its trajectories."""
    held = [*_stacked(rollout).values(), *_conditioned(rollout).values()]
    return sum(tensor.nbytes for tensor in held) // rollout.batch_size


@dataclass
class HostRoom:
    """Room on the host for rollouts that are kept there, asked for when the size of one is known."""

    trajectories: int
    """How many will lie there together."""
    remedy: str
    """What to lower, for the error."""
    is_granted: bool = False

    def require(self, num_bytes: int) -> None:
        """Ask for `num_bytes` per trajectory, once.

        Raises:
            ValueError: when the host has less than that free.
        """
        free, needed = free_host_bytes(), self.trajectories * num_bytes
        if self.is_granted or free is None:
            return
        if needed > HOST_SHARE * free:
            raise ValueError(
                f"{self.trajectories:,} trajectories of {num_bytes / 2**20:,.1f} MiB are to be kept on the "
                f"host, {needed / 2**30:,.1f} GiB, and it has {free / 2**30:,.1f} GiB free; {self.remedy}"
            )
        self.is_granted = True


@dataclass(frozen=True)
class Written:
    """A part of a rollout in its memory."""

    rollout: Rollout
    """The part's rows."""
    clean_latents: Tensor
    """(B, ...) on the device that sampled them."""

    @property
    def prompts(self) -> list[str]:
        return self.rollout.prompts

    @property
    def metadata(self) -> list[dict[str, Any]]:
        return self.rollout.metadata

    def origin_of_nan(self) -> str:
        """What made NaN or infinity of images that have some: a denoising step, or the decoder."""
        return self.rollout.origin_of_nan()


class RolloutMemory:
    """Takes in the parts of a rollout one by one; none of them is kept besides."""

    def __init__(self, total: int, room: HostRoom | None = None, world: World = ALONE) -> None:
        """
        Args:
            total: trajectories of the rollout.
            room: on the host, where the rollout is to lie. None: it lies where its parts do.
            world: the ranks that have it together; this one takes in its share.
        """
        share = world.share(total)
        self.count = share.count
        self.share = share if world.size > 1 else None
        self.room = room
        self._whole: Rollout | None = None
        self._filled = 0

    def add(self, part: Rollout) -> Written:
        """Take in the next trajectories, which are without rewards; returns them as they lie here."""
        if self.room is not None:
            self.room.require(trajectory_bytes(part))
        device = part.latents.device if self.room is None else torch.device("cpu")
        is_moved = device != part.latents.device
        first, self._filled = self._filled, self._filled + part.batch_size
        if part.batch_size == self.count and not is_moved:
            self._whole = part
            return Written(part, part.clean_latents)
        if self._whole is None:
            self._whole = _allocated(part, self.count, device)
        whole, rows = self._whole, slice(first, self._filled)
        for name, tensor in _stacked(part).items():
            _stacked(whole)[name][:, rows].copy_(tensor)
        for name, tensor in _conditioned(part).items():
            _conditioned(whole)[name][rows].copy_(tensor)
        whole.noise.sample_ids[rows].copy_(part.noise.sample_ids)
        whole.prompts.extend(part.prompts)
        whole.metadata.extend(part.metadata)
        if first and part.policy_version != whole.policy_version:
            self._whole = replace(whole, policy_version=None)
        written = rows_of(whole, rows)
        # A clone, for a view would keep the part.
        return Written(written, part.clean_latents.clone() if is_moved else written.clean_latents)

    def rollout(self) -> Rollout:
        """All that was taken in, this rank's share."""
        assert self._whole is not None, "a rollout has a part"
        assert self._filled == self.count, "parts make up the rollout"
        return replace(self._whole, share=self.share)

    @staticmethod
    def of(
        parts: Iterable[Rollout], total: int, room: HostRoom | None = None, world: World = ALONE
    ) -> Rollout:
        """One rollout of the trajectories of all parts, which share table and seed; see `RolloutMemory`."""
        memory = RolloutMemory(total, room, world)
        for _ in map(memory.add, parts):
            pass
        return memory.rollout()


def _stacked(rollout: Rollout) -> dict[str, Tensor]:
    """(T, B, ...) tensors of a rollout."""
    return {name: getattr(rollout, name) for name in STACKED} | {
        f"features.{name}": tensor for name, tensor in rollout.features.items()
    }


def _conditioned(rollout: Rollout) -> dict[str, Tensor]:
    """(B, ...) tensors of a rollout that its model reads."""
    uncond = {} if rollout.uncond_conditioning is None else rollout.uncond_conditioning.tensors
    return {f"conditioning.{name}": tensor for name, tensor in rollout.conditioning.tensors.items()} | {
        f"uncond_conditioning.{name}": tensor for name, tensor in uncond.items()
    }


def _mapped(
    rollout: Rollout, stacked: Callable[[Tensor], Tensor], conditioned: Callable[[Tensor], Tensor]
) -> Rollout:
    """The rollout with other tensors of trajectories, and others for those (B, ...) that its model reads."""

    def each(conditioning: Conditioning) -> Conditioning:
        return Conditioning({name: conditioned(tensor) for name, tensor in conditioning.tensors.items()})

    uncond = rollout.uncond_conditioning
    tensors: dict[str, Any] = {name: stacked(getattr(rollout, name)) for name in STACKED}
    return replace(
        rollout,
        **tensors,
        features={name: stacked(tensor) for name, tensor in rollout.features.items()},
        conditioning=each(rollout.conditioning),
        uncond_conditioning=None if uncond is None else each(uncond),
    )


def _allocated(part: Rollout, count: int, device: torch.device) -> Rollout:
    """Memory for `count` trajectories like those of a part, with none of them in it."""
    return replace(
        _mapped(
            part,
            lambda tensor: tensor.new_empty((len(tensor), count, *tensor.shape[2:]), device=device),
            lambda tensor: tensor.new_empty((count, *tensor.shape[1:]), device=device),
        ),
        noise=NoiseKey(part.noise.seed.to(device), part.noise.sample_ids.new_empty(count, device=device)),
        prompts=[],
        metadata=[],
    )


def rows_of(rollout: Rollout, rows: slice) -> Rollout:
    """The trajectories `rows`, in the rollout's memory."""
    return replace(
        _mapped(rollout, lambda tensor: tensor[:, rows], lambda tensor: tensor[rows]),
        noise=NoiseKey(rollout.noise.seed, rollout.noise.sample_ids[rows]),
        prompts=rollout.prompts[rows],
        metadata=rollout.metadata[rows],
        rewards={name: scores[rows] for name, scores in rollout.rewards.items()},
    )


def on_device(rollout: Rollout, device: torch.device) -> Rollout:
    """The rollout on another device, but for its table and its rewards."""

    def there(tensor: Tensor) -> Tensor:
        return to_device(tensor, device)

    noise = NoiseKey(there(rollout.noise.seed), there(rollout.noise.sample_ids))
    return replace(_mapped(rollout, there, there), noise=noise)
