"""FLUX.1: diffusers' FluxTransformer2DModel on packed latents as actor and as critic trunk."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lacfast.backbones.lora import merged_copy
from lacfast.backbones.pipelines import PackedPipelines, linear_schedule
from lacfast.backbones.transformer import JOINT_ATTENTION, Blocks, PackedBackbone
from lacfast.config import SamplerConfig
from lacfast.critic.trunk import Features
from lacfast.records import Conditioning, TransitionTable

LONGEST_PROMPT = 4096
"""Tokens that have a position."""


class FluxBackbone(PackedBackbone):
    """A velocity model on packed latents, conditioned on prompt tokens and a pooled embedding."""

    lora_targets = JOINT_ATTENTION
    repeated_blocks = ("FluxTransformerBlock", "FluxSingleTransformerBlock")
    blocks = (Blocks("transformer_blocks"), Blocks("single_transformer_blocks"))
    prompt_arguments: ClassVar[tuple[str, ...]] = ("encoder_hidden_states", "pooled_projections")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Made once: a step would spend ten operations on them.
        self.image_ids, self.text_ids = (ids.to(self.device) for ids in self.position_ids())

    def position_ids(self) -> tuple[Tensor, Tensor]:
        """Positions (L, A) of the image's tokens and of a prompt's, on the model's axes."""
        return image_ids(self.grid), torch.zeros(1, 3).expand(LONGEST_PROMPT, -1)

    def fixed_arguments(self, conditioning: Conditioning) -> dict[str, Any]:
        length = conditioning.tensors["encoder_hidden_states"].shape[1]
        return {"img_ids": self.image_ids, "txt_ids": self.text_ids[:length]}

    def block_arguments(self) -> nn.Module:
        return Positions(self.model, *self.position_ids())

    def transition_table(self, config: SamplerConfig) -> TransitionTable:
        if config.guidance_scale > 1 and self.model.config["guidance_embeds"]:
            warnings.warn(
                f"guidance_scale={config.guidance_scale} is classifier-free guidance, a second forward of "
                "every step (diffusers' true_cfg_scale); what FLUX calls guidance_scale the model is told: "
                f"PipelineSettings(embedded_guidance={config.guidance_scale}), --pipeline.embedded-guidance",
                stacklevel=2,
            )
        return super().transition_table(config)

    def schedule_arguments(self, num_steps: int) -> dict[str, Any]:
        return linear_schedule(self.scheduler, num_steps, self.image_tokens)


def image_ids(grid: tuple[int, int]) -> Tensor:
    """(L, 3) float32: 0, row and column of every patch."""
    rows, columns = torch.meshgrid(*(torch.arange(float(count)) for count in grid), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1)


class Positions(nn.Module):
    """Rotary embeddings of prompt and image, for a branch's blocks."""

    image_ids: Tensor
    text_ids: Tensor

    def __init__(self, model: Any, image_ids: Tensor, text_ids: Tensor) -> None:
        super().__init__()
        self.embed = merged_copy(model.pos_embed)
        self.register_buffer("image_ids", image_ids, persistent=False)
        self.register_buffer("text_ids", text_ids, persistent=False)

    def forward(self, features: Features, conditioning: Conditioning) -> dict[str, Any]:
        streams = (features[name] for name in ("encoder_hidden_states", "hidden_states") if name in features)
        length = sum(stream.shape[1] for stream in streams) - len(self.image_ids)
        ids = torch.cat([self.text_ids[:length], self.image_ids])
        return {"image_rotary_emb": self.embed(ids)}


FLUX_PIPELINES = PackedPipelines(
    backbone_class=FluxBackbone,
    text_parts=("text_encoder", "text_encoder_2"),
    prompt_options={"prompt_2": None},
    prompt_outputs={"encoder_hidden_states": 0, "pooled_projections": 1},
    sequence_length=512,
    longest_prompt=512,
    embedded_guidance=3.5,
)
"""FluxPipeline: FLUX.1 dev (guidance embedding) and schnell."""
