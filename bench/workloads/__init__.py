"""Every op as a workload: (case, dtype, device, compiled=...) -> Workload."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import torch

from bench.shapes import AdvantageCase, Case, LatentCase, ParticleCase, PoolCase
from bench.workloads import advantages, critics, latents
from bench.workloads.workload import Workload

STORAGE = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Entry:
    """An op in the table of benches."""

    build: Callable[..., Workload]
    kind: type[Case]
    """Which cases it takes."""
    dtypes: tuple[torch.dtype, ...] = STORAGE


WORKLOADS = {
    "normal_noise": Entry(latents.normal_noise, LatentCase, (torch.float32,)),
    "gaussian_step": Entry(latents.gaussian_step, LatentCase),
    "gaussian_step, guided": Entry(partial(latents.gaussian_step, guided=True), LatentCase),
    "gaussian_step_": Entry(latents.gaussian_step_in_place, LatentCase),
    "step_log_prob": Entry(latents.step_log_prob, LatentCase),
    "ppo_loss": Entry(latents.ppo_loss, LatentCase),
    "value_pool": Entry(critics.value_pool, PoolCase),
    "gae": Entry(critics.gae, AdvantageCase, (torch.float32,)),
    "normalized_advantages": Entry(advantages.normalized_advantages, AdvantageCase, (torch.float32,)),
    "effective_sample_size": Entry(advantages.effective_sample_size, ParticleCase, (torch.float32,)),
    "systematic_resample": Entry(advantages.systematic_resample, ParticleCase, (torch.float32,)),
}


@lru_cache(maxsize=1)
def verified(op: str, case: Case, dtype: torch.dtype, *, compiled: bool) -> Workload:
    """A workload on the CPU whose providers agree; the last is kept, as every provider is a test."""
    if compiled:
        # Code for earlier shapes counts towards torch's limit of recompilations.
        torch.compiler.reset()
    workload = WORKLOADS[op].build(case, dtype, torch.device("cpu"), compiled=compiled)
    workload.verify()
    return workload
