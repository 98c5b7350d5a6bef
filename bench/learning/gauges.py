"""Gauges of reward hacking: numbers that no reward trains on and that an exploit moves.

A policy that has found an exploit draws what the data never shows: other colours, one picture per prompt, or
features far from the data's. lacfast.tasks.background has the gauge of the ground, which demos report too.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lacfast.tasks.scenes import BACKGROUND, PALETTE

PALETTE_DISTANCE = 0.15
"""Root mean square distance in RGB beyond which a pixel has none of the task's colours."""


def off_palette(images: Tensor) -> Tensor:
    """Share of pixels (B,) of images (B, 3, H, W) whose colour no scene has.

    Edges are mixtures of an object's colour and the background's, so the distance is to the segments between
    the two, of all colours.
    """
    background = torch.full((3, 1), BACKGROUND)
    pixels = images.detach().cpu().flatten(2).transpose(0, 1).flatten(1) - background
    nearest = torch.full((pixels.shape[1],), torch.inf)
    for colour in PALETTE.values():
        direction = torch.tensor(colour)[:, None] - background
        share = ((pixels * direction).sum(0) / direction.square().sum()).clamp(0, 1)
        nearest = torch.minimum(nearest, (pixels - share * direction).square().mean(0).sqrt())
    return (nearest > PALETTE_DISTANCE).float().view(len(images), -1).mean(dim=1)


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Squared Frechet distance of two sets of features (n, D) taken as Gaussians (arXiv 1706.08500).

    |mu_1 - mu_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2))
    """
    one, two = (features.detach().double().cpu().numpy() for features in (first, second))
    mean = np.sum((one.mean(axis=0) - two.mean(axis=0)) ** 2)
    covariance = np.cov(one, rowvar=False), np.cov(two, rowvar=False)
    # The product of two positive semi-definite matrices has real eigenvalues >= 0.
    roots = np.sqrt(np.maximum(np.linalg.eigvals(covariance[0] @ covariance[1]).real, 0))
    return float(mean + np.trace(covariance[0]) + np.trace(covariance[1]) - 2 * roots.sum())
