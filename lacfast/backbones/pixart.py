"""PixArt-Sigma: diffusers' PixArtTransformer2DModel as actor and as critic trunk."""

from __future__ import annotations

from typing import Any

from lacfast.backbones.pipelines import UNDER_MASK, PipelineFamily
from lacfast.backbones.scheduler_choice import ddim_scheduler
from lacfast.backbones.transformer import CrossAttentionBackbone
from lacfast.records import Conditioning


class PixArtBackbone(CrossAttentionBackbone):
    """An epsilon model with a learnt variance behind its prediction."""

    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    repeated_blocks = ("BasicTransformerBlock",)

    def fixed_arguments(self, conditioning: Conditioning) -> dict[str, Any]:
        return {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}


PIXART_PIPELINES = PipelineFamily(
    backbone_class=PixArtBackbone,
    # As in the pipeline's own call.
    prompt_options={"clean_caption": True},
    **UNDER_MASK,
    scheduler=ddim_scheduler,
)
"""PixArtSigmaPipeline."""
