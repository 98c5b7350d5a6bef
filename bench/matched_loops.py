"""A peer's loop and lacfast's trainer on equal models, set to the same maths.

The transformer meets flow_grpo: flow SDE, guidance with a detached unconditional half, LoRA, KL to the model
without it. The UNet meets ddpo-pytorch: DDIM on a noise prediction, guidance with gradients through both
halves, LoRA, no KL. Neither peer has a critic, so ours has none here; both take the same number of
optimizer steps per rollout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from diffusers import DDIMScheduler
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn

from bench.peer_loops import DDPOLoop, DDPOSettings, FlowGRPOLoop, FlowGRPOSettings, PeerModel
from lacfast import ops
from lacfast.backbones import adapt
from lacfast.backbones.latent import LatentBackbone
from lacfast.backbones.lora import tuner_layers
from lacfast.backbones.lora_linear import LoRALinear
from lacfast.config import (
    GRPO,
    AdvantageConfig,
    BatchMean,
    CriticConfig,
    Fixed,
    KLPenalty,
    LoRAConfig,
    PPOConfig,
    Ratio,
    SamplerConfig,
    TrainConfig,
)
from lacfast.records import INITIAL_STEP, NoiseKey
from lacfast.tasks import models, scenes
from lacfast.tasks.codec import PatchCodec, fit_codec
from lacfast.tasks.text import word_encoder
from lacfast.trainer import LatentActorCriticTrainer

Peer = Literal["flow_grpo", "ddpo"]
PeerLoop = FlowGRPOLoop | DDPOLoop
PEER_BATCH: dict[Peer, int] = {"flow_grpo": 9, "ddpo": 8}
"""Trajectories per forward in the published settings for several GPUs."""

LEARNING_RATE = 1e-8
"""So small that a race may take hundreds of optimizer steps on one rollout without leaving its policy."""


@dataclass(frozen=True, kw_only=True)
class Match:
    """What both sides do."""

    name: str
    peer: Peer
    build: Callable[[torch.dtype], LatentBackbone]
    """A model that runs in a dtype; the same weights at every call."""
    trajectories: int
    """Per iteration, a multiple of the peer's batch."""
    num_steps: int
    prompts: tuple[str, ...]
    """One per trajectory, in groups of the peer's batch."""
    dtype: torch.dtype = torch.float32
    """Ours runs in it; the peer in float32, or under autocast to it over a float32 base."""
    kl_weight: float = 0.04
    """For flow_grpo; it needs LoRA."""
    num_updates: int = 1
    """Optimizer steps per rollout; with 1 both sides' gradients are those of the whole rollout."""

    @property
    def sampler(self) -> SamplerConfig:
        if self.peer == "flow_grpo":
            return SamplerConfig(num_steps=self.num_steps, noise_level=0.7, guidance_scale=4.5)
        return SamplerConfig(
            kind="ddim",
            num_steps=self.num_steps,
            noise_level=1.0,
            guidance_scale=5.0,
            window=Fixed((0, self.num_steps)),
        )

    @property
    def samples_per_prompt(self) -> int:
        """1: the whole batch is the group."""
        return PEER_BATCH["flow_grpo"] if self.peer == "flow_grpo" else 1

    @property
    def pairs(self) -> int:
        """(sample, step) pairs that an update trains on."""
        return self.trajectories * (self.num_steps - (self.peer == "flow_grpo"))


def brightness(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    """A reward that costs nothing, so that no scorer hides the loops."""
    return images.mean(dim=(1, 2, 3))


def engine(
    match: Match, *, microbatch_size: int, dtype: torch.dtype | None = None, **changes: Any
) -> LatentActorCriticTrainer:
    """lacfast's trainer; `changes` go to TrainConfig."""
    guided: dict[str, Any] = {"cfg_grad": "both"}
    if match.peer == "flow_grpo":
        guided = {
            "cfg_grad": "cond",
            "kl": KLPenalty(match.kl_weight, "flow_grpo") if match.kl_weight else None,
        }
    config = TrainConfig(
        batch_size=match.trajectories,
        samples_per_prompt=match.samples_per_prompt,
        sampler=match.sampler,
        critic=CriticConfig(trunk="none"),
        advantages=AdvantageConfig(estimator=GRPO() if match.peer == "flow_grpo" else BatchMean()),
        ppo=PPOConfig(
            clip=Ratio(1e-4),
            advantage_clip=5.0,
            num_minibatches=match.num_updates,
            microbatch_size=microbatch_size,
            policy_learning_rate=LEARNING_RATE,
            **guided,
        ),
        **changes,
    )
    prompts = tuple(dict.fromkeys(match.prompts))
    return LatentActorCriticTrainer(match.build(dtype or match.dtype), brightness, prompts, config)


def peer_loop(match: Match, *, batch_size: int, dtype: torch.dtype = torch.float32) -> PeerLoop:
    """The peer's loop at a batch size of its own, on weights of `dtype`."""
    backbone = with_peft_layers(match.build(dtype))
    table = backbone.transition_table(match.sampler)
    model = PeerModel(backbone, None if match.dtype == torch.float32 else match.dtype)
    if match.peer == "flow_grpo":
        settings = FlowGRPOSettings(
            batch_size=batch_size,
            kl_weight=match.kl_weight,
            num_updates=match.num_updates,
            learning_rate=LEARNING_RATE,
        )
        return FlowGRPOLoop(model, table.timesteps, table.sigmas.to(_maths(dtype)), settings)
    alphas = backbone.scheduler.alphas_cumprod
    settings = DDPOSettings(
        batch_size=batch_size,
        train_batch_size=batch_size,
        num_updates=match.num_updates,
        learning_rate=LEARNING_RATE,
    )
    return DDPOLoop(model, table.timesteps, alphas.to(_maths(dtype)), settings)


def with_peft_layers(backbone: LatentBackbone) -> LatentBackbone:
    """The same backbone on peft's own LoRA layers, as the peers run it."""
    for layer in tuner_layers(backbone.model).values():
        if type(layer) is LoRALinear:
            layer.__class__ = PeftLinear
    return backbone


def _maths(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def plain_score(images: Tensor, prompts: list[str]) -> Tensor:
    """The reward as the peers' thread pool calls it."""
    return brightness(images, prompts, [])


def counted_noise(seed: int) -> Callable[[int, int, Tensor], Tensor]:
    """The noise that lacfast draws for the same trajectories, in the form that the peers' loops take."""

    def noise(first: int, step: int, like: Tensor) -> Tensor:
        key = NoiseKey.create(seed, range(first, first + len(like)), like.device)
        steps = torch.full((len(like),), step if step >= 0 else INITIAL_STEP, device=like.device)
        return ops.normal_noise(tuple(like.shape), steps, key).to(like.dtype)

    return noise


def tiny(
    family: models.BackboneName,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    seed: int = 0,
    size: models.ModelSize = models.TINY,
) -> LatentBackbone:
    """A model with LoRA, of 1 M parameters if TINY; its random weights let every input count."""
    model: Any = models.tiny_backbone(family, generator=torch.Generator().manual_seed(seed), size=size)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    text = word_encoder(generator=torch.Generator().manual_seed(seed + 1))
    side = model.config["sample_size"]
    backbone = adapt(
        # torch's own: diffusers' warns of modules to keep in float32 even where there are none.
        nn.Module.to(model.eval(), device, dtype),
        text.eval().requires_grad_(False).to(device),
        codec(str(device)),
        latent_shape=(model.config["in_channels"], side, side),
        scheduler=None if family == "dit" else ddim_scheduler(),
        lora=LoRAConfig(rank=32, alpha=64) if family == "dit" else LoRAConfig(rank=4),
    )
    with torch.no_grad():
        for parameter in backbone.policy_parameters():
            # An adapter whose second factor is zero has no gradient in its first.
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator).to(device))
    return backbone


@cache
def codec(device: str) -> PatchCodec:
    """Fitted once: it is frozen, so all models may share it."""
    return fit_codec().to(device)


def ddim_scheduler() -> DDIMScheduler:
    """As Stable Diffusion 1.5 is published."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip


def tiny_match(
    family: models.BackboneName,
    *,
    batches: int,
    num_steps: int,
    device: torch.device | str = "cpu",
    size: models.ModelSize = models.TINY,
) -> Match:
    """`batches` of the peer's published size of trajectories on a tiny model."""
    peer: Peer = "flow_grpo" if family == "dit" else "ddpo"
    count = batches * PEER_BATCH[peer]
    texts = [prompt.text for prompt in scenes.TASK.split()[0]]
    return Match(
        name=f"tiny {family}",
        peer=peer,
        build=lambda dtype: tiny(family, dtype, device, size=size),
        trajectories=count,
        num_steps=num_steps,
        prompts=tuple(texts[index // PEER_BATCH[peer] % len(texts)] for index in range(count)),
    )
