"""Pretraining of the tiny backbones: flow matching on pictures that a task draws, with clean captions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from lacfast.config.checks import Config, Count, CountOrNone, Positive, unknown
from lacfast.distributed import ALONE, Share, World
from lacfast.tasks import scenes
from lacfast.tasks.codec import PatchCodec, fit_codec
from lacfast.tasks.models import TINY, BackboneName, ModelSize, predict_velocity, tiny_backbone
from lacfast.tasks.task import Task
from lacfast.tasks.text import WordEncoder, word_encoder


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(Config):
    """The recipe of one backbone: short on purpose, so that post-training has something to mend."""

    steps: Count
    """Optimizer steps."""
    batch_size: Count = 64
    """Images per step."""
    learning_rate: Positive = 8e-3
    """Peak of AdamW's rate: linear warm-up, then half a cosine to zero."""
    warmup_steps: CountOrNone = 30
    """Steps of the warm-up."""
    pictures_per_prompt: Count = 32
    """Pictures rendered per prompt before the first step, or fewer where the steps draw fewer."""


CONFIGS: dict[BackboneName, PretrainConfig] = {
    "dit": PretrainConfig(steps=640),
    "unet": PretrainConfig(steps=440, learning_rate=3e-3),
}

Progress = Callable[[int, int, float], None]
"""Called as progress(step, steps, loss) after every step."""


@dataclass(frozen=True)
class Pretrained:
    """A tiny backbone with what belongs to it, in eval mode; text and codec take no gradient."""

    model: nn.Module
    text: WordEncoder
    codec: PatchCodec
    history: tuple[float, ...] = ()
    """Loss of every pretraining step; none of a saved one."""


def pretrain(
    backbone: BackboneName,
    task: Task = scenes.TASK,
    *,
    seed: int = 0,
    steps: int | None = None,
    progress: Progress | None = None,
    size: ModelSize | None = None,
    config: PretrainConfig | None = None,
    device: str | torch.device = "cpu",
    world: World = ALONE,
) -> Pretrained:
    """Trains a tiny backbone and its text encoder from scratch by flow matching, bit-identical for one seed.

    x = (1 - sigma) data + sigma noise;   loss = mean( (model(x, 1000 sigma, prompt) - (noise - data))^2 )
    (Lipman et al. 2023, straight paths). All prompts occur here, those held out of post-training too.

    Args:
        backbone: "dit" or "unet".
        task: whose prompts and pictures are learned.
        seed: of weights, pictures and noise.
        steps: optimizer steps; the recipe's own number where None.
        progress: called after every step.
        size: of the backbone, for the task's pictures. None: the tiny one.
        config: the recipe. None: the tiny backbone's own.
        device: where it is trained. What is random is drawn on the CPU, where the result is too.
        world: ranks that share every batch, of which each gets the model: that of one process up to the order
            of sums.

    Raises:
        ValueError: the backbone is unknown, steps is not positive, the size is not the pictures', or there
            are more ranks than images in a batch.
    """
    if backbone not in CONFIGS:
        raise unknown("backbone", backbone, CONFIGS)
    if size is None:
        size = replace(TINY, image_size=task.image_size)
    if size.image_size != task.image_size:
        raise ValueError(
            f"a model of {size.image_size} pixels cannot learn the task {task.name!r} of {task.image_size}; "
            "give a size with its image_size"
        )
    config = CONFIGS[backbone] if config is None else config
    num_steps = round(task.pretraining_share * config.steps) if steps is None else steps
    if num_steps <= 0:
        raise ValueError(f"steps={num_steps} trains nothing; give at least 1")
    generator = torch.Generator().manual_seed(seed)
    model = tiny_backbone(backbone, generator=generator, size=size).to(device)
    text = word_encoder(task, generator=generator).to(device)
    codec = fit_codec(task)
    drawn_per_prompt = math.ceil(num_steps * config.batch_size / len(task.prompts()))
    drawn = min(config.pictures_per_prompt, drawn_per_prompt)
    latents, words = (each.to(device) for each in _captioned_latents(task, codec, text, drawn, seed))
    parameters = [*model.parameters(), *text.parameters()]
    share = world.share(config.batch_size)
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.01)
    history = []
    for step in range(num_steps):
        optimizer.param_groups[0]["lr"] = _learning_rate(step, num_steps, config)
        rows = torch.randint(len(latents), (config.batch_size,), generator=generator).to(device)
        loss = _flow_matching_loss(model, text, latents[rows], words[rows % len(words)], generator, share)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        world.sum_([loss.detach(), *gradients], "a step of the pretraining")
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        history.append(loss.item())
        if progress is not None:
            progress(step, num_steps, history[-1])
    text = text.cpu().eval().requires_grad_(False)
    return Pretrained(model.cpu().eval(), text, codec.eval(), tuple(history))


def _captioned_latents(
    task: Task, codec: PatchCodec, text: WordEncoder, drawn: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Latents (drawn * P, C, H, W), prompt by prompt in turn, and the words (P, L) of the P prompts."""
    prompts = task.prompts()
    images = torch.from_numpy(task.draw(prompts * drawn, np.random.default_rng(seed)))
    return codec.encode(images), text.indices([prompt.text for prompt in prompts])


def _flow_matching_loss(
    model: nn.Module,
    text: WordEncoder,
    clean: Tensor,
    words: Tensor,
    generator: torch.Generator,
    share: Share,
) -> Tensor:
    """The part of a batch's loss that its share makes; what is random is drawn for all of the batch."""
    noise = torch.randn(clean.shape, generator=generator).to(clean.device)
    uniform = torch.rand(len(clean), generator=generator).to(clean.device)
    # Shifted towards noise, where layout and colours are decided and a sampler of few steps begins.
    sigma = 2 * uniform / (1 + uniform)
    clean, noise, sigma, words = (rows[share.rows] for rows in (clean, noise, sigma, words))
    weight = sigma.view(-1, 1, 1, 1)
    noisy = (1 - weight) * clean + weight * noise
    velocity = predict_velocity(model, noisy, 1000 * sigma, *text.embed(words))
    return (velocity - (noise - clean)).square().mean() * (share.count / share.total)


def _learning_rate(step: int, steps: int, config: PretrainConfig) -> float:
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
