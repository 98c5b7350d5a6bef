"""The ops of the critic: pooling of features, and the recursion over rewards and values."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench import peers, roofline
from bench.shapes import AdvantageCase, PoolCase
from bench.workloads import libraries
from bench.workloads.workload import (
    COMPILED_PEER,
    OURS,
    PEER,
    PEERS,
    REFERENCES,
    Call,
    Workload,
    variants,
)
from lacfast import ops, reference

GAMMA, GAE_LAMBDA = 0.99, 0.95
LOOP, VECTORIZED = "Python loop", "product with powers"


def value_pool(case: PoolCase, dtype: torch.dtype, device: torch.device, *, compiled: bool) -> Workload:
    """A rollout's value: forward only, queries in float32 on features in the model's dtype."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(case.batch, case.tokens, case.features, generator=generator)
    query = torch.randn(case.batch, case.heads, case.features, generator=generator) / case.features**0.5
    norm_weight = 1 + 0.1 * torch.randn(case.features, generator=generator)
    names = ("features", "query", "norm_weight")

    def pooled(function: Callable[..., Tensor]) -> Call:
        return lambda given: (function(*(given[name] for name in names)),)

    providers = (
        variants(PEERS, peers.attention_pool, pooled, compiled)
        | variants(REFERENCES, reference.value_pool, pooled, compiled)
        | {OURS: pooled(ops.value_pool)}
    )
    borrowed = libraries.value_pool(device)
    providers |= borrowed.calls
    return Workload(
        op="value_pool",
        case=case,
        dtype=dtype,
        inputs={
            "features": features.to(device, dtype),
            "query": query.to(device),
            "norm_weight": norm_weight.to(device),
        },
        providers=providers,
        costs=dict.fromkeys(providers, roofline.value_pool(case, dtype)),
        baseline=COMPILED_PEER if compiled else PEER,
        # The maths is float32 for every dtype; a sum of L products of rounded softmax weights.
        tolerance=5e-5,
        # Its weights and products are rounded to the features' dtype.
        peer_tolerance=5e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps,
        borrowed=frozenset(borrowed.calls),
        absent=borrowed.absent,
    )


def gae(case: AdvantageCase, dtype: torch.dtype, device: torch.device, *, compiled: bool) -> Workload:
    """GAE, beside the loop over time that trainers write, its vectorised form, and both of torchrl's."""
    generator = torch.Generator().manual_seed(0)
    rewards, values = (torch.randn(case.shape, generator=generator).to(device, dtype) for _ in range(2))
    settings = {"gamma": GAMMA, "gae_lambda": GAE_LAMBDA, "value_lambda": GAE_LAMBDA}

    def ours(function: Callable[..., tuple[Tensor, Tensor]]) -> Call:
        return lambda given: function(given["rewards"], given["values"], **settings)

    def peer(function: Callable[..., tuple[Tensor, ...]]) -> Call:
        return lambda given: function(given["rewards"], given["values"], GAMMA, GAE_LAMBDA)

    borrowed = libraries.gae(GAMMA, GAE_LAMBDA)
    providers = {
        LOOP: peer(peers.gae_loop),
        VECTORIZED: peer(peers.gae_vectorized),
        **borrowed.calls,
        **variants(REFERENCES, reference.gae, ours, compiled),
        OURS: ours(ops.gae),
    }
    return Workload(
        op="gae",
        case=case,
        dtype=dtype,
        inputs={"rewards": rewards, "values": values}
        | (libraries.gae_inputs(values) if borrowed.calls else {}),
        providers=providers,
        costs=dict.fromkeys(providers, roofline.elementwise("gae", rewards.numel(), dtype)),
        baseline=LOOP,
        tolerance=2e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps,
        peer_tolerance=2e-5,
        borrowed=frozenset(borrowed.calls),
        absent=borrowed.absent,
    )
