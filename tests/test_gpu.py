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
