"""1. Noise: a counter in place of a generator's state."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lacfast.records import NoiseKey


def philox(counter: Tensor, key: Tensor) -> Tensor:
    """Four random words for every counter, by Philox4x32-10 (Salmon et al., SC 2011).

    Args:
        counter: (..., 4) int64 holding 32-bit words.
        key: (2,) int64 holding 32-bit words.

    Returns:
        (..., 4) int64 holding 32-bit words.
    """
    mask = 0xFFFFFFFF
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key.unbind(-1)
    for _ in range(10):
        high0, low0 = _multiply_32(c0, 0xD2511F53)
        high1, low1 = _multiply_32(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return torch.stack([c0, c1, c2, c3], dim=-1)


def _multiply_32(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low word of a 32 x 32 bit product, in int64 without overflow."""
    low_part = (x & 0xFFFF) * factor
    high_part = (x >> 16) * factor
    return (high_part + (low_part >> 16)) >> 16, (low_part + ((high_part & 0xFFFF) << 16)) & 0xFFFFFFFF


def normal_noise(shape: tuple[int, ...], steps: Tensor, key: NoiseKey) -> Tensor:
    """Standard normal noise as a function of (seed, sample id, step, element), whatever the batch.

        words = philox(counter = (element / 4, step, sample id low, sample id high), key = seed)
        u_i = (words_i >> 8) 2^-24 + 2^-25;   pairs (u_0, u_1), (u_2, u_3) by Box-Muller

    Args:
        shape: (B, ...), the result's.
        steps: (B,) int64; INITIAL_STEP for the latent that starts a trajectory.
        key: seed (1,) and sample ids (B,).

    Returns:
        (B, ...) float32.
    """
    batch, elements = shape[0], math.prod(shape[1:])
    quads = (elements + 3) // 4
    mask = 0xFFFFFFFF
    ids = key.sample_ids
    per_sample = torch.stack([steps & mask, ids & mask, (ids >> 32) & mask], dim=-1)
    quad = torch.arange(quads, device=ids.device).view(1, quads, 1).expand(batch, quads, 1)
    counter = torch.cat([quad, per_sample[:, None, :].expand(batch, quads, 3)], dim=-1)
    words = philox(counter, torch.cat([key.seed & mask, (key.seed >> 32) & mask]))
    uniform = (words >> 8).to(torch.float32) * 2**-24 + 2**-25
    radius = (-2 * uniform[..., 0::2].log()).sqrt()
    angle = 2 * math.pi * uniform[..., 1::2]
    normals = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)
    return normals.reshape(batch, quads * 4)[:, :elements].reshape(shape).contiguous()


def noise_for(sample: Tensor, steps: Tensor, noise: Tensor | NoiseKey) -> Tensor:
    """The noise (B, ...) of `sample` at `steps`, (B,) or (1,): as it is given, or drawn from its key."""
    if isinstance(noise, Tensor):
        return noise
    return normal_noise(tuple(sample.shape), steps.expand(sample.shape[0]), noise)
