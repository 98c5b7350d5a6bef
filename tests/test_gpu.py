"""What only a CUDA device can tell: the kernels as compiled for it, and the trainer on it.

The ops come from the benches' workloads, so a new op is tested here as soon as it is measured.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bench.shapes import AdvantageCase, Case, LatentCase, ParticleCase, PoolCase
from bench.workloads import WORKLOADS
from bench.workloads.workload import OURS, OURS_DRAWN, Inputs, Workload
from lacfast import ops, reference
from lacfast.records import NoiseKey
from lacfast.schedule import flow_sde, uniform_sigmas

pytestmark = pytest.mark.gpu

HALF_AND_FULL = [torch.float32, torch.bfloat16, torch.float16]
SHAPE = (5, 16, 33, 31)
TABLE = flow_sde(uniform_sigmas(8), 0.7, window=(0, 7))
STEPS = torch.tensor([0, 3, 6, 7, 1])
KEY = NoiseKey.create(11, range(100, 105))

CUDA = torch.device("cuda")
CASES: dict[type[Case], tuple[Case, ...]] = {
    LatentCase: (LatentCase("odd", 5, (3, 17, 31)), LatentCase("SD3.5-M 512 px", 3, (16, 64, 64))),
    PoolCase: (
        PoolCase("odd", 3, 37, 72, 3),
        PoolCase("SD3.5-M 512 px", 2, 1024, 1536),
        PoolCase("Wan 14B", 2, 259, 5120, 3),
    ),
    AdvantageCase: (AdvantageCase("odd", 33, 7, 3), AdvantageCase("long", 1024, 50, 1)),
    ParticleCase: (ParticleCase("odd", 5, 37), ParticleCase("many", 64, 1024)),
}
EVERY_OP = [
    pytest.param(op, case, dtype, id=f"{op}, {case}, {dtype}")
    for op, entry in WORKLOADS.items()
    for case in CASES[entry.kind]
    for dtype in dict.fromkeys([*entry.dtypes, *([torch.float16] if len(entry.dtypes) > 1 else [])])
]
every_op = pytest.mark.parametrize(("op", "case", "dtype"), EVERY_OP)
ROWS_ARE_INDEPENDENT = {"gaussian_step", "gaussian_step, guided", "step_log_prob", "value_pool", "gae"}
"""Ops of which each sample's result is its own; of the others the test below takes the parts that are."""


def workload_of(op: str, case: Case, dtype: torch.dtype) -> Workload:
    return WORKLOADS[op].build(case, dtype, CUDA, compiled=False)


def ours(workload: Workload) -> list[Callable[[Inputs], tuple[Tensor, ...]]]:
    return [call for name, call in workload.providers.items() if name in (OURS, OURS_DRAWN)]


@every_op
def test_every_provider_equals_float64(op: str, case: Case, dtype: torch.dtype) -> None:
    workload_of(op, case, dtype).verify()


@every_op
def test_results_do_not_depend_on_the_run_or_the_batch(op: str, case: Case, dtype: torch.dtype) -> None:
    workload = workload_of(op, case, dtype)
    for call in ours(workload):
        whole = call(workload.inputs)
        assert all(map(torch.equal, call(workload.inputs), whole))
        if op not in ROWS_ARE_INDEPENDENT:
            continue
        parts = [call(rows(workload, part)) for part in (slice(0, 1), slice(1, None))]
        for result, pair in zip(whole, zip(*parts, strict=True), strict=True):
            assert torch.equal(torch.cat(pair), result)


def rows(workload: Workload, part: slice) -> Inputs:
    """Some samples of a workload; tables and weights as they are."""
    inputs = workload.cloned()
    return {
        name: tensor[part].detach().contiguous().requires_grad_(tensor.requires_grad)
        if len(tensor) == workload.case.batch
        else tensor
        for name, tensor in inputs.items()
    }


@every_op
def test_replay_of_a_captured_graph_equals_eager(op: str, case: Case, dtype: torch.dtype) -> None:
    workload = workload_of(op, case, dtype)
    for call in ours(workload):
        inputs = workload.cloned()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call(inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call(inputs)
        # Everything that a replay reads is on the device, also the key of the noise.
        for name, tensor in inputs.items():
            if tensor.is_floating_point():
                tensor.detach().mul_(0.5)
            elif name == "seed":
                tensor.add_(1)
        eager = call(inputs)
        graph.replay()
        assert all(map(torch.equal, captured, eager))
        assert not torch.equal(captured[0], call(workload.inputs)[0])


@every_op
def test_ops_do_not_wait_for_the_device(op: str, case: Case, dtype: torch.dtype) -> None:
    workload = workload_of(op, case, dtype)
    for call in ours(workload):
        # The first call compiles.
        call(workload.inputs)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            call(workload.inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("noise", ["given", "drawn"])
@pytest.mark.parametrize("dtype", HALF_AND_FULL, ids=str)
def test_ratio_and_noise_do_not_depend_on_the_batch(dtype: torch.dtype, noise: str) -> None:
    new, old = latents(0, dtype).cuda(), latents(1, dtype).cuda()
    eps, steps, key = latents(2, dtype).cuda(), STEPS.cuda(), cuda_key()

    def terms(part: slice) -> Tensor:
        given = eps[part] if noise == "given" else key.select(torch.arange(5, device="cuda")[part])
        result = ops.log_ratio(new[part], old[part], TABLE.coefficients("cuda"), steps[part], noise=given)
        return torch.stack([result.log_ratio, result.kl_old])

    assert torch.equal(torch.cat([terms(slice(0, 1)), terms(slice(1, None))], dim=1), terms(slice(None)))
    last = ops.normal_noise((1, *SHAPE[1:]), steps[4:], key.select(torch.tensor([4], device="cuda")))
    assert torch.equal(last, ops.normal_noise(SHAPE, steps, key)[4:])


def latents(seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).to(dtype)


def cuda_key() -> NoiseKey:
    return NoiseKey(KEY.seed.cuda(), KEY.sample_ids.cuda())


def test_noise_is_the_cpu_s() -> None:
    ours = ops.normal_noise(SHAPE, STEPS.cuda(), cuda_key())
    torch.testing.assert_close(ours.cpu(), ops.normal_noise(SHAPE, STEPS, KEY), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", HALF_AND_FULL, ids=str)
def test_gaussian_step_equals_the_float64_reference(
    dtype: torch.dtype, assert_near: Callable[[Tensor, Tensor], None]
) -> None:
    sample, output, uncond, eps = (latents(seed, dtype) for seed in range(4))
    scale = torch.tensor([3.0])
    ours = ops.gaussian_step(
        sample.cuda(),
        output.cuda(),
        TABLE.coefficients("cuda"),
        STEPS.cuda(),
        noise=eps.cuda(),
        uncond_output=uncond.cuda(),
        guidance_scale=scale.cuda(),
    )
    exact = reference.gaussian_step(
        sample.double(),
        ours.model_output.cpu().double(),
        TABLE.coefficients().double(),
        STEPS,
        noise=eps.double(),
    )
    assert_near(ours.prev_sample.cpu(), exact.prev_sample)


@pytest.mark.parametrize("dtype", HALF_AND_FULL, ids=str)
def test_ppo_loss_and_its_gradient_equal_the_float64_reference(
    dtype: torch.dtype, assert_near: Callable[[Tensor, Tensor], None]
) -> None:
    old, ref, eps = (latents(seed, dtype) for seed in (1, 2, 3))
    new = (old.float() + 0.01 * latents(4, torch.float32)).to(dtype)
    advantages = torch.tensor([1.0, -1.0, 2.0, 1.0, -0.5])
    settings = {"clip_range": 1e-3, "kl_weight": 0.1}
    ours, exact = new.cuda().requires_grad_(), new.double().requires_grad_()
    loss, stats = ops.ppo_loss(
        ours,
        old.cuda(),
        advantages.cuda(),
        TABLE.coefficients("cuda"),
        STEPS.cuda(),
        noise=eps.cuda(),
        anchor_output=ref.cuda(),
        **settings,
    )
    exact_loss, exact_stats = reference.ppo_loss(
        exact,
        old.double(),
        advantages.double(),
        TABLE.coefficients().double(),
        STEPS,
        noise=eps.double(),
        anchor_output=ref.double(),
        **settings,
    )
    torch.testing.assert_close(loss.cpu().double(), exact_loss, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(stats.log_ratio.cpu().double(), exact_stats.log_ratio, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(stats.clipped.cpu().double(), exact_stats.clipped)
    # Of a mean over so many elements the gradient itself would be lost in 16 bits.
    (1e4 * loss).backward()
    (1e4 * exact_loss).backward()
    assert_near(ours.grad.cpu(), exact.grad)


@pytest.mark.parametrize("dtype", HALF_AND_FULL, ids=str)
def test_the_ratio_is_exactly_one_before_the_first_update(dtype: torch.dtype) -> None:
    output = latents(0, dtype).cuda()
    terms = ops.log_ratio(output, output.clone(), TABLE.coefficients("cuda"), STEPS.cuda(), noise=cuda_key())
    assert torch.equal(terms.log_ratio, torch.zeros_like(terms.log_ratio))


@pytest.mark.parametrize("shape", [(1, 1, 1), (33, 10, 3), (4096, 50, 1)])
def test_gae_equals_the_reference(shape: tuple[int, int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    rewards, values = (torch.randn(shape, generator=generator) for _ in range(2))
    ours = ops.gae(rewards.cuda(), values.cuda(), gamma=0.99, gae_lambda=0.9)
    exact = reference.gae(rewards.double(), values.double(), gamma=0.99, gae_lambda=0.9)
    for one, other in zip(ours, exact, strict=True):
        torch.testing.assert_close(one.cpu().double(), other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [*HALF_AND_FULL, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1, 1), (33, 40, 3), (5, 3, 16), (4096, 50, 2)])
def test_normalized_advantages_equal_the_float64_reference(
    shape: tuple[int, int, int], dtype: torch.dtype, assert_near: Callable[[Tensor, Tensor], None]
) -> None:
    generator = torch.Generator().manual_seed(0)
    maths = torch.float64 if dtype == torch.float64 else torch.float32
    batch, _, heads = shape
    rewards, mean, std, weights = (
        torch.rand(size, generator=generator, dtype=maths) + 0.5
        for size in ((batch, heads), (heads,), (heads,), (heads,))
    )
    inputs = (rewards, torch.randn(shape, generator=generator).to(dtype), mean, std, weights)
    mask = torch.rand(batch, generator=generator) > 0.1
    settings = {"gamma": 0.97, "gae_lambda": 0.9, "value_lambda": 0.8}
    on_device = [tensor.cuda() for tensor in inputs]
    ours = ops.normalized_advantages(*on_device, mask=mask.cuda(), **settings)
    exact = reference.normalized_advantages(*(each.double() for each in inputs), mask=mask, **settings)
    for name in ("advantages", "raw", "targets"):
        assert_near(getattr(ours, name).cpu(), getattr(exact, name))
    again = ops.normalized_advantages(*on_device, mask=mask.cuda(), **settings)
    assert torch.equal(again.advantages, ours.advantages)


def test_advantages_and_particles_replay_in_a_graph_without_a_look_at_the_host() -> None:
    rewards, values = torch.rand(64, 2).cuda(), torch.randn(64, 10, 2).cuda()
    statistics = [torch.rand(2).cuda() + 0.5 for _ in range(3)]
    log_weights, steps = torch.randn(4, 100).cuda(), torch.arange(4).cuda()
    key = NoiseKey.create(5, range(4), "cuda")

    def run() -> tuple[Tensor, Tensor, Tensor]:
        advantages = ops.normalized_advantages(rewards, values, *statistics).advantages
        ancestors = ops.systematic_resample(log_weights, steps, key)
        return advantages, ancestors, ops.effective_sample_size(log_weights)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = run()
    rewards.copy_(torch.rand(64, 2))
    log_weights.copy_(torch.randn(4, 100))
    graph.replay()
    for one, other in zip(recorded, run(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (3, 4096), (2000, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ancestors_are_the_cpu_s_bit_for_bit(shape: tuple[int, int], dtype: torch.dtype) -> None:
    log_weights = (5 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype)
    log_weights[0, ::2] = -torch.inf
    steps, key = torch.arange(shape[0]), NoiseKey.create(3, range(shape[0]))
    on_device = NoiseKey.create(3, range(shape[0]), "cuda")
    ancestors = ops.systematic_resample(log_weights.cuda(), steps.cuda(), on_device)
    assert torch.equal(ancestors.cpu(), ops.systematic_resample(log_weights, steps, key))
    sizes = ops.effective_sample_size(log_weights.cuda()).cpu()
    torch.testing.assert_close(sizes, ops.effective_sample_size(log_weights), rtol=1e-6, atol=0)


def test_two_iterations_train_on_the_device() -> None:
    # A lent GPU machine may lack diffusers; the kernels are tested there all the same.
    tiny = pytest.importorskip("tiny_backbones")
    trainer_type = pytest.importorskip("lacfast.trainer").LatentActorCriticTrainer
    backbone = tiny.tiny_backbone("dit", size=tiny.models.TINY)
    for module in (backbone.model, backbone.prompt_encoder, backbone.codec):
        module.cuda()
    trainer = trainer_type(backbone, tiny.brightness, tiny.PROMPTS, tiny.tiny_config())
    first = trainer.train_iteration()
    assert first["first_max_abs_log_ratio"] < 1e-5
    assert trainer.train_iteration()["iteration"] == 2
