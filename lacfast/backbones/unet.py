"""Stable Diffusion 1.x and 2.x: diffusers' UNet2DConditionModel as actor and as critic trunk."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import Any, ClassVar

from torch import Tensor, nn

from lacfast.backbones.latent import LatentBackbone
from lacfast.backbones.lora import merged_copy
from lacfast.backbones.pipelines import PipelineFamily
from lacfast.backbones.scheduler_choice import ddim_scheduler
from lacfast.backbones.taps import Tap, blocks_at, feature_map_tokens, record_taps
from lacfast.backbones.trunks import SharedTrunk
from lacfast.critic.trunk import Features, Trunk
from lacfast.records import Conditioning


class UNetBackbone(LatentBackbone):
    """A model on latents (C, H, W) with cross-attention to prompt tokens."""

    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    repeated_blocks = ("BasicTransformerBlock", "ResnetBlock2D")
    prompt_arguments: ClassVar[tuple[str, ...]] = ("encoder_hidden_states",)

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        """Arguments as LatentBackbone.

        Raises:
            ValueError: for a UNet that wants more than latents, timestep and prompt.
        """
        _require_known_inputs(model)
        super().__init__(model, *args, **kwargs)

    def predict_with(
        self, model: nn.Module, sample: Tensor, timestep: Tensor, conditioning: Conditioning
    ) -> Tensor:
        output: Tensor = model(sample, timestep, **conditioning.tensors, return_dict=False)[0]
        return output

    def shared_trunk(self, fractions: tuple[float, ...] | None = None) -> SharedTrunk:
        widths = _up_widths(self.model)
        names = ["mid_block"] + [f"up_blocks.{level}" for level in range(len(widths))]
        maps = list(zip(names, (widths[0], *widths), strict=True))
        # Depth counts from the middle: the down path has not seen the whole picture.
        chosen = range(len(maps)) if fractions is None else blocks_at(len(maps), fractions)
        return SharedTrunk(
            {name: (_output_map(name), dim) for name, dim in (maps[level] for level in chosen)}
        )

    def branch_trunk(self, num_blocks: int) -> Trunk:
        return BranchTrunk(self.model, num_blocks)


def _require_known_inputs(model: Any) -> None:
    config, name = model.config, type(model).__name__
    if config.time_cond_proj_dim is not None:
        raise ValueError(
            f"the {name} takes guidance as an embedding (time_cond_proj_dim={config.time_cond_proj_dim}), as "
            "models distilled by LCM do; load the model that it was distilled from"
        )
    if config.in_channels != config.out_channels:
        raise ValueError(
            f"the {name} takes {config.in_channels} channels and gives {config.out_channels}: it inpaints or "
            "edits; load a model that makes images from prompts alone"
        )
    if config.encoder_hid_dim_type is not None:
        raise ValueError(
            f"the {name} takes images beside the prompt "
            f"(encoder_hid_dim_type={config.encoder_hid_dim_type!r}); "
            "call pipeline.unload_ip_adapter(), or load a model without it"
        )


def _up_widths(model: Any) -> tuple[int, ...]:
    """Channels behind each up block."""
    return tuple(reversed(model.config["block_out_channels"]))


def _output_map(name: str) -> Tap:
    """The feature map behind a block, as tokens (B, H W, C)."""

    def read(arguments: dict[str, Any], output: Any) -> Features:
        return {name: feature_map_tokens(output)}

    return Tap(name, read)


def _skips(level: int) -> Tap:
    """The down path's feature maps that an up block takes."""

    def read(arguments: dict[str, Any], output: Any) -> Features:
        skips = arguments["res_hidden_states_tuple"]
        return {f"up_{level}_skip_{index}": skip for index, skip in enumerate(skips)}

    return Tap(f"up_blocks.{level}", read)


def _down_path(arguments: dict[str, Any], output: Any) -> Features:
    return {name: arguments[name] for name in ("hidden_states", "temb")}


class BranchTrunk(Trunk):
    """The actor's down path, then own copies of its mid block and of the first `num_blocks` up blocks."""

    def __init__(self, model: Any, num_blocks: int) -> None:
        super().__init__()
        depth = len(model.up_blocks)
        if num_blocks > depth:
            raise ValueError(
                f"num_blocks={num_blocks} of the critic's branch exceeds the model's {depth} up blocks"
            )
        widths = _up_widths(model)
        self.mid_block = merged_copy(model.mid_block)
        self.up_blocks = nn.ModuleList(merged_copy(block) for block in model.up_blocks[:num_blocks])
        self.depth = depth
        self.taps = [Tap("mid_block", _down_path)] + [_skips(level) for level in range(num_blocks)]
        self.tap_dims = (widths[0], *widths[:num_blocks])

    def record(self, model: nn.Module, *, detach: bool = True) -> AbstractContextManager[Features]:
        return record_taps(model, self.taps, detach=detach)

    def forward(
        self, features: Features, sample: Tensor, timestep: Tensor, conditioning: Conditioning
    ) -> list[Tensor]:
        temb = features["temb"]
        prompt = conditioning.tensors["encoder_hidden_states"]
        hidden = _run(self.mid_block, prompt, features["hidden_states"], temb)
        taps = [feature_map_tokens(hidden)]
        up_blocks: Any = self.up_blocks
        for level, block in enumerate(up_blocks):
            skips = tuple(features[f"up_{level}_skip_{index}"] for index in range(len(block.resnets)))
            size = _odd_size(sample, self.depth - 1, level)
            hidden = _run(block, prompt, hidden, temb=temb, res_hidden_states_tuple=skips, upsample_size=size)
            taps.append(feature_map_tokens(hidden))
        return taps


def _odd_size(sample: Tensor, halvings: int, level: int) -> tuple[int, ...] | None:
    """(height, width) behind up block `level`, which it is told where doubling would miss it."""
    sides = sample.shape[-2:]
    if level == halvings or not any(side % 2**halvings for side in sides):
        return None
    return tuple(math.ceil(side / 2 ** (halvings - 1 - level)) for side in sides)


def _run(block: Any, prompt: Tensor, *args: Tensor, **kwargs: Any) -> Tensor:
    """Run a mid or up block; one without cross-attention does not take the prompt."""
    if getattr(block, "has_cross_attention", False):
        kwargs["encoder_hidden_states"] = prompt
    output: Tensor = block(*args, **kwargs)
    return output


SD15_PIPELINES = PipelineFamily(
    backbone_class=UNetBackbone,
    model_part="unet",
    prompt_options={"num_images_per_prompt": 1},
    prompt_outputs={"encoder_hidden_states": 0},
    negative_outputs={"encoder_hidden_states": 1},
    empty_prompt=None,
    scheduler=ddim_scheduler,
)
"""StableDiffusionPipeline: SD 1.x and 2.x, epsilon and v prediction."""
