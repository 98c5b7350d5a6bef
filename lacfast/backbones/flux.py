"""FLUX.1: diffusers' FluxTransformer2DModel on packed latents as actor and as critic trunk."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
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


class FluxBackbone(LatentBackbone):
    """A velocity model on packed latents (L, D): one token per 2x2 patch of the latent map."""

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
    repeated_blocks = ("FluxTransformerBlock", "FluxSingleTransformerBlock")

    def __init__(
        self, model: Any, *args: Any, grid: tuple[int, int], embedded_guidance: float, **kwargs: Any
    ) -> None:
        """Arguments as LatentBackbone, and

        Args:
            grid: rows and columns of the patches.
            embedded_guidance: told to a distilled model; one without guidance embedding ignores it.
        """
        super().__init__(model, *args, **kwargs)
        self.grid = grid
        self.latent_maps = partial(unpacked, grid=grid)
        self.embedded_guidance = embedded_guidance
        # Made once: a step would spend ten operations on them.
        self.image_ids = image_ids(grid).to(self.device)
        self.text_id = torch.zeros(1, 3, device=self.device)

    def conditioning(self, tokens: Tensor, pooled: Tensor) -> Conditioning:
        tensors = {"encoder_hidden_states": tokens, "pooled_projections": pooled}
        if self.model.config["guidance_embeds"]:
            tensors["guidance"] = torch.full((len(tokens),), self.embedded_guidance, device=tokens.device)
        return Conditioning(tensors)

    def predict_with(
        self, model: nn.Module, sample: Tensor, timestep: Tensor, conditioning: Conditioning
    ) -> Tensor:
        tokens = conditioning.tensors["encoder_hidden_states"]
        output: Tensor = model(
            sample,
            timestep=timestep / 1000,
            img_ids=self.image_ids,
            txt_ids=self.text_id.expand(tokens.shape[1], -1),
            **conditioning.tensors,
            return_dict=False,
        )[0]
        return output

    def shared_trunk(self, fractions: tuple[float, ...] | None = None) -> SharedTrunk:
        double, single = len(self.model.transformer_blocks), len(self.model.single_transformer_blocks)
        names = [f"transformer_blocks.{index}" for index in range(double)]
        names += [f"single_transformer_blocks.{index}" for index in range(single)]
        dim = self.model.inner_dim
        blocks = blocks_at(len(names), fractions or THIRDS)
        return SharedTrunk({names[block]: (_block_output(names[block]), dim) for block in blocks})

    def branch_trunk(self, num_blocks: int) -> Trunk:
        return BranchTrunk(self.model, num_blocks, self.grid)

    def schedule_arguments(self, num_steps: int) -> dict[str, Any]:
        sigmas = torch.linspace(1, 1 / num_steps, num_steps, dtype=torch.float64)
        return {"sigmas": sigmas} | dynamic_shift(self.scheduler, self.latent_shape[0], max_shift=1.15)


def unpacked(latents: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, L, 4 C) to (B, C, 2 rows, 2 columns): every token holds a 2x2 patch, channel first."""
    rows, columns = grid
    patches = latents.view(len(latents), rows, columns, -1, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(len(latents), -1, 2 * rows, 2 * columns)


def image_ids(grid: tuple[int, int]) -> Tensor:
    """(L, 3) float32: 0, row and column of every patch."""
    rows, columns = torch.meshgrid(*(torch.arange(float(count)) for count in grid), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1)


def _block_output(name: str) -> Tap:
    """The image tokens (B, L, D) behind a block, which returns (prompt tokens, image tokens)."""

    def read(arguments: dict[str, Any], output: Any) -> Features:
        return {name: output[1]}

    return Tap(name, read)


class BranchTrunk(Trunk):
    """The actor up to its last single blocks, then own copies of those, initialised from the actor."""

    image_ids: Tensor

    def __init__(self, model: Any, num_blocks: int, grid: tuple[int, int]) -> None:
        super().__init__()
        depth = len(model.single_transformer_blocks)
        if num_blocks > depth:
            raise ValueError(
                f"num_blocks={num_blocks} of the critic's branch exceeds the model's {depth} single blocks"
            )
        self.first_block = depth - num_blocks
        self.blocks = nn.ModuleList(
            merged_copy(block) for block in model.single_transformer_blocks[self.first_block :]
        )
        # Rotary embeddings have no weights.
        self.pos_embed = merged_copy(model.pos_embed)
        self.register_buffer("image_ids", image_ids(grid), persistent=False)
        self.tap_dims = (model.inner_dim,) * (num_blocks + 1)

    def record(self, model: nn.Module, *, detach: bool = True) -> AbstractContextManager[Features]:
        def read(arguments: dict[str, Any], output: Any) -> Features:
            return {name: arguments[name] for name in ("hidden_states", "encoder_hidden_states", "temb")}

        return record_taps(model, [Tap(f"single_transformer_blocks.{self.first_block}", read)], detach=detach)

    def forward(
        self, features: Features, sample: Tensor, timestep: Tensor, conditioning: Conditioning
    ) -> list[Tensor]:
        hidden, encoder_hidden = features["hidden_states"], features["encoder_hidden_states"]
        # A prompt's tokens are all at 0.
        text_ids = self.image_ids.new_zeros((encoder_hidden.shape[1], 3))
        rotary = self.pos_embed(torch.cat([text_ids, self.image_ids]))
        taps = [hidden]
        for block in self.blocks:
            encoder_hidden, hidden = block(
                hidden_states=hidden,
                encoder_hidden_states=encoder_hidden,
                temb=features["temb"],
                image_rotary_emb=rotary,
            )
            taps.append(hidden)
        return taps


class FluxPipelines(PipelineFamily):
    """FluxPipeline: FLUX.1 dev (guidance embedding) and schnell."""

    model_part = "transformer"
    text_parts = ("text_encoder", "text_encoder_2")

    def encode(self, pipeline: Any, prompts: list[str], settings: PipelineSettings) -> Embeddings:
        tokens, pooled, _ = pipeline.encode_prompt(
            prompt=prompts,
            prompt_2=None,
            device=encoder_device(pipeline.text_encoder),
            max_sequence_length=settings.max_sequence_length or 512,
        )
        return tokens, pooled

    def encode_unconditional(self, pipeline: Any, settings: PipelineSettings) -> Embeddings:
        return self.encode(pipeline, [settings.negative_prompt or ""], settings)

    def latent_map(self, pipeline: Any, resolution: tuple[int, int]) -> tuple[int, ...]:
        return latent_map(pipeline, pipeline.transformer.config.in_channels // 4, resolution, multiple=2)

    def backbone(
        self, pipeline: Any, settings: PipelineSettings, map_shape: tuple[int, ...], **shared: Any
    ) -> LatentBackbone:
        channels, height, width = map_shape
        grid = (height // 2, width // 2)
        return FluxBackbone(
            pipeline.transformer,
            latent_shape=(grid[0] * grid[1], 4 * channels),
            grid=grid,
            embedded_guidance=settings.embedded_guidance,
            **shared,
        )

    def unpack(self, latents: Tensor, map_shape: tuple[int, ...]) -> Tensor:
        _, height, width = map_shape
        return unpacked(latents, (height // 2, width // 2))
