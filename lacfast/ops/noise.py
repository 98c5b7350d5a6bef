"""normal_noise: standard normals from a counter, the same on every backend and in every batch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lacfast import reference
from lacfast.ops.checks import check_operand
from lacfast.ops.op import Op, Sized
from lacfast.records import NoiseKey


def normal_noise(shape: tuple[int, ...], steps: Tensor, key: NoiseKey) -> Tensor:
    """Standard normals that depend on (seed, sample id, step, element) only, never on the batch layout.

        words = philox(counter = (element / 4, step, sample id low, sample id high), key = seed)
        u_i = (words_i >> 8) 2^-24 + 2^-25;   pairs (u_0, u_1), (u_2, u_3) by Box-Muller

    Philox4x32-10 (Salmon et al., SC 2011). The words are bit-identical on all backends, the normals on one;
    between backends they agree to 1e-4.

    Args:
        shape: (B, ...) of the result.
        steps: (B,) int64 step of each sample; INITIAL_STEP for the latent that starts a trajectory.
        key: seed (1,) and sample ids (B,), int64 on the device of `steps`.

    Returns:
        (B, ...) float32 on the device of `steps`.

    Raises:
        ValueError: a shape, dtype, device or memory order that does not fit.
    """
    if len(shape) < 2 or 0 in shape:
        raise ValueError(f"shape is {tuple(shape)}; it must be (B, ...) with at least one element")
    check_operand("steps", steps, "shape", steps, shape[:1], (torch.int64,))
    check_operand("key.seed", key.seed, "steps", steps, (1,), (torch.int64,))
    check_operand("key.sample_ids", key.sample_ids, "steps", steps, shape[:1], (torch.int64,))
    chosen = NORMAL_NOISE.chosen(steps)
    if chosen == "reference":
        # A latent whose size is no multiple of 4 is a view there.
        return reference.normal_noise(shape, steps, key).contiguous()
    return NORMAL_NOISE(chosen, NormalNoise(steps, key.seed, key.sample_ids, list(shape))).noise


class NormalNoise(NamedTuple):
    steps: Tensor
    seed: Tensor
    sample_ids: Tensor
    shape: list[int]


class NormalNoiseOutputs(NamedTuple):
    noise: Sized


def _allocate(inputs: NormalNoise) -> NormalNoiseOutputs:
    return NormalNoiseOutputs(inputs.steps.new_empty(inputs.shape, dtype=torch.float32))


NORMAL_NOISE = Op("normal_noise", NormalNoise, NormalNoiseOutputs, _allocate, triton=("philox",))
