"""Untrained tiny backbones made with diffusers' own classes, for tests that need a model but no skill."""

from __future__ import annotations

import copy
from functools import cache

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lacfast.backbones import adapt_pretrained
from lacfast.backbones.latent import LatentBackbone
from lacfast.config import (
    AdvantageConfig,
    CriticConfig,
    LoRAConfig,
    PPOConfig,
    Ratio,
    SamplerConfig,
    TrainConfig,
    ValuePretrainingConfig,
    variant,
)
from lacfast.tasks import models, scenes
from lacfast.tasks.codec import PatchCodec, fit_codec
from lacfast.tasks.pretraining import Pretrained, pretrain
from lacfast.tasks.text import word_encoder

FAMILIES: tuple[models.BackboneName, ...] = ("dit", "unet")
SMALLEST = models.ModelSize(num_layers=2, num_heads=2, channels=(16, 32))
"""Two blocks of every kind: an iteration of it takes half the time of one of TINY."""
PROMPTS = [prompt.text for prompt in scenes.TASK.split()[0][:8]]


def tiny_backbone(
    family: models.BackboneName,
    *,
    seed: int = 0,
    lora: LoRAConfig | None = None,
    size: models.ModelSize = SMALLEST,
) -> LatentBackbone:
    """A backbone whose output depends on all of its inputs."""
    model = models.tiny_backbone(family, generator=torch.Generator().manual_seed(seed), size=size)
    generator = torch.Generator().manual_seed(seed)
    # Zero-initialised modulation would hide the timestep and the prompt.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    text = word_encoder(generator=torch.Generator().manual_seed(100))
    # A backbone may be moved to another device, and takes its codec along.
    codec = copy.deepcopy(fitted_codec())
    pretrained = Pretrained(model.eval(), text.eval().requires_grad_(False), codec, ())
    return adapt_pretrained(pretrained, lora=lora)


@cache
def fitted_codec() -> PatchCodec:
    """Fitted once for a process and those that are forked from it."""
    return fit_codec()


@cache
def barely_trained() -> Pretrained:
    """The smallest DiT after two steps: what is tested with it does not care."""
    return pretrain("dit", steps=2, size=SMALLEST)


def on_cuda(backbone: LatentBackbone) -> LatentBackbone:
    """The backbone, moved to the CUDA device."""
    for module in (backbone.model, backbone.prompt_encoder, backbone.codec):
        module.cuda()
    return backbone


def tiny_critic(advantages: AdvantageConfig) -> CriticConfig:
    """What the advantages need: a small head, or no critic."""
    if not advantages.uses_critic:
        return CriticConfig(trunk="none")
    return CriticConfig(hidden_dim=16, head_dim=8, num_heads=2)


def tiny_config(**changes: object) -> TrainConfig:
    """A configuration whose iteration takes a fraction of a second."""
    settings: dict[str, object] = {
        "batch_size": 8,
        "eval_samples": 8,
        "sampler": SamplerConfig(num_steps=4),
        "ppo": PPOConfig(clip=Ratio(1e-3), num_minibatches=2, microbatch_size=8),
        "pretrain": ValuePretrainingConfig(iterations=2, held_out_samples=8),
    }
    advantages = changes.get("advantages", AdvantageConfig())
    assert isinstance(advantages, AdvantageConfig)
    preset = TrainConfig(**settings)  # type: ignore[arg-type]
    return variant(preset, **{"critic": tiny_critic(advantages)} | changes)


def brightness(images: torch.Tensor, prompts: list[str], metadata: list[dict[str, object]]) -> torch.Tensor:
    """A reward that needs no checker."""
    return images.mean(dim=(1, 2, 3))


def make_fake(module: torch.nn.Module, mode: FakeTensorMode) -> None:
    """Replace every parameter and buffer by one without storage."""
    for owner in module.modules():
        for tensors in (owner._parameters, owner._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = mode.from_tensor(tensor)
