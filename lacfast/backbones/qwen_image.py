"""Qwen-Image: diffusers' QwenImageTransformer2DModel on packed latents as actor and as critic trunk."""

from __future__ import annotations

from typing import Any

from diffusers.models.transformers import transformer_qwenimage
from torch import Tensor, nn

from lacfast.backbones.lora import merged_copy
from lacfast.backbones.pipelines import PackedPipelines, linear_schedule
from lacfast.backbones.transformer import JOINT_ATTENTION, Blocks, PackedBackbone
from lacfast.critic.trunk import Features
from lacfast.records import Conditioning


class QwenImageBackbone(PackedBackbone):
    """A velocity model on packed latents, conditioned on a prompt's tokens and on which of them it has."""

    lora_targets = JOINT_ATTENTION
    repeated_blocks = ("QwenImageTransformerBlock",)
    blocks = (Blocks("transformer_blocks", inputs=("temb", "encoder_hidden_states_mask")),)
    prompt_arguments = ("encoder_hidden_states", "encoder_hidden_states_mask")
    rescales_guidance = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # diffusers' own makes a tensor of a Python number, for a length nobody reads: no graph can hold it.
        transformer_qwenimage.compute_text_seq_len_from_mask = _text_length

    def fixed_arguments(self, conditioning: Conditioning) -> dict[str, Any]:
        return {"img_shapes": [[(1, *self.grid)]]}

    def block_arguments(self) -> nn.Module:
        return Positions(self.model, self.grid)

    def schedule_arguments(self, num_steps: int) -> dict[str, Any]:
        return linear_schedule(self.scheduler, num_steps, self.image_tokens)


def _text_length(
    encoder_hidden_states: Tensor, encoder_hidden_states_mask: Tensor | None
) -> tuple[int, Tensor | None, Tensor | None]:
    """Length of the prompts' tokens (B, L, D), nothing, and their mask (B, L) as bool."""
    mask = encoder_hidden_states_mask
    return encoder_hidden_states.shape[1], None, None if mask is None else mask.bool()


class Positions(nn.Module):
    """Rotary embeddings of prompt and image, for a branch's blocks."""

    def __init__(self, model: Any, grid: tuple[int, int]) -> None:
        super().__init__()
        self.embed = merged_copy(model.pos_embed)
        self.grid = grid

    def forward(self, features: Features, conditioning: Conditioning) -> dict[str, Any]:
        tokens = features["encoder_hidden_states"]
        embeddings = self.embed([[(1, *self.grid)]], max_txt_seq_len=tokens.shape[1], device=tokens.device)
        return {"image_rotary_emb": embeddings}


QWEN_IMAGE_PIPELINES = PackedPipelines(
    backbone_class=QwenImageBackbone,
    prompt_outputs={"encoder_hidden_states": 0},
    # As its authors write no negative prompt.
    empty_prompt=" ",
    sequence_length=512,
    longest_prompt=1024,
    token_width="joint_attention_dim",
    mask="encoder_hidden_states_mask",
    has_frames=True,
)
"""QwenImagePipeline: Qwen-Image and its later versions, with true classifier-free guidance."""
