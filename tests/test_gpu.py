"""What only a CUDA device can tell: the kernels as compiled for it, and the trainer on it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lacfast import LatentActorCriticTrainer, ops, reference
from lacfast.records import NoiseKey
from lacfast.schedule import flow_sde, uniform_sigmas

pytestmark = pytest.mark.gpu

HALF_AND_FULL = [torch.float32, torch.bfloat16, torch.float16]
SHAPE = (5, 16, 33, 31)
TABLE = flow_sde(uniform_sigmas(8), 0.7, window=(0, 7))
STEPS = torch.tensor([0, 3, 6, 7, 1])
KEY = NoiseKey.create(11, range(100, 105))


def latents(seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).to(dtype)


def cuda_key() -> NoiseKey:
    return NoiseKey(KEY.seed.cuda(), KEY.sample_ids.cuda())


def test_noise_is_the_cpu_s() -> None:
    ours = ops.normal_noise(SHAPE, STEPS.cuda(), cuda_key())
    torch.testing.assert_close(ours.cpu(), ops.normal_noise(SHAPE, STEPS, KEY), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", HALF_AND_FULL)
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


@pytest.mark.parametrize("dtype", HALF_AND_FULL)
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
        reference_output=ref.cuda(),
        **settings,
    )
    exact_loss, exact_stats = reference.ppo_loss(
        exact,
        old.double(),
        advantages.double(),
        TABLE.coefficients().double(),
        STEPS,
        noise=eps.double(),
        reference_output=ref.double(),
        **settings,
    )
    torch.testing.assert_close(loss.cpu().double(), exact_loss, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(stats.log_ratio.cpu().double(), exact_stats.log_ratio, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(stats.clipped.cpu().double(), exact_stats.clipped)
    loss.backward()
    exact_loss.backward()
    assert_near(1e4 * ours.grad.cpu(), 1e4 * exact.grad)


@pytest.mark.parametrize("dtype", HALF_AND_FULL)
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
    backbone = tiny.tiny_backbone("dit")
    for module in (backbone.model, backbone.prompt_encoder, backbone.codec):
        module.cuda()
    trainer = LatentActorCriticTrainer(backbone, tiny.brightness, tiny.PROMPTS, tiny.tiny_config())
    first = trainer.train_iteration()
    assert first["first_max_abs_log_ratio"] < 1e-5
    assert trainer.train_iteration()["iteration"] == 2
