"""The drop-ins on a pretended CUDA device, with the tensors that scripts give them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from host_waits import WaitLog
from tiny_pipelines import PROMPTS, tiny_pipeline
from torch import Tensor

from lacfast.compat.ddpo import ddim_step_with_logprob
from lacfast.compat.flow_grpo import sde_step_with_logprob
from lacfast.compat.trl import DDPOConfig, DDPOTrainer

SHAPE = (2, 4, 8, 8)


def on_device(seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["sde", "cps"])
def test_a_flow_grpo_step_and_its_log_prob(cuda: WaitLog, dtype: torch.dtype, kind: str) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(10, device="cuda")
    sample, velocity = on_device(0, dtype), on_device(1, dtype).requires_grad_()
    for timesteps in (scheduler.timesteps[3][None], scheduler.timesteps[[3, 4]]):
        moved = sde_step_with_logprob(scheduler, velocity.detach(), timesteps, sample, 0.7, sde_type=kind)[0]
        scored = sde_step_with_logprob(
            scheduler, velocity, timesteps, sample, 0.7, prev_sample=moved, sde_type=kind
        )
        scored[1].sum().backward()
        assert moved.is_cuda
        assert velocity.grad is not None
        assert velocity.grad.is_cuda


def test_a_ddim_step_and_its_log_prob(cuda: WaitLog) -> None:
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(10, device="cuda")
    sample, noise = on_device(0, torch.float32), on_device(1, torch.float32).requires_grad_()
    for timestep in (scheduler.timesteps[3], scheduler.timesteps[[3, 4]], int(scheduler.timesteps[3])):
        moved, _ = ddim_step_with_logprob(scheduler, noise.detach(), timestep, sample, eta=1.0)
        _, log_prob = ddim_step_with_logprob(scheduler, noise, timestep, sample, eta=1.0, prev_sample=moved)
        log_prob.sum().backward()
        assert noise.grad is not None
        assert noise.grad.is_cuda


@pytest.mark.filterwarnings("ignore:.*becomes DDIM")
def test_trl_s_trainer_trains_on_the_device_that_is_there(cuda: WaitLog, tmp_path: Path) -> None:
    config = DDPOConfig(
        mixed_precision="bf16",
        num_epochs=1,
        sample_num_steps=2,
        sample_batch_size=2,
        sample_num_batches_per_epoch=1,
        train_batch_size=2,
        logdir=str(tmp_path),
    )

    def redness(images: Tensor, prompts: object, metadata: object) -> tuple[Tensor, dict[str, int]]:
        return images[:, 0].mean(dim=(1, 2)), {}

    trainer = DDPOTrainer(config, redness, lambda: (PROMPTS[0], {}), tiny_pipeline("sd15"))
    trainer.train()
    assert all(parameter.is_cuda for parameter in trainer.engine.backbone.policy_parameters())
