"""What the published models may cost at most; a test compares it with what `bench.costs` counts.

Lower a number when a count falls. Raising one needs a reason in the commit.
"""

from __future__ import annotations

ADDED_KERNELS = 6
"""Operations but views that a denoising step adds to its model's own: the model's input, the timestep, its
scale in FLUX, the output as float32, guidance with transition and stores, the step's index."""

KERNELS_PER_FEATURE = 1
"""The same with a critic, per tensor that it reads of the model: the store."""

MICROBATCH_OPERATIONS = {"sd15": 7_946, "sdxl": 28_982, "sd35_medium": 22_264, "flux_dev": 18_975}
"""Operations of a microbatch of the policy's update: gathering, forwards, loss, backward."""

SYNCS = {"step": 0, "microbatch": 0}
"""Waits of the host for the device."""

VALUE_SHARE_OF_HEADS = 0.01
"""FLOPs of the values of all steps over those of sampling, with heads on taps."""

VALUE_SHARE_BEYOND_BRANCH = 0.02
"""The same with a branch of k of L blocks, beyond k / L."""

FLOW_GRPO_RATIO = 0.8
"""FLOPs of an image of SD3.5-M's iteration over flow_grpo's loop, the critic aside."""
