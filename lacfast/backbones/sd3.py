"""Stable Diffusion 3 and 3.5: diffusers' SD3Transformer2DModel (MMDiT) as actor and as critic trunk."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from lacfast.backbones.latent import LatentBackbone
from lacfast.backbones.lora import merged_copy
from lacfast.backbones.pipelines import (
    Embeddings,
    PipelineFamily,
    PipelineSettings,
    dynamic_shift,
    encoder_device,
    latent_map,
)
from lacfast.backbones.taps import THIRDS, Tap, blocks_at, record_taps
from lacfast.backbones.trunks import SharedTrunk
from lacfast.critic.trunk import Features, Trunk
from lacfast.records import Conditioning


class SD3Backbone(LatentBackbone):
    """A velocity model on latents (C, H, W), conditioned on prompt tokens and a pooled embedding."""

    # flow_grpo's choice for SD3.5: all projections of the joint attention.
    lora_targets = (
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
    )
    repeated_blocks = ("JointTransformerBlock",)

    def conditioning(self, tokens: Tensor, pooled: Tensor) -> Conditioning:
        return Conditioning({"encoder_hidden_states": tokens, "pooled_projections": pooled})

    def predict_with(
        self, model: nn.Module, sample: Tensor, timestep: Tensor, conditioning: Conditioning
    ) -> Tensor:
        output: Tensor = model(sample, timestep=timestep, **conditioning.tensors, return_dict=False)[0]
        return output

    def shared_trunk(self, fractions: tuple[float, ...] | None = None) -> SharedTrunk:
        dim = self.model.inner_dim
        blocks = blocks_at(len(self.model.transformer_blocks), fractions or THIRDS)
        return SharedTrunk({f"block_{block}": (_block_output(block), dim) for block in blocks})

    def branch_trunk(self, num_blocks: int) -> Trunk:
        return BranchTrunk(self.model, num_blocks)

    def schedule_arguments(self, num_steps: int) -> dict[str, Any]:
        patch = self.model.config["patch_size"]
        _, height, width = self.latent_shape
        tokens = (height // patch) * (width // patch)
        return dynamic_shift(self.scheduler, tokens, max_shift=1.16)


def _block_output(block: int) -> Tap:
    """The image tokens (B, L, D) behind a block, which returns (prompt tokens, image tokens)."""

    def read(arguments: dict[str, Any], output: Any) -> Features:
        return {f"block_{block}": output[1]}

    return Tap(f"transformer_blocks.{block}", read)


class BranchTrunk(Trunk):
    """The actor's lower blocks, then own copies of its last blocks, initialised from the actor."""

    def __init__(self, model: Any, num_blocks: int) -> None:
        super().__init__()
        depth = len(model.transformer_blocks)
        if num_blocks > depth:
            raise ValueError(
                f"num_blocks={num_blocks} of the critic's branch exceeds the model's {depth} blocks"
            )
        self.first_block = depth - num_blocks
        self.blocks = nn.ModuleList(
            merged_copy(block) for block in model.transformer_blocks[self.first_block :]
        )
        self.tap_dims = (model.inner_dim,) * (num_blocks + 1)

    def record(self, model: nn.Module, *, detach: bool = True) -> AbstractContextManager[Features]:
        def read(arguments: dict[str, Any], output: Any) -> Features:
            return {name: arguments[name] for name in ("hidden_states", "encoder_hidden_states", "temb")}

        return record_taps(model, [Tap(f"transformer_blocks.{self.first_block}", read)], detach=detach)

    def forward(
        self, features: Features, sample: Tensor, timestep: Tensor, conditioning: Conditioning
    ) -> list[Tensor]:
        hidden, encoder_hidden = features["hidden_states"], features["encoder_hidden_states"]
        taps = [hidden]
        for block in self.blocks:
            encoder_hidden, hidden = block(
                hidden_states=hidden, encoder_hidden_states=encoder_hidden, temb=features["temb"]
            )
            taps.append(hidden)
        return taps


class SD3Pipelines(PipelineFamily):
    """StableDiffusion3Pipeline: SD3, SD3.5 medium and large."""

    model_part = "transformer"
    text_parts = ("text_encoder", "text_encoder_2", "text_encoder_3")

    def encode(self, pipeline: Any, prompts: list[str], settings: PipelineSettings) -> Embeddings:
        tokens, _, pooled, _ = _encode_prompt(pipeline, prompts, settings, guided=False)
        return tokens, pooled

    def encode_unconditional(self, pipeline: Any, settings: PipelineSettings) -> Embeddings:
        _, tokens, _, pooled = _encode_prompt(pipeline, [""], settings, guided=True)
        return tokens, pooled

    def latent_map(self, pipeline: Any, resolution: tuple[int, int]) -> tuple[int, ...]:
        config = pipeline.transformer.config
        return latent_map(pipeline, config.in_channels, resolution, multiple=config.patch_size)

    def backbone(
        self, pipeline: Any, settings: PipelineSettings, map_shape: tuple[int, ...], **shared: Any
    ) -> LatentBackbone:
        return SD3Backbone(pipeline.transformer, latent_shape=map_shape, **shared)


def _encode_prompt(
    pipeline: Any, prompts: list[str], settings: PipelineSettings, *, guided: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    embeddings: tuple[Tensor, Tensor, Tensor, Tensor] = pipeline.encode_prompt(
        prompt=prompts,
        prompt_2=None,
        prompt_3=None,
        device=encoder_device(pipeline.text_encoder),
        do_classifier_free_guidance=guided,
        negative_prompt=settings.negative_prompts,
        max_sequence_length=settings.max_sequence_length or 256,
    )
    return embeddings
