"""What training the published models costs, counted in full size on the meta device: no number is a time.

python -m bench.costs      counts and writes bench/results/costs.json, which `bench.report` shows

Operations are what torch dispatches, kernels those that are no views. FLOPs are per image of an iteration.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.published import PUBLISHED, encode_prompt, prompt_conditioning, trained_backbone
from lacfast.backbone import build_critic
from lacfast.backbones.latent import LatentBackbone
from lacfast.backbones.published import PublishedModel
from lacfast.config import CriticConfig, KLPenalty, PPOConfig, SamplerConfig, TrainConfig
from lacfast.critic.critic import Critic
from lacfast.learning.batches import PolicySource
from lacfast.learning.gradient_guard import GradientGuard
from lacfast.learning.kl_anchor import KLAnchor
from lacfast.learning.pairs import all_pairs
from lacfast.learning.policy_update import PolicyUpdate
from lacfast.learning.readers import Reader
from lacfast.learning.step_tables import step_tables
from lacfast.policy import policy_output
from lacfast.records import Advantages, NoiseKey, Rollout
from lacfast.rollout.buffers import SamplerBuffers, SamplerInputs
from lacfast.rollout.step import denoise_step
from lacfast.runs.costs import OperationCounter, counted, fused_attention
from lacfast.runtime.graph import GraphRunner

RESULT = Path(__file__).parent / "results" / "costs.json"
BATCH = 2
TRUNKS = ("shared", "branch")
"""Heads on the actor's taps, and a branch of its last block."""

DDIM = TrainConfig(
    batch_size=BATCH, sampler=SamplerConfig(kind="ddim", num_steps=50, noise_level=1.0, guidance_scale=5.0)
)
"""ddpo-pytorch's sampler."""
FLOW = TrainConfig(
    batch_size=BATCH,
    sampler=SamplerConfig(num_steps=10, noise_level=0.7, guidance_scale=4.5),
    ppo=PPOConfig(kl=KLPenalty(0.04), num_minibatches=2),
)
"""flow_grpo's for SD3.5-M."""
FLUX = TrainConfig(batch_size=BATCH, sampler=SamplerConfig(num_steps=6, noise_level=0.9))
"""flow_grpo's for FLUX; the guidance is the model's own."""
QWEN_IMAGE = TrainConfig(
    batch_size=BATCH, sampler=SamplerConfig(num_steps=10, noise_level=1.2, guidance_scale=4.0)
)
"""flow_grpo's for Qwen-Image, all steps stochastic."""
KLEIN = TrainConfig(batch_size=BATCH, sampler=SamplerConfig(num_steps=8, noise_level=0.7, guidance_scale=4.0))
"""Flow-Factory's for FLUX.2 klein, all steps but the last stochastic."""
Z_IMAGE = TrainConfig(
    batch_size=BATCH, sampler=SamplerConfig(num_steps=10, noise_level=0.7, guidance_scale=5.0)
)
"""Flow-Factory's for Z-Image, likewise."""
SANA = TrainConfig(batch_size=BATCH, sampler=SamplerConfig(num_steps=10, noise_level=0.7, guidance_scale=4.5))
"""Flow-GRPO's steps and noise, with the pipeline's guidance."""
PIXART = TrainConfig(
    batch_size=BATCH, sampler=SamplerConfig(kind="ddim", num_steps=20, noise_level=1.0, guidance_scale=4.5)
)
"""The pipeline's steps and guidance, with DDPO's noise."""
WAN = TrainConfig(
    batch_size=BATCH,
    sampler=SamplerConfig(num_steps=20, noise_level=0.7, guidance_scale=4.5),
    ppo=PPOConfig(kl=KLPenalty(0.004), num_minibatches=2),
)
"""flow_grpo's steps, guidance and KL for Wan 2.1, at the size of the pipeline's own call."""
IMAGES_PER_PROMPT = {"sd35_medium": 24}
"""Images of a rollout with one prompt: flow_grpo's group, which encodes it for each, the engine once."""
CONFIGS = {
    "sd15": DDIM,
    "sdxl": DDIM,
    "sd35_medium": FLOW,
    "flux_dev": FLUX,
    "flux2_dev": FLUX,
    "flux2_klein": KLEIN,
    "qwen_image": QWEN_IMAGE,
    "z_image": Z_IMAGE,
    "sana": SANA,
    "pixart_sigma": PIXART,
    "wan_1b": WAN,
    "wan_14b": WAN,
}

REMEMBERING = ("qwen_image", "z_image")
"""Models that keep the rotary tables of their first forward."""

# Budgets of what is counted; a test holds them. Lower one when a count falls; raising one needs a reason.
ADDED_KERNELS = 6
"""Operations but views that a denoising step adds to its model's own: the model's input, the timestep, its
scale in FLUX, the output as float32, guidance with transition and stores, the step's index."""
OWN_KERNELS = {"qwen_image": 7, "z_image": 2, "sana": 1}
"""What a step adds besides: where guidance is rescaled, which no fused step does, guidance, norms and the
rescaling; where a mask stands beside the prompts, joining it with the unconditional one's; where time and
velocity are turned around, that."""
KERNELS_PER_FEATURE = 1
"""The same with a critic, per tensor that it reads of the model: the store."""
MICROBATCH_OPERATIONS = {
    "sd15": 7_450,
    "sdxl": 26_754,
    "sd35_medium": 21_506,
    "flux_dev": 18_446,
    "qwen_image": 43_700,
    "flux2_dev": 12_931,
    "flux2_klein": 9_179,
    "z_image": 16_847,
    "sana": 11_784,
    "pixart_sigma": 11_018,
    "wan_1b": 23_922,
    "wan_14b": 31_802,
}
"""Operations of a microbatch of the policy's update: gathering, forwards, loss, backward."""
SYNCS = {"step": 0, "microbatch": 0}
"""Waits of the host for the device."""
VALUE_SHARE_OF_HEADS = 0.01
"""FLOPs of the values of all steps over those of sampling, with heads on taps."""
VALUE_SHARE_BEYOND_BRANCH = 0.02
"""The same with a branch of k of L blocks, beyond k / L."""
FLOW_GRPO_RATIO = 0.8
"""FLOPs of an image of SD3.5-M's iteration over flow_grpo's loop, the critic aside."""


@dataclass(frozen=True)
class StepCount:
    """What a denoising step dispatches."""

    all: OperationCounter
    model_operations: int
    """Those within diffusers' model."""
    model_kernels: int
    features: int
    """Tensors that are kept for the critic."""


class Workload:
    """A published model with what a step and an update read, all without values."""

    def __init__(self, name: str) -> None:
        self.model: PublishedModel = PUBLISHED[name]
        self.config = CONFIGS[name]
        self.backbone: LatentBackbone = trained_backbone(self.model)
        self.table = self.backbone.transition_table(self.config.sampler)
        self.conditioning = prompt_conditioning(self.model, self.backbone, BATCH)
        guided = self.config.sampler.guidance_scale > 1
        self.uncond_conditioning = prompt_conditioning(self.model, self.backbone, BATCH) if guided else None
        if name in REMEMBERING:
            self.step(None)

    def critic(self, trunk: str) -> Critic:
        with torch.device("meta"):
            critic = build_critic(self.backbone, 1, CriticConfig(trunk=trunk))
        assert critic is not None
        return critic

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def noise(self) -> NoiseKey:
        return NoiseKey(self.empty(1, dtype=torch.int64), self.empty(BATCH, dtype=torch.int64))

    def buffers(self, critic: Critic | None) -> SamplerBuffers:
        scale = self.config.sampler.guidance_scale
        inputs = SamplerInputs.create(
            self.table, self.noise(), self.conditioning, self.uncond_conditioning, scale
        )
        return SamplerBuffers.allocate(
            inputs,
            self.backbone.latent_shape,
            num_rewards=0 if critic is None else 1,
            model_dtype=self.backbone.dtype,
        )

    def step(self, critic: Critic | None) -> StepCount:
        """A denoising step of a training rollout."""
        counter = OperationCounter()
        entry, inside = [0, 0], [0, 0]

        def enter(*_: Any) -> None:
            entry[:] = counter.operations, counter.kernels

        def leave(*_: Any) -> None:
            inside[:] = counter.operations - entry[0], counter.kernels - entry[1]

        model = self.backbone.model
        # Before the model's own hook, which casts the adapter.
        handles = (
            model.register_forward_pre_hook(enter, prepend=True),
            model.register_forward_hook(leave),
        )
        buffers = self.buffers(critic)
        with fused_attention(), counter:
            denoise_step(self.backbone, critic, buffers)
        for handle in handles:
            handle.remove()
        return StepCount(counter, *inside, len(buffers.features))

    def rollout(self) -> Rollout:
        buffers = self.buffers(None)
        return Rollout(
            table=self.table,
            latents=buffers.latents,
            model_outputs=buffers.model_outputs,
            log_probs=buffers.log_probs,
            values=buffers.values,
            features={},
            conditioning=self.conditioning,
            uncond_conditioning=self.uncond_conditioning,
            noise=buffers.inputs.noise,
            prompts=[""] * BATCH,
            metadata=[{}] * BATCH,
        )

    def microbatch(self, *, is_first: bool = False) -> OperationCounter:
        """Gathering, forward and backward of one microbatch of BATCH pairs in the policy's update.

        `is_first`: of the first optimizer step on a rollout, whose unconditional half is known.
        """
        steps = len(self.table.trainable_steps)
        advantages = Advantages(
            steps=torch.arange(steps, device="meta"),
            policy=self.empty(steps, BATCH),
            targets=self.empty(BATCH, 1),
            raw=self.empty(steps, BATCH, 1),
        )
        config, rollout = self.config, self.rollout()
        anchor = None
        if config.ppo.kl is not None:
            scale = config.sampler.guidance_scale
            anchor = KLAnchor(self.backbone.frozen_anchor(), GraphRunner(), scale)
        optimizer = torch.optim.SGD(self.backbone.policy_parameters(), lr=0.0)
        update = PolicyUpdate(
            *(self.backbone, optimizer, config, GradientGuard("policy", "raise", self.empty())),
            anchor=anchor,
            reader=Reader(),
        )
        update.prepare(step_tables(self.table, config.ppo, rollout.latents))
        is_known = is_first and self.uncond_conditioning is not None and not self.backbone.rescales_guidance
        source = PolicySource(rollout, advantages, update.tables.timesteps, is_known=is_known)
        pairs = all_pairs(torch.zeros(1, dtype=torch.int64, device="meta"), BATCH)
        share = torch.ones_like(update.totals.loss)

        def body() -> None:
            update.gradient(source.batch(pairs, share))

        return counted(body)

    def critic_costs(self, critic: Critic) -> tuple[OperationCounter, OperationCounter]:
        """Values of BATCH states on their features, and forward and backward of the update on them."""
        buffers = self.buffers(critic)
        timestep = self.empty(BATCH)
        with torch.no_grad():
            result = policy_output(
                self.backbone, buffers.sample, timestep, self.conditioning, None, critic=critic
            )

        def values() -> Tensor:
            return critic(result.features, buffers.sample, timestep, self.conditioning)

        with torch.no_grad():
            valued = counted(values)
        return valued, counted(lambda: values().sum().backward())

    def flow_grpo_pair(self) -> tuple[int, int]:
        """FLOPs of forward and backward of one pair in flow_grpo's loop: both halves go through both."""
        sample = self.empty(2, *self.backbone.latent_shape)
        timestep = self.empty(2)
        conditioning = prompt_conditioning(self.model, self.backbone, 2)

        def guided() -> Tensor:
            uncond, cond = self.backbone.predict(sample, timestep, conditioning).chunk(2)
            return uncond.detach() + self.config.sampler.guidance_scale * (cond - uncond.detach())

        with torch.no_grad():
            forward = counted(guided).flops
        return forward, counted(lambda: guided().sum().backward()).flops - forward


def measure(name: str) -> dict[str, Any]:
    """All counts of a published model."""
    work = Workload(name)
    critics = {trunk: work.critic(trunk) for trunk in TRUNKS}
    steps = {"none": work.step(None)} | {trunk: work.step(critic) for trunk, critic in critics.items()}
    plain = steps["none"].all
    critic_costs = {trunk: work.critic_costs(critic) for trunk, critic in critics.items()}
    microbatch = work.microbatch()
    num_steps, trained = work.table.num_steps, len(work.table.trainable_steps)
    num_references = 0 if work.config.ppo.kl is None else 1
    backward = microbatch.flops - (1 + num_references) * plain.flops
    # The 8 pairs per rollout that run it all the same are none per image.
    known = microbatch.flops - work.microbatch(is_first=True).flops
    pairs, steps_per_rollout = trained * BATCH, work.config.ppo.num_minibatches
    prompt = counted(lambda: encode_prompt(work.model)).flops
    flops = {
        "prompt": prompt // IMAGES_PER_PROMPT.get(name, 1),
        "sampling": num_steps * plain.flops // BATCH,
        "decode": counted(lambda: work.backbone.decode(work.empty(1, *work.backbone.latent_shape))).flops,
        "reference": num_references * trained * plain.flops // BATCH,
        "update_forward": (pairs * plain.flops - pairs // steps_per_rollout * known) // BATCH**2,
        "update_backward": trained * backward // BATCH,
    }
    values, learning = (
        {trunk: num_steps * costs[part].flops // BATCH for trunk, costs in critic_costs.items()}
        for part in (0, 1)
    )
    result: dict[str, Any] = {
        "title": work.model.title,
        "parameters": sum(
            parameter.numel()
            for key, parameter in work.backbone.model.named_parameters()
            if "lora_" not in key
        ),
        "is_guided": work.uncond_conditioning is not None,
        "operations": {
            "model": steps["none"].model_operations,
            "step": {trunk: step.all.operations for trunk, step in steps.items()},
            "values": {trunk: valued.operations for trunk, (valued, _) in critic_costs.items()},
            "microbatch": microbatch.operations,
        },
        "kernels": {
            "model": steps["none"].model_kernels,
            "step": {trunk: step.all.kernels for trunk, step in steps.items()},
            "values": {trunk: valued.kernels for trunk, (valued, _) in critic_costs.items()},
            "microbatch": microbatch.kernels,
        },
        "features": {trunk: step.features for trunk, step in steps.items()},
        "syncs": {"step": max(step.all.syncs for step in steps.values()), "microbatch": microbatch.syncs},
        "flops_per_image": flops | {"values": values, "critic_update": learning},
    }
    if name == "sd35_medium":
        forward, backward = work.flow_grpo_pair()
        result["flow_grpo_flops_per_image"] = flops | {
            "prompt": prompt,
            "reference": trained * forward,
            "update_forward": trained * forward,
            "update_backward": trained * backward,
        }
    return result


def table(result: dict[str, Any]) -> str:
    """Kernels of a step and FLOPs of an image, model by model, as Markdown."""
    kernels = "model's kernels | added: step | heads | branch | values: heads | branch"
    lines = [
        f"| | {kernels} | TFLOP: sampling | heads | branch | update |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result.values():
        counts, flops = row["kernels"], row["flops_per_image"]
        own = counts["model"]
        added = " | ".join(f"{counts['step'][trunk] - own:,}" for trunk in ("none", "shared", "branch"))
        valued = " | ".join(f"{counts['values'][trunk]:,}" for trunk in ("shared", "branch"))
        shares = " | ".join(
            f"+{100 * flops['values'][trunk] / flops['sampling']:.2g} %" for trunk in ("shared", "branch")
        )
        lines.append(
            f"| {row['title']} | {own:,} | {added} | {valued} | {flops['sampling'] / 1e12:,.0f} | {shares} "
            f"| {policy_update(flops) / 1e12:,.0f} |"
        )
    row = result["sd35_medium"]
    ratio = same_maths(row["flops_per_image"]) / same_maths(row["flow_grpo_flops_per_image"])
    guided = ", ".join(row["title"].split(",")[0] for row in result.values() if row["is_guided"])
    note = (
        f"A LoRA of rank 32; {guided} with classifier-free guidance. Kernels of a denoising step are what "
        "torch dispatches but views and allocations; they are no time, and the adapter's cast is one of "
        "them, which a GPU runs as a few launches. With a critic the step only stores what the critic reads, "
        "one kernel per tensor; its values come after the last step, those of several steps together. The "
        "host waits in no step and in no microbatch. An image of SD3.5-M's iteration "
        f"takes {100 * (1 - ratio):.0f} % fewer FLOPs than in "
        "flow_grpo's loop of the same maths, the critic aside: 24 images per prompt, two optimizer steps per "
        "rollout. `python -m bench.costs` counts it."
    )
    return "\n".join([*lines, "", note])


def policy_update(flops: dict[str, Any]) -> float:
    """FLOPs of the policy's update of one image, its reference included."""
    return float(flops["reference"] + flops["update_forward"] + flops["update_backward"])


def same_maths(flops: dict[str, Any]) -> float:
    """FLOPs of an image in an iteration without a critic."""
    return policy_update(flops) + float(flops["prompt"] + flops["sampling"] + flops["decode"])


def main() -> None:
    result = {name: measure(name) for name in PUBLISHED}
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
