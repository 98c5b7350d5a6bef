"""SD3's transformer (MMDiT): diffusers' SD3Transformer2DModel as actor and as critic trunk."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from lacfast.backbones.latent import LatentBackbone
from lacfast.backbones.taps import Tap, record_taps, thirds
from lacfast.backbones.trunks import SharedTrunk
from lacfast.protocols import Features, Trunk
from lacfast.records import Conditioning


class SD3Backbone(LatentBackbone):
    """A velocity model on latents (C, H, W), conditioned on prompt tokens and a pooled embedding."""

    def conditioning(self, tokens: Tensor, pooled: Tensor) -> Conditioning:
        return Conditioning({"encoder_hidden_states": tokens, "pooled_projections": pooled})

    def predict_with(
        self, model: nn.Module, sample: Tensor, timestep: Tensor, conditioning: Conditioning
    ) -> Tensor:
        output: Tensor = model(sample, timestep=timestep, **conditioning.tensors, return_dict=False)[0]
        return output

    def shared_trunk(self) -> SharedTrunk:
        dim = self.model.inner_dim
        blocks = thirds(len(self.model.transformer_blocks))
        return SharedTrunk({f"block_{block}": (_block_output(block), dim) for block in blocks})

    def branch_trunk(self, num_blocks: int) -> Trunk:
        return BranchTrunk(self.model, num_blocks)


def _block_output(block: int) -> Tap:
    """The image tokens (B, L, D) behind a block, which returns (prompt tokens, image tokens)."""

    def read(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Features:
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
            copy.deepcopy(block) for block in model.transformer_blocks[self.first_block :]
        )
        self.blocks.requires_grad_(True)
        self.tap_dims = (model.inner_dim,) * (num_blocks + 1)

    def record(self, model: nn.Module, *, detach: bool = True) -> AbstractContextManager[Features]:
        def read(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Features:
            return {name: kwargs[name] for name in ("hidden_states", "encoder_hidden_states", "temb")}

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
