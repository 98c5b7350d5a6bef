"""Configurations that are known for a task; variants by lacfast.config.variant."""

from __future__ import annotations

from dataclasses import replace

from lacfast.config import (
    DDPO,
    GRPO,
    AdvantageConfig,
    CriticConfig,
    Fixed,
    KLPenalty,
    LoRAConfig,
    PipelineSettings,
    PPOConfig,
    Ratio,
    SamplerConfig,
    SteeringConfig,
    TrainConfig,
    ValuePretrainingConfig,
)
from lacfast.config.critic import WEIGHTLESS_TRUNKS
from lacfast.runs.config import RunConfig


def shapes(backbone: str, trunk: str | None = None) -> TrainConfig:
    """The demo's task on a CPU, for backbone "dit" or "unet"; `trunk` None: the critic's that fits it."""
    if backbone not in ("dit", "unet"):
        raise ValueError(f"unknown backbone {backbone!r}; known: dit, unet")
    # A forward of the UNet costs about twice the DiT's, so it gets fewer images for the same time.
    batch_size, pretraining_iterations = (192, 16) if backbone == "dit" else (128, 10)
    # At the DiT's rate the UNet forgets its pictures within 30 rollouts.
    policy_learning_rate = 3e-4 if backbone == "dit" else 3.75e-5
    # Of those that run no block of their own, the one that explains more there: docs/results.md.
    trunk = trunk or ("clean_net" if backbone == "dit" else "shared")
    trunk_rate = PPOConfig.trunk_learning_rate if trunk in WEIGHTLESS_TRUNKS else 8e-4
    return TrainConfig(
        batch_size=batch_size,
        # The early steps decide what is where; the late ones would learn to please the checker's edges.
        sampler=SamplerConfig(num_steps=8, noise_level=0.7, window=Fixed((0, 5))),
        # The reward compares the picture with the prompt, so the head reads the prompt too.
        critic=CriticConfig(trunk=trunk, text_conditioning="tokens", num_heads=8, hidden_dim=256),
        ppo=PPOConfig(
            clip=Ratio(1e-3),
            policy_learning_rate=policy_learning_rate,
            value_learning_rate=1e-3,
            trunk_learning_rate=trunk_rate,
            gae_lambda=0.95,
            balance_steps=True,
            timestep_fraction=0.8,
        ),
        ema_decay=0.8,
        pretrain=ValuePretrainingConfig(
            iterations=pretraining_iterations, passes=0.35, patience=pretraining_iterations
        ),
    )


def falling(config: TrainConfig) -> TrainConfig:
    """The configuration with a rate that falls to 0, for a run whose last policy is its result."""
    return replace(config, ppo=replace(config.ppo, final_learning_rate=0.0))


def shapes_steering() -> SteeringConfig:
    """Four particles pruned to one: 25 forwards per image over 8 steps."""
    return SteeringConfig(particles=4)


def shapes_run() -> RunConfig:
    """The embedded task, without downloads."""
    return RunConfig(
        out="runs/shapes",
        model="shapes-dit",
        prompts="shapes",
        held_out="shapes-held-out",
        rewards=(("shapes", 1.0),),
        evaluation_rewards=("shapes_strict", "shapes_gold"),
        best="shapes_strict",
        train=replace(falling(shapes("dit")), iterations=60, eval_every=20),
    )


def words_run() -> RunConfig:
    """Words that an OCR engine reads in tiny pictures, without downloads; needs `lacfast[rewards]`."""
    config = replace(falling(shapes("dit")), pretrain=ValuePretrainingConfig())
    return RunConfig(
        out="runs/words",
        model="words-dit",
        prompts="words",
        held_out="words-held-out",
        rewards=(("words_ocr", 1.0),),
        evaluation_rewards=("words_ocr_strict", "words_gold"),
        best="words_ocr_strict",
        value_pretraining=False,
        train=replace(
            config,
            iterations=120,
            eval_every=30,
            eval_samples=480,
            # Twice that of shapes: what docs/results.md found best for glyphs.
            ppo=replace(config.ppo, policy_learning_rate=2 * config.ppo.policy_learning_rate),
        ),
    )


def sd15_ddpo() -> RunConfig:
    """Stable Diffusion 1.5, DDPO's first task (arXiv 2305.13301): images that compress well as JPEG.

    Nobody's script: DDIM with eta 1, 50 steps and guidance 5 are ddpo-pytorch's; clip and rates are the
    critic paper's.
    """
    return RunConfig(
        out="runs/sd15-ddpo",
        model="stable-diffusion-v1-5/stable-diffusion-v1-5",
        prompts="animals",
        rewards=(("jpeg_compressibility", 1.0),),
        dtype="bfloat16",
        lora=LoRAConfig(rank=4),
        train=TrainConfig(
            batch_size=64,
            rollout_batch_size=16,
            sampler=SamplerConfig(kind="ddim", num_steps=50, noise_level=1.0, guidance_scale=5.0),
            critic=CriticConfig(trunk="branch"),
            ppo=PPOConfig(clip=Ratio(1e-5), policy_learning_rate=3e-4, microbatch_size=16, cfg_grad="both"),
            eval_every=10,
            eval_samples=64,
            eval_batch_size=16,
            eval_sampler=SamplerConfig(kind="ddim", num_steps=50, noise_level=0.0, guidance_scale=5.0),
        ),
    )


def _sd35_medium() -> TrainConfig:
    """Stable Diffusion 3.5 medium: the paper's clip, no guidance; Flow-GRPO's steps and noise level."""
    return TrainConfig(
        batch_size=96,
        rollout_batch_size=24,
        sampler=SamplerConfig(kind="flow_sde", num_steps=10, noise_level=0.7),
        critic=CriticConfig(trunk="branch", num_blocks=4),
        ppo=PPOConfig(clip=Ratio(1e-4), microbatch_size=8),
        ema_decay=0.9,
        eval_every=10,
        eval_samples=256,
        eval_batch_size=16,
        eval_sampler=SamplerConfig(kind="ode", num_steps=40, noise_level=0.0),
    )


def sd35m_geneval() -> RunConfig:
    """Compositional prompts of Flow-GRPO's GenEval set, judged by its reward server."""
    return RunConfig(
        out="runs/sd35m-geneval",
        model="stabilityai/stable-diffusion-3.5-medium",
        prompts="dataset/geneval/train_metadata.jsonl",
        held_out="dataset/geneval/test_metadata.jsonl",
        rewards=(("flow_grpo+http://127.0.0.1:18085", 1.0),),
        dtype="bfloat16",
        lora=LoRAConfig(rank=32, alpha=64),
        pipeline=PipelineSettings(resolution=(512, 512)),
        keep_text_encoders=False,
        train=_sd35_medium(),
    )


def sd35m_ocr() -> RunConfig:
    """Prompts that quote a text, which the image should show; read by an OCR engine."""
    return replace(
        sd35m_geneval(),
        out="runs/sd35m-ocr",
        prompts="dataset/ocr/train.txt",
        held_out="dataset/ocr/test.txt",
        rewards=(("ocr", 1.0),),
    )


def flux_pickscore() -> RunConfig:
    """FLUX.1-dev towards people's preference, as PickScore predicts it."""
    return RunConfig(
        out="runs/flux-pickscore",
        model="black-forest-labs/FLUX.1-dev",
        prompts="dataset/pickscore/train.txt",
        held_out="dataset/pickscore/test.txt",
        rewards=(("pickscore", 1.0),),
        dtype="bfloat16",
        lora=LoRAConfig(rank=32, alpha=64),
        pipeline=PipelineSettings(resolution=(512, 512)),
        keep_text_encoders=False,
        train=replace(
            _sd35_medium(),
            batch_size=48,
            rollout_batch_size=8,
            sampler=SamplerConfig(kind="flow_sde", num_steps=6, noise_level=0.8),
            # Of a free draw eight GPUs would have very different shares of 60 pairs.
            ppo=PPOConfig(clip=Ratio(1e-4), microbatch_size=2, minibatch_draw="stratified"),
            gradient_checkpointing=True,
            eval_batch_size=8,
            eval_sampler=SamplerConfig(kind="ode", num_steps=28, noise_level=0.0),
        ),
    )


def flow_grpo_geneval() -> RunConfig:
    """Flow-GRPO (arXiv 2505.05470) on GenEval's prompts: `geneval_sd3` of its config/grpo.py.

    Revision: yifan123/flow_grpo at ac4c86e8cae0. There 32 GPUs share the 48 groups of 24 images. Its moving
    average decays by 0.9 every eight optimizer steps, which is every four iterations. Its last step draws
    noise and is not trained; here it is an ODE step.
    """
    return replace(
        sd35m_geneval(),
        out="runs/flow-grpo-geneval",
        train=TrainConfig(
            batch_size=48 * 24,
            samples_per_prompt=24,
            rollout_batch_size=24,
            sampler=SamplerConfig(kind="flow_sde", num_steps=10, noise_level=0.7, guidance_scale=4.5),
            critic=CriticConfig(trunk="none"),
            advantages=AdvantageConfig(estimator=GRPO(std="global"), combination="scalarized"),
            ppo=PPOConfig(
                clip=Ratio(1e-4),
                kl=KLPenalty(0.04, "flow_grpo"),
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

    Revision: XueZeyue/DanceGRPO at 15cc71d53cc2. There 16 GPUs take a prompt each. Its trajectories of one
    prompt share their first noise, its timesteps are cut to whole numbers, and a group's deviation divides by
    N - 1; here the noise is each trajectory's own, timesteps are exact, and it divides by N. All weights with
    their moments are more than a GPU of 80 GB holds: eight of them share them, of 8 or 16.
    """
    return RunConfig(
        out="runs/dance-grpo-hpsv2",
        model="black-forest-labs/FLUX.1-dev",
        prompts="assets/prompts.txt",
        rewards=(("hpsv2", 1.0),),
        dtype="bfloat16",
        pipeline=PipelineSettings(resolution=(720, 720)),
        keep_text_encoders=False,
        train=TrainConfig(
            batch_size=16 * 12,
            samples_per_prompt=12,
            rollout_batch_size=12,
            iterations=300,
            sampler=SamplerConfig(kind="dance_sde", num_steps=16, noise_level=0.3, shift=3.0),
            critic=CriticConfig(trunk="none"),
            advantages=AdvantageConfig(estimator=GRPO(std="group")),
            ppo=PPOConfig(
                clip=Ratio(1e-4),
                advantage_clip=5.0,
                num_minibatches=3,
                timestep_fraction=0.6,
                policy_learning_rate=1e-5,
                betas=(0.9, 0.999),
                adam_eps=1e-8,
            ),
            gradient_checkpointing=True,
            shard=8,
            shard_gradients=True,
            eval_every=40,
            eval_samples=256,
            eval_batch_size=8,
            eval_sampler=SamplerConfig(kind="ode", num_steps=28, noise_level=0.0),
        ),
    )


def dance_grpo_hpsv2_lora() -> RunConfig:
    """DanceGRPO's published settings for a GPU of 80 GB: a LoRA in place of all weights."""
    run = dance_grpo_hpsv2()
    train = replace(run.train, shard=1, shard_gradients=False)
    return replace(run, out="runs/dance-grpo-hpsv2-lora", lora=LoRAConfig(rank=32), train=train)


def ddpo_compressibility() -> RunConfig:
    """DDPO (arXiv 2305.13301) on JPEG compressibility: config/base.py and config/dgx.py of ddpo-pytorch.

    Revision: kvablack/ddpo-pytorch at 1958463f0201. There eight GPUs share the 256 images of an epoch, in
    float16. Its prompts are the first 398 lines of its ddpo_pytorch/assets/imagenet_classes.txt.
    """
    return replace(
        sd15_ddpo(),
        out="runs/ddpo-compressibility",
        model="CompVis/stable-diffusion-v1-4",
        prompts="imagenet_animals.txt",
        lora=LoRAConfig(rank=4),
        train=TrainConfig(
            batch_size=8 * 32,
            rollout_batch_size=8,
            iterations=100,
            # Every step is stochastic, the last one too.
            sampler=SamplerConfig(
                kind="ddim", num_steps=50, noise_level=1.0, guidance_scale=5.0, window=Fixed((0, 50))
            ),
            critic=CriticConfig(trunk="none"),
            advantages=AdvantageConfig(estimator=DDPO(buffer_size=16, min_count=16)),
            ppo=PPOConfig(
                clip=Ratio(1e-4),
                advantage_clip=5.0,
                num_minibatches=4,
                policy_learning_rate=3e-4,
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


RUNS = {
    "shapes": shapes_run,
    "words": words_run,
    "sd15-ddpo": sd15_ddpo,
    "sd35m-geneval": sd35m_geneval,
    "sd35m-ocr": sd35m_ocr,
    "flux-pickscore": flux_pickscore,
    "flow-grpo-geneval": flow_grpo_geneval,
    "dance-grpo-hpsv2": dance_grpo_hpsv2,
    "dance-grpo-hpsv2-lora": dance_grpo_hpsv2_lora,
    "ddpo-compressibility": ddpo_compressibility,
}
"""What `lacfast train` knows by name."""
