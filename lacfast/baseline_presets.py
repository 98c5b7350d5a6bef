"""The baselines as their authors ran them: published settings of Flow-GRPO, DanceGRPO and DDPO."""

from __future__ import annotations

from lacfast.config import AdvantageConfig, LoRAConfig, PPOConfig, SamplerConfig, TrainConfig
from lacfast.run_config import RunConfig


def flow_grpo_geneval() -> RunConfig:
    """Flow-GRPO (arXiv 2505.05470) on GenEval's prompts: `geneval_sd3` of its config/grpo.py.

    There 32 GPUs share the 48 groups of 24 images. Its moving average decays by 0.9 every eight optimizer
    steps, which is every four iterations.
    """
    return RunConfig(
        out="runs/flow-grpo-geneval",
        model="stabilityai/stable-diffusion-3.5-medium",
        prompts="dataset/geneval/train_metadata.jsonl",
        held_out="dataset/geneval/test_metadata.jsonl",
        rewards=(("flow_grpo+http://127.0.0.1:18085", 1.0),),
        dtype="bfloat16",
        lora=LoRAConfig(rank=32, alpha=64),
        resolution=(512, 512),
        keep_text_encoders=False,
        train=TrainConfig(
            batch_size=48 * 24,
            samples_per_prompt=24,
            rollout_batch_size=24,
            sampler=SamplerConfig(kind="flow_sde", num_steps=10, noise_level=0.7, guidance_scale=4.5),
            advantages=AdvantageConfig(estimator="grpo", group_std="global", combination="scalarized"),
            ppo=PPOConfig(
                clip_range=1e-4,
                kl_weight=0.04,
                kl="flow_grpo",
                advantage_clip=5.0,
                num_minibatches=2,
                policy_learning_rate=3e-4,
                betas=(0.9, 0.999),
                adam_eps=1e-8,
            ),
            ema_decay=0.9**0.25,
            eval_every=60,
            eval_samples=512,
            eval_batch_size=16,
            eval_sampler=SamplerConfig(kind="ode", num_steps=40, noise_level=0.0, guidance_scale=4.5),
        ),
    )


def dance_grpo_hpsv2() -> RunConfig:
    """DanceGRPO (arXiv 2505.07818) on FLUX with HPSv2.1: scripts/finetune/finetune_flux_grpo.sh.

    There 16 GPUs take a prompt each. Its trajectories of one prompt share their first noise; here they do
    not. `group_std` is that of the group, of the population.
    """
    return RunConfig(
        out="runs/dance-grpo-hpsv2",
        model="black-forest-labs/FLUX.1-dev",
        prompts="assets/prompts.txt",
        rewards=(("hpsv2", 1.0),),
        dtype="bfloat16",
        resolution=(720, 720),
        keep_text_encoders=False,
        train=TrainConfig(
            batch_size=16 * 12,
            samples_per_prompt=12,
            rollout_batch_size=12,
            iterations=300,
            sampler=SamplerConfig(kind="dance_sde", num_steps=16, noise_level=0.3),
            advantages=AdvantageConfig(estimator="grpo", group_std="group"),
            ppo=PPOConfig(
                clip_range=1e-4,
                advantage_clip=5.0,
                num_minibatches=3,
                timestep_fraction=0.6,
                policy_learning_rate=1e-5,
                betas=(0.9, 0.999),
                adam_eps=1e-8,
            ),
            gradient_checkpointing=True,
            eval_every=40,
            eval_samples=256,
            eval_batch_size=8,
            eval_sampler=SamplerConfig(kind="ode", num_steps=28, noise_level=0.0),
        ),
    )


def ddpo_compressibility() -> RunConfig:
    """DDPO (arXiv 2305.13301) on JPEG compressibility: config/base.py and config/dgx.py of ddpo-pytorch.

    There eight GPUs share the 256 images of an epoch, and all weights are trained.
    """
    return RunConfig(
        out="runs/ddpo-compressibility",
        model="stable-diffusion-v1-5/stable-diffusion-v1-5",
        prompts="animals",
        rewards=(("jpeg_compressibility", 1.0),),
        dtype="bfloat16",
        train=TrainConfig(
            batch_size=8 * 32,
            rollout_batch_size=16,
            iterations=100,
            # Every step is stochastic, the last one too.
            sampler=SamplerConfig(
                kind="ddim", num_steps=50, noise_level=1.0, guidance_scale=5.0, window=(0, 50)
            ),
            advantages=AdvantageConfig(estimator="ddpo", buffer_size=16, min_count=16),
            ppo=PPOConfig(
                clip_range=1e-4,
                advantage_clip=10.0,
                num_minibatches=4,
                policy_learning_rate=3e-5,
                betas=(0.9, 0.999),
                adam_eps=1e-8,
                cfg_grad="both",
            ),
            eval_every=10,
            eval_samples=64,
            eval_batch_size=16,
            eval_sampler=SamplerConfig(kind="ddim", num_steps=50, noise_level=0.0, guidance_scale=5.0),
        ),
    )


BASELINE_RUNS = {
    "flow-grpo-geneval": flow_grpo_geneval,
    "dance-grpo-hpsv2": dance_grpo_hpsv2,
    "ddpo-compressibility": ddpo_compressibility,
}
"""Baselines that `lacfast train` knows by name."""
