"""The advantage pipeline and particles: small tensors, so what counts is how often they are passed over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench import peers, roofline
from bench.roofline import Cost
from bench.shapes import AdvantageCase, ParticleCase
from bench.workloads.workload import COMPILED_PEER, OURS, PEER, PEERS, REFERENCES, Call, Workload, variants
from lacfast import ops, reference
from lacfast.records import NoiseKey

GAMMA, GAE_LAMBDA = 0.99, 0.95
BOUNDS = (10.0, 5.0)
"""Bound of advantages and of targets (arXiv 2605.27736)."""
NAMES = ("rewards", "values", "reward_mean", "reward_std", "weights")


def normalized_advantages(
    case: AdvantageCase, dtype: torch.dtype, device: torch.device, *, compiled: bool
) -> Workload:
    """Advantages, beside what eager trainers write: a loop over time, then torch.std twice."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((case.batch, case.rewards), case.shape, *[(case.rewards,)] * 3)
    tensors = [torch.rand(shape, generator=generator) + 0.5 for shape in shapes]

    def ours(function: Callable[..., Any]) -> Call:
        def call(given: dict[str, Tensor]) -> tuple[Tensor, ...]:
            inputs = (given[name] for name in NAMES)
            result = function(*inputs, gamma=GAMMA, gae_lambda=GAE_LAMBDA)
            return result.advantages, result.raw, result.targets

        return call

    def theirs(function: Callable[..., tuple[Tensor, ...]]) -> Call:
        return lambda given: function(*(given[name] for name in NAMES), GAMMA, GAE_LAMBDA, BOUNDS)

    providers = (
        variants(PEERS, peers.normalized_advantages, theirs, compiled)
        | variants(REFERENCES, reference.normalized_advantages, ours, compiled)
        | {OURS: ours(ops.normalized_advantages)}
    )
    return Workload(
        op="normalized_advantages",
        case=case,
        dtype=dtype,
        inputs={name: tensor.to(device, dtype) for name, tensor in zip(NAMES, tensors, strict=True)},
        providers=providers,
        costs=dict.fromkeys(providers, roofline.normalized_advantages(case, dtype)),
        baseline=COMPILED_PEER if compiled else PEER,
        # A quotient by a deviation of thousands of entries.
        tolerance=5e-5,
        peer_tolerance=5e-5,
    )


def effective_sample_size(
    case: ParticleCase, dtype: torch.dtype, device: torch.device, *, compiled: bool
) -> Workload:
    """Effective sample size, beside normalising the weights first."""

    def usual(log_weights: Tensor) -> Tensor:
        return 1 / log_weights.softmax(dim=1).square().sum(dim=1)

    def use(function: Callable[[Tensor], Tensor]) -> Call:
        return lambda given: (function(given["log_weights"]),)

    providers = (
        variants(PEERS, usual, use, compiled)
        | variants(REFERENCES, reference.effective_sample_size, use, compiled)
        | {OURS: use(ops.effective_sample_size)}
    )
    return _particles("effective_sample_size", case, dtype, device, providers, compiled, 4, 30)


def systematic_resample(
    case: ParticleCase, dtype: torch.dtype, device: torch.device, *, compiled: bool
) -> Workload:
    """Resampling, beside the reference alone: another generator would choose other ancestors."""

    def use(function: Callable[..., Tensor]) -> Call:
        return lambda given: (
            function(given["log_weights"], given["steps"], NoiseKey(given["seed"], given["group_ids"])),
        )

    providers = variants(REFERENCES, reference.systematic_resample, use, False) | {
        OURS: use(ops.systematic_resample)
    }
    return _particles("systematic_resample", case, dtype, device, providers, False, 12, 60)


def _particles(
    op: str,
    case: ParticleCase,
    dtype: torch.dtype,
    device: torch.device,
    providers: dict[str, Call],
    compiled: bool,
    bytes_each: int,
    operations_each: int,
) -> Workload:
    log_weights = 3 * torch.randn(case.groups, case.particles, generator=torch.Generator().manual_seed(0))
    count = case.groups * case.particles
    baseline = COMPILED_PEER if compiled else next(iter(providers))
    return Workload(
        op=op,
        case=case,
        dtype=dtype,
        inputs={
            "log_weights": log_weights.to(device, dtype),
            "steps": torch.zeros(case.groups, dtype=torch.int64, device=device),
            "seed": torch.ones(1, dtype=torch.int64, device=device),
            "group_ids": torch.arange(case.groups, device=device),
        },
        providers=providers,
        costs=dict.fromkeys(providers, Cost(count * bytes_each, count * operations_each)),
        baseline=baseline,
        tolerance=2e-5,
        peer_tolerance=2e-5,
    )
