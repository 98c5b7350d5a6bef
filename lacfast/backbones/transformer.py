"""Transformers as actor and as critic trunk: a family tells as data how its model is called and cut."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lacfast.backbones.latent import LatentBackbone
from lacfast.backbones.lora import merged_copy
from lacfast.backbones.parts import Embeddings
from lacfast.backbones.taps import THIRDS, Tap, blocks_at, record_taps
from lacfast.backbones.trunks import SharedTrunk
from lacfast.critic.trunk import Features, Trunk
from lacfast.records import Conditioning

JOINT_ATTENTION: tuple[str, ...] = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
)
"""All projections of an attention over prompt and image: flow_grpo's LoRA of SD3.5, FLUX and Qwen-Image."""


@dataclass(frozen=True)
class Blocks:
    """A list of blocks that a model repeats, and how it calls them."""

    name: str
    """The model's attribute."""
    streams: tuple[str, ...] = ("encoder_hidden_states", "hidden_states")
    """Arguments (B, L, D) that a block takes and gives back changed, in the order in which it returns them;
    the last one has the image's tokens."""
    inputs: tuple[str, ...] = ("temb",)
    """Further arguments (B, ...), the same for all blocks; those that are None are left out."""
    prompt_at: str = "elsewhere"
    """Where the prompt's tokens are: "elsewhere", or in the image's stream, "before" or "behind" it."""

    def streams_of(self, output: Any) -> dict[str, Tensor]:
        """What a block returned, by the arguments of the next one."""
        return dict(zip(self.streams, output if isinstance(output, tuple) else (output,), strict=True))

    def image_tokens(self, streams: dict[str, Tensor], count: int) -> Tensor:
        """The image's `count` tokens (B, L, D)."""
        tokens = streams[self.streams[-1]]
        if self.prompt_at == "elsewhere":
            return tokens
        return tokens[:, -count:] if self.prompt_at == "before" else tokens[:, :count]


class TransformerBackbone(LatentBackbone):
    """A transformer whose blocks keep a token for every patch of the latent map."""

    blocks: ClassVar[tuple[Blocks, ...]]
    """The model's lists of blocks, in the order in which they run."""

    @property
    def time_unit(self) -> float:
        """Timesteps of the schedule that are 1 to the model."""
        return 1.0

    @property
    def width(self) -> int:
        """D of the blocks' tokens."""
        width: int = self.model.inner_dim
        return width

    @property
    def image_tokens(self) -> int:
        """Tokens of an image in the blocks."""
        _, *sides = self.latent_shape
        patch = self.model.config["patch_size"]
        patches = (patch,) * len(sides) if isinstance(patch, int) else patch
        return math.prod(side // step for side, step in zip(sides, patches, strict=True))

    def fixed_arguments(self, conditioning: Conditioning) -> dict[str, Any]:
        """What the model takes that is the same for all samples."""
        return {}

    def block_arguments(self) -> nn.Module | None:
        """A module that makes what the last blocks take besides streams and inputs, for a branch.

        It has no weights and gets a branch's features and conditioning.
        """
        return None

    def predict_with(
        self, model: nn.Module, sample: Tensor, timestep: Tensor, conditioning: Conditioning
    ) -> Tensor:
        output: Tensor = model(
            sample,
            timestep=timestep if self.time_unit == 1 else timestep / self.time_unit,
            **self.fixed_arguments(conditioning),
            **conditioning.tensors,
            return_dict=False,
        )[0]
        return self.prediction(output)

    def shared_trunk(self, fractions: tuple[float, ...] | None = None) -> SharedTrunk:
        named = [
            (f"{blocks.name}.{index}", blocks)
            for blocks in self.blocks
            for index in range(len(getattr(self.model, blocks.name)))
        ]
        chosen = [named[block] for block in blocks_at(len(named), fractions or THIRDS)]
        taps = {name: _block_output(name, blocks, self.image_tokens) for name, blocks in chosen}
        return SharedTrunk({name: (tap, self.width) for name, tap in taps.items()})

    def branch_trunk(self, num_blocks: int) -> Trunk:
        return BranchTrunk(
            self.model, self.blocks[-1], num_blocks, self.width, self.image_tokens, self.block_arguments()
        )


def _block_output(name: str, blocks: Blocks, count: int) -> Tap:
    """The image's tokens (B, L, D) behind a block."""

    def read(arguments: dict[str, Any], output: Any) -> Features:
        return {name: blocks.image_tokens(blocks.streams_of(output), count)}

    return Tap(name, read)


class BranchTrunk(Trunk):
    """The actor up to its last blocks, then own copies of those, initialised from the actor."""

    def __init__(
        self,
        model: Any,
        cut: Blocks,
        num_blocks: int,
        width: int,
        image_tokens: int,
        arguments: nn.Module | None,
    ) -> None:
        """
        Args:
            model: the actor.
            cut: its last list of blocks.
            num_blocks: how many of them are copied.
            width: D of their tokens.
            image_tokens: of an image.
            arguments: see TransformerBackbone.block_arguments.

        Raises:
            ValueError: for more blocks than there are.
        """
        super().__init__()
        blocks = getattr(model, cut.name)
        if num_blocks > len(blocks):
            raise ValueError(
                f"num_blocks={num_blocks} of the critic's branch exceeds the model's {len(blocks)} blocks in "
                f"{cut.name}"
            )
        self.cut = cut
        self.first_block = len(blocks) - num_blocks
        self.blocks = nn.ModuleList(merged_copy(block) for block in blocks[self.first_block :])
        self.image_tokens = image_tokens
        self.arguments = arguments
        self.tap_dims = (width,) * (num_blocks + 1)

    def record(self, model: nn.Module, *, detach: bool = True) -> AbstractContextManager[Features]:
        def read(arguments: dict[str, Any], output: Any) -> Features:
            names = (*self.cut.streams, *self.cut.inputs)
            return {name: arguments[name] for name in names if arguments.get(name) is not None}

        return record_taps(model, [Tap(f"{self.cut.name}.{self.first_block}", read)], detach=detach)

    def forward(
        self, features: Features, sample: Tensor, timestep: Tensor, conditioning: Conditioning
    ) -> list[Tensor]:
        streams = {name: features[name] for name in self.cut.streams}
        inputs = {name: features[name] for name in self.cut.inputs if name in features}
        if self.arguments is not None:
            inputs |= self.arguments(features, conditioning)
        taps = [self.cut.image_tokens(streams, self.image_tokens)]
        for block in self.blocks:
            streams = self.cut.streams_of(block(**streams, **inputs))
            taps.append(self.cut.image_tokens(streams, self.image_tokens))
        return taps


class PackedBackbone(TransformerBackbone):
    """A model on packed latents (L, D): one token per 2x2 patch of the latent map."""

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

    @property
    def time_unit(self) -> float:
        return 1000.0

    @property
    def image_tokens(self) -> int:
        return self.latent_shape[0]

    def conditioning(self, embeddings: Embeddings) -> Conditioning:
        told = super().conditioning(embeddings)
        if self.model.config["guidance_embeds"]:
            device = told.tensors["encoder_hidden_states"].device
            told.tensors["guidance"] = torch.full((len(told),), self.embedded_guidance, device=device)
        return told


def unpacked(latents: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, L, 4 C) to (B, C, 2 rows, 2 columns): every token holds a 2x2 patch, channel first."""
    rows, columns = grid
    patches = latents.view(len(latents), rows, columns, -1, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(len(latents), -1, 2 * rows, 2 * columns)


class CrossAttentionBackbone(TransformerBackbone):
    """A model on latents (C, H, W) whose blocks read the prompt's tokens under a mask."""

    prompt_arguments: ClassVar[tuple[str, ...]] = ("encoder_hidden_states", "encoder_attention_mask")
    blocks = (
        Blocks(
            "transformer_blocks",
            streams=("hidden_states",),
            inputs=("encoder_hidden_states", "encoder_attention_mask", "timestep"),
        ),
    )

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        config = model.config
        if config["out_channels"] == 2 * config["in_channels"]:
            # Behind its prediction a model may give a variance, which no sampler here reads.
            self.prediction = partial(first_channels, count=config["in_channels"])

    @property
    def width(self) -> int:
        width: int = self.model.config["num_attention_heads"] * self.model.config["attention_head_dim"]
        return width


def first_channels(output: Tensor, *, count: int) -> Tensor:
    return output[:, :count]
