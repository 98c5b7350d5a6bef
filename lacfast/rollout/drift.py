"""A gauge of drift for any model: how far the typical latent of its images is from the first evaluation's.

A policy drifts where no reward looks: a tint, a grid at the period of the model's patches, a pattern in the
ground. What a reward asks for differs from prompt to prompt; such drift is the same in all images, so it
shows in what is typical of them. Latents tell it of every family, and no image is decoded for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lacfast.records import Evaluation

PHASES = 2
"""Places per side of a patch: the transformers' patches are 2 x 2, and so are the checkerboards of
convolutions with a stride."""


def typical_latents(latents: Tensor) -> Tensor:
    """What a clean latent has nearly everywhere, (B, K): the median over the picture per channel and phase.

    The phase of a place is where it lies in its 2 x 2 patch. A median passes over what fills less than half
    of the picture.

    Args:
        latents: (B, C, H, W), K = 4 C; (B, C, F, H, W) of videos, over the frames too; packed ones (B, L, D),
            whose tokens hold a patch each, K = D.
    """
    if latents.ndim == 3:
        return _median(latents.mT)
    phases = [
        _median(latents[..., row::PHASES, column::PHASES].flatten(2))
        for row in range(PHASES)
        for column in range(PHASES)
    ]
    return torch.stack(phases, dim=2).flatten(1)


def _median(values: Tensor) -> Tensor:
    """The lower median over the last dimension. torch.median has no deterministic form on CUDA."""
    return values.sort(dim=-1).values[..., (values.shape[-1] - 1) // 2]


@dataclass
class LatentDrift:
    """The typical latents of a run's first evaluation, and the distance of later ones from them."""

    first: Tensor | None = None
    """(K,) mean over the images. None before the first evaluation."""

    def update(self, evaluation: Evaluation) -> float:
        """Drift of an evaluation; the first one of a run is what the others are compared with.

            drift = sqrt( mean_K (typical - first)^2 )

        In units of the latents, whose standard deviation is about 1. It means something as long as
        evaluations have the same prompts, noise and sampler.
        """
        typical = evaluation.typical_latents.mean(dim=0)
        if self.first is None:
            self.first = typical
        return float((typical - self.first).square().mean().sqrt())

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs."""
        return {"first": self.first}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self.first = state["first"]
