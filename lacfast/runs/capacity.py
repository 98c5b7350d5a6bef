"""Whether a run fits: the memory that its phases need, beside what is free."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lacfast.runtime.host_memory import HOST_SHARE, free_host_bytes

GIB = 2**30
GPU_BYTES = 80 * 10**9
"""Memory of the GPUs that the recipes of large models are for."""


@dataclass(frozen=True)
class Phase:
    """What lives at the peak of a phase; a lower bound, for fragments and kernels' own memory come on top."""

    name: str
    fixed: int
    """Bytes on the device whatever the batch is."""
    batch: int
    """Bytes of `count` at a time."""
    count: int
    setting: str
    """The option that `count` comes from."""
    host: int
    """Bytes of the host's memory, where the device is another one."""

    @property
    def device(self) -> int:
        """Bytes on the device."""
        return self.fixed + self.batch

    @property
    def least(self) -> int:
        """Bytes on the device with one at a time, down to which batches are halved when memory runs out."""
        return self.fixed + self.batch // self.count

    def fitting(self, free: int) -> int:
        """How many at a time fit into `free` bytes; 0: not one."""
        return max((free - self.fixed) * self.count // max(self.batch, 1), 0)


@dataclass(frozen=True)
class MemoryPlan:
    """The memory of a run."""

    weight_bytes: int
    """Model and critic, the anchor's copy of a model that is trained without LoRA, decoder and encoders."""
    training_bytes: int
    """Gradients, moments and the average of trained weights."""
    rollout_bytes: int
    """A training rollout: latents, outputs, prompts and what the critic reads, for all steps."""
    kept_bytes: int
    """A trajectory of value pretraining."""
    phases: tuple[Phase, ...]
    prompt_bytes: int = 0
    """What the text encoders make of a prompt, kept on the host."""

    @property
    def peak(self) -> Phase:
        """The phase that takes most of the device."""
        return max(self.phases, key=lambda phase: phase.device)

    @property
    def least(self) -> Phase:
        """The phase that takes most of the device with the smallest batches."""
        return max(self.phases, key=lambda phase: phase.least)

    @property
    def host(self) -> int:
        """Most bytes of the host's memory."""
        return max(phase.host for phase in self.phases)


def require_memory(memory: MemoryPlan, device: torch.device) -> list[str]:
    """Lines on batches that will be halved because they do not fit.

    Args:
        memory: of a run.
        device: with the memory that is free for it now.

    Raises:
        ValueError: when a phase does not fit with the smallest batches either, or not on the host.
    """
    host = free_host_bytes()
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host
    if free is None:
        return []
    if memory.least.least > free:
        raise ValueError(f"on {device} {_too_large(memory, free)}")
    if host is not None and memory.host > HOST_SHARE * host:
        raise ValueError(
            f"rollouts of value pretraining, those that the critic draws from, and evaluation keep "
            f"{memory.host / GIB:,.1f} GiB on the host, and {host / GIB:,.1f} GiB are free; lower "
            "--train.pretrain.kept-rollouts, --train.pretrain.held-out-samples, --train.ppo.critic-rollouts "
            "or --train.eval-samples"
        )
    return smaller_batches(memory, free)


def smaller_batches(memory: MemoryPlan, free: int) -> list[str]:
    """A line for each phase that does not fit into `free` bytes as it is, with the batch that does."""
    if memory.least.least > free:
        return [_too_large(memory, free)]
    return [
        f"{phase.name} takes {phase.device / GIB:,.1f} GiB with {phase.count} at a time, and "
        f"{free / GIB:,.1f} GiB are free; train.{phase.setting}={max(phase.fitting(free), 1)} fits"
        for phase in memory.phases
        if phase.device > free
    ]


def _too_large(memory: MemoryPlan, free: int) -> str:
    """What does not fit into `free` bytes with the smallest batches either, and what helps."""
    return (
        f"{memory.least.name} takes {memory.least.least / GIB:,.1f} GiB whatever its batches are, and "
        f"{free / GIB:,.1f} GiB are free: weights {memory.weight_bytes / GIB:,.1f}, gradients, moments and "
        f"average {memory.training_bytes / GIB:,.1f}, a rollout {memory.rollout_bytes / GIB:,.1f}; train a "
        "LoRA in place of all weights, or use --dtype bfloat16, --no-keep-text-encoders, a smaller "
        "--train.batch-size or --pipeline.resolution"
    )
