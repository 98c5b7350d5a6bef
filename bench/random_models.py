"""Models with random weights on a device: timing does not depend on their values.

Full sizes are those of bench/published.py, with random prompt embeddings instead of text encoders. The
rehearsal on a CPU has the embedded task's tiny models in their place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from bench import matched_loops
from bench.matched_loops import LEARNING_RATE, PEER_BATCH, Match, Peer
from lacfast.backbones import PipelineSettings, load_backbone
from lacfast.backbones.latent import LatentBackbone
from lacfast.backbones.parts import Embeddings, empty_embeddings
from lacfast.backbones.prompt_cache import PromptCache
from lacfast.config import Fixed, KLPenalty, LoRAConfig, PPOConfig, SamplerConfig

if TYPE_CHECKING:
    from lacfast.backbones.published import PublishedModel

PROMPT = "one red circle"
"""Known to the tiny models; the full-size ones read no text here."""
PPO: dict[Peer | None, PPOConfig] = {
    "flow_grpo": PPOConfig(kl=KLPenalty(0.04, "flow_grpo"), policy_learning_rate=LEARNING_RATE),
    "ddpo": PPOConfig(cfg_grad="both", policy_learning_rate=LEARNING_RATE),
    None: PPOConfig(policy_learning_rate=LEARNING_RATE),
}


class RandomEmbeddings:
    """Stands in for text encoders: every prompt has the same random embedding."""

    def __init__(self, embeddings: Embeddings) -> None:
        """(1, ...) each."""
        self.embeddings = embeddings

    def encode(self, prompts: Sequence[str]) -> Embeddings:
        count = len(prompts)
        return {name: tensor.expand(count, *tensor.shape[1:]) for name, tensor in self.embeddings.items()}

    def encode_unconditional(self) -> Embeddings:
        return self.embeddings

    def identity(self) -> None:
        """Nobody keeps them in files."""

    def set_aside(self) -> None:
        """There is nothing to give back."""

    def bring_back(self) -> None:
        """Nothing was set aside."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model of the GPU tables."""

    title: str
    build: Callable[[torch.dtype], LatentBackbone]
    """Makes the model with a LoRA, in a dtype; on the device already."""
    ppo: PPOConfig
    """Its peer's guidance and KL."""
    sampler: SamplerConfig
    """What one forward of it is for; few steps, since a step's time does not depend on their number."""
    peer: Peer | None = None
    """The peer whose loop it meets in the iteration; None: none fits the device's memory in float32."""
    trajectories: int = 0
    """Per iteration."""
    is_tiny: bool = False
    """So small that launches and the host are what takes time, and that float64 models fit beside it."""


def random_pipeline(published: PublishedModel, device: torch.device, dtype: torch.dtype) -> LatentBackbone:
    """A published model on `device` with torch's initial weights in `dtype` and a LoRA of rank 32."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        # Made where and as it stays: 12 billion float32 weights would not fit beside another model.
        pipeline = published.build(device=device, text_encoders=False)
    finally:
        torch.set_default_dtype(default)
    backbone = load_backbone(
        pipeline,
        dtype=dtype,
        lora=LoRAConfig(rank=32),
        settings=PipelineSettings(resolution=published.resolution),
    )
    generator = torch.Generator(device).manual_seed(0)
    embeddings = empty_embeddings(published.prompt, 1, device=device)
    for tensor in embeddings.values():
        if tensor.is_floating_point():
            tensor.normal_(generator=generator)
    backbone.prompts = PromptCache(RandomEmbeddings(embeddings))
    return backbone


def tiny_subject(family: Any, device: torch.device, trajectories: int) -> Subject:
    """One of the embedded task's models of 1 M parameters."""

    def build(dtype: torch.dtype) -> LatentBackbone:
        return matched_loops.tiny(family, dtype, device)

    match = matched_loops.tiny_match(family, batches=1, num_steps=4)
    return Subject(
        title=match.name,
        build=build,
        ppo=PPO[match.peer],
        sampler=match.sampler,
        peer=match.peer,
        trajectories=trajectories,
        is_tiny=True,
    )


def tiny_subjects(device: torch.device, families: Sequence[str] = ("dit", "unet")) -> list[Subject]:
    """A rehearsal's: tiny models with one batch of their peer's."""
    count = {"dit": PEER_BATCH["flow_grpo"], "unet": PEER_BATCH["ddpo"]}
    return [tiny_subject(family, device, count[family]) for family in families]


def subjects(device: torch.device) -> list[Subject]:
    """The models of the tables, small ones first: what does not fit the time is left out at the end."""
    from bench.published import PUBLISHED

    ddim = SamplerConfig(kind="ddim", num_steps=4, noise_level=1.0, guidance_scale=5.0, window=Fixed((0, 4)))
    flow = SamplerConfig(num_steps=4, noise_level=0.7, guidance_scale=4.5)
    chosen: list[tuple[str, SamplerConfig, Peer | None, int]] = [
        ("sd15", ddim, "ddpo", 16),
        ("sd35_medium", flow, "flow_grpo", 18),
        # Distilled: guidance is an input of the model.
        ("flux_dev", SamplerConfig(num_steps=4, noise_level=0.9), None, 0),
    ]

    def published(name: str, sampler: SamplerConfig, peer: Peer | None, trajectories: int) -> Subject:
        model = PUBLISHED[name]
        return Subject(
            title=model.title,
            build=lambda dtype: random_pipeline(model, device, dtype),
            ppo=PPO[peer],
            sampler=sampler,
            peer=peer,
            trajectories=trajectories,
        )

    return [tiny_subject("dit", device, 72), *(published(*entry) for entry in chosen)]


def match_of(subject: Subject, dtype: torch.dtype) -> Match:
    """The iteration of a subject beside its peer's."""
    assert subject.peer is not None
    return Match(
        name=subject.title,
        peer=subject.peer,
        build=subject.build,
        trajectories=subject.trajectories,
        num_steps=subject.sampler.num_steps,
        prompts=(PROMPT,) * subject.trajectories,
        dtype=dtype,
        num_updates=2,
    )
