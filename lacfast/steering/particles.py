"""Trajectories in flight, and how they are named, chosen and multiplied."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lacfast import ops
from lacfast.records import INITIAL_STEP, NoiseKey

SLOT_STRIDE = 1 << 44
"""Between the sample ids of one image's trajectories. Of the first they are the image's own."""


@dataclass(frozen=True)
class Particles:
    """Trajectories of G images, those of one image consecutive."""

    sample: Tensor
    """(P, ...) latents."""
    noise: NoiseKey
    """Where each trajectory's noise comes from; its (P,) sample ids are the trajectories' names."""
    rows: Tensor
    """(P,) int64 image in the batch."""
    values: Tensor
    """(k, P) V at the states of the trajectory so far."""

    @staticmethod
    def start(latent_shape: tuple[int, ...], images: Tensor, per_image: int, seed: int) -> Particles:
        """Pure noise for `images` (G,), their sample ids."""
        ids = slot_ids(images, per_image)
        steps, noise = torch.full_like(ids, INITIAL_STEP), NoiseKey.create(seed, ids, ids.device)
        sample = ops.normal_noise((len(ids), *latent_shape), steps, noise)
        rows = torch.arange(len(images), device=ids.device).repeat_interleave(per_image)
        return Particles(sample, noise, rows, sample.new_empty((0, len(ids))))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def ids(self) -> Tensor:
        """(P,) int64 sample ids."""
        return self.noise.sample_ids

    def select(self, positions: Tensor) -> Particles:
        """The trajectories at `positions`, with their names."""
        return Particles(
            self.sample[positions],
            self.noise.select(positions),
            self.rows[positions],
            self.values[:, positions],
        )

    def at(self, sample: Tensor) -> Particles:
        """The same trajectories one step further."""
        return replace(self, sample=sample)

    def with_values(self, values: Tensor) -> Particles:
        """Remember V (P,) of today's states."""
        return replace(self, values=torch.cat([self.values, values[None]]))

    def renamed(self, ids: Tensor) -> Particles:
        """Trajectories that share a past need names, and so noise, of their own."""
        return replace(self, noise=NoiseKey(self.noise.seed, ids))


def slot_ids(images: Tensor, per_image: int) -> Tensor:
    """(G N,) sample ids of N trajectories of each image (G,), by its own."""
    slots = torch.arange(per_image, device=images.device)
    return (images[:, None] + slots * SLOT_STRIDE).flatten()


def best_positions(scores: Tensor, count: int) -> Tensor:
    """Positions (G count,) of the highest of scores (G, N), in their order within the image."""
    kept = scores.topk(count, dim=1).indices.sort(dim=1).values
    offsets = torch.arange(len(scores), device=scores.device)[:, None] * scores.shape[1]
    return (kept + offsets).flatten()


def gumbel_noise(noise: NoiseKey, step: int) -> Tensor:
    """Standard Gumbel noise (P,) float64 of a choice at a step, in counters that no latent uses.

    The highest of log w + Gumbel is a draw by the weights w; the k highest are k draws without replacement
    (Kool et al., arXiv 1903.06059).
    """
    steps = torch.full_like(noise.sample_ids, INITIAL_STEP - 1 - step)
    normals = ops.normal_noise((len(steps), 1), steps, noise)[:, 0]
    uniform = torch.special.ndtr(normals.double()).clamp(1e-12, 1 - 1e-12)
    gumbel: Tensor = -(-uniform.log()).log()
    return gumbel
