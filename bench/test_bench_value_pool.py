"""value_pool as a value update runs it: forward and backward, features detached or trained.

python -m pytest bench/test_bench_value_pool.py                    a check at a tiny size
python -m pytest bench/test_bench_value_pool.py -m claim -s        ratios over torch.compile of the reference
"""

from __future__ import annotations

import statistics
from functools import cache

import pytest
import torch

from bench import shapes
from bench.interleaved import Provider, race, speed_ups
from bench.shapes import PoolCase
from lacfast import ops, reference

COMPILED, EAGER, OURS = "torch.compile of the reference", "reference, eager", "lacfast"
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2**-7}

LARGE = [PoolCase("SD3.5-M 512 px", 8, 1024, 1536), PoolCase("SD3.5-M 1024 px", 8, 4096, 1536)]
# Where the features are few, the Python around the kernels decides.
SMALL = [PoolCase("tiny DiT of the demo", 8, 16, 96), PoolCase("tiny DiT of the demo", 256, 16, 96)]


@cache
def _providers(case: PoolCase, dtype: torch.dtype, *, trained: bool, compiled: bool) -> dict[str, Provider]:
    """Output and gradients, compared with the reference before anybody times them."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(case.batch, case.tokens, case.features, generator=generator).to(dtype)
    query = torch.randn(case.batch, case.heads, case.features, generator=generator) / case.features**0.5
    norm_weight = 1 + 0.1 * torch.randn(case.features, generator=generator)
    grad = torch.randn(query.shape, generator=generator)
    leaves = [features, query, norm_weight] if trained else [query, norm_weight]
    for leaf in leaves:
        leaf.requires_grad_()

    def update(function) -> Provider:
        def run():
            out = function(features, query, norm_weight)
            return out, *torch.autograd.grad(out, leaves, grad)

        return run

    providers = {EAGER: update(reference.value_pool), OURS: update(ops.value_pool)}
    if compiled:
        providers = {COMPILED: update(torch.compile(reference.value_pool, fullgraph=True)), **providers}
    expected = providers[EAGER]()
    for name, provider in providers.items():
        for actual, wanted in zip(provider(), expected, strict=True):
            error = (actual.float() - wanted.float()).abs().max() / wanted.float().abs().max()
            assert error < TOLERANCE[actual.dtype], f"{name} is {error:.1e} away from the reference"
    return providers


@pytest.mark.parametrize("provider", [EAGER, OURS])
@pytest.mark.parametrize("trained", [False, True], ids=["detached", "trained"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.benchmark(group="value_pool, forward and backward")
def test_value_pool_update(benchmark, dtype, trained, provider, is_smoke):
    case = shapes.TINY_POOL if is_smoke else shapes.CLAIM_POOL
    call = _providers(case, dtype, trained=trained, compiled=False)[provider]
    if is_smoke:
        benchmark.pedantic(call, rounds=1, iterations=1)
    else:
        benchmark(call)


def _report(title: str, providers: dict[str, Provider], capsys: pytest.CaptureFixture[str]) -> float:
    seconds = race(providers, rounds=9, warmup=2)
    ratios = speed_ups(seconds, COMPILED)
    with capsys.disabled():
        print(f"\n{title}, {torch.get_num_threads()} thread, interleaved medians")
        for name, times in seconds.items():
            print(
                f"  {name:<32} {statistics.median(times) * 1e3:9.3f} ms  {ratios[name]:6.2f}x of {COMPILED}"
            )
    return ratios[OURS]


@pytest.mark.claim
@pytest.mark.parametrize("trained", [False, True], ids=["detached", "trained"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("case", [*LARGE, *SMALL], ids=str)
def test_value_pool_update_is_twice_as_fast_as_compiled(case, dtype, trained, capsys):
    title = (
        f"value_pool, forward and backward, {case}, {dtype}, {'trained' if trained else 'detached'} features"
    )
    ratio = _report(title, _providers(case, dtype, trained=trained, compiled=True), capsys)
    _providers.cache_clear()
    assert ratio >= (2 if case in LARGE else 1)
