"""Stable Diffusion 3 and 3.5: diffusers' SD3Transformer2DModel (MMDiT) as actor and as critic trunk."""

from __future__ import annotations

from typing import Any

from lacfast.backbones.pipelines import PipelineFamily, dynamic_shift
from lacfast.backbones.transformer import JOINT_ATTENTION, Blocks, TransformerBackbone


class SD3Backbone(TransformerBackbone):
    """A velocity model on latents (C, H, W), conditioned on prompt tokens and a pooled embedding."""

    lora_targets = JOINT_ATTENTION
    repeated_blocks = ("JointTransformerBlock",)
    blocks = (Blocks("transformer_blocks"),)
    prompt_arguments = ("encoder_hidden_states", "pooled_projections")

    def schedule_arguments(self, num_steps: int) -> dict[str, Any]:
        return dynamic_shift(self.scheduler, self.image_tokens, max_shift=1.16)


SD3_PIPELINES = PipelineFamily(
    backbone_class=SD3Backbone,
    text_parts=("text_encoder", "text_encoder_2", "text_encoder_3"),
    prompt_options={"prompt_2": None, "prompt_3": None},
    prompt_outputs={"encoder_hidden_states": 0, "pooled_projections": 2},
    negative_outputs={"encoder_hidden_states": 1, "pooled_projections": 3},
    empty_prompt=None,
    sequence_length=256,
    longest_prompt=512,
)
"""StableDiffusion3Pipeline: SD3, SD3.5 medium and large."""
