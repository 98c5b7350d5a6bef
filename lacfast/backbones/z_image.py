"""Z-Image: diffusers' ZImageTransformer2DModel as actor and as critic trunk, a batch at a time.

Its own forward takes lists and asks the host how long every prompt is. Here a batch is one tensor: prompts
are padded to one length under a mask, which also tells where a prompt ends and the image's positions begin.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lacfast.backbones.pipelines import PipelineFamily, linear_schedule
from lacfast.backbones.transformer import Blocks, TransformerBackbone
from lacfast.critic.trunk import Features
from lacfast.records import Conditioning

MULTIPLE = 32
"""Prompt and image are filled up with the model's padding tokens, which it attends to, to multiples of it."""
PATCH = 2
EMBEDDER = f"{PATCH}-1"


@dataclass(frozen=True)
class Layout:
    """Where the tokens of image and prompt stand."""

    image_rotary: Tensor
    """(B, L, D / 2) complex, L image tokens and their padding."""
    prompt_rotary: Tensor
    """(B, P, D / 2) complex"""
    prompt_mask: Tensor
    """(B, P) bool, a prompt's tokens and their padding."""

    @staticmethod
    def of(embedder: Any, mask: Tensor, grid: tuple[int, int]) -> Layout:
        """
        Args:
            embedder: the model's rotary embeddings.
            mask: (B, P) a prompt's own tokens.
            grid: rows and columns of the image's patches.
        """
        batch, length = mask.shape
        places = torch.arange(length, device=mask.device)
        filled = -(-mask.sum(dim=1) // MULTIPLE) * MULTIPLE
        prompt_ids = nn.functional.pad(places[:, None] + 1, (0, 2)).expand(batch, -1, -1)
        rows, columns = torch.meshgrid(
            *(torch.arange(count, device=mask.device) for count in grid), indexing="ij"
        )
        patches = torch.stack([rows, columns], dim=-1).flatten(0, 1).expand(batch, -1, -1)
        # The image comes behind its prompt in time.
        times = (filled + 1)[:, None, None].expand(-1, patches.shape[1], 1)
        image_ids = nn.functional.pad(
            torch.cat([times, patches], dim=2), (0, 0, 0, -patches.shape[1] % MULTIPLE)
        )
        image_rotary, prompt_rotary = (
            embedder(ids.flatten(0, 1)).unflatten(0, (batch, -1)) for ids in (image_ids, prompt_ids)
        )
        return Layout(image_rotary, prompt_rotary, places < filled[:, None])

    def joined(self) -> dict[str, Tensor]:
        """What the blocks take that have image and prompt in one stream."""
        image = torch.ones(self.image_rotary.shape[:2], dtype=torch.bool, device=self.prompt_mask.device)
        return {
            "attn_mask": torch.cat([image, self.prompt_mask], dim=1),
            "freqs_cis": torch.cat([self.image_rotary, self.prompt_rotary], dim=1),
        }


class BatchedForward:
    """What stands in for a model's `forward`; lists, as its pipeline gives them, it takes as before."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, x: Any, t: Tensor, cap_feats: Any, **arguments: Any) -> Any:
        if not isinstance(x, Tensor):
            return type(self.model).forward(self.model, x, t, cap_feats, **arguments)
        return (self.batched(x, t, *cap_feats),)

    def __deepcopy__(self, memo: dict[int, Any]) -> BatchedForward:
        return BatchedForward(copy.deepcopy(self.model, memo))

    def batched(self, sample: Tensor, time: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Output (B, C, H, W) of latents, times (B,), prompts' tokens (B, P, D) and their mask (B, P)."""
        model = self.model
        grid = (sample.shape[2] // PATCH, sample.shape[3] // PATCH)
        layout = Layout.of(model.rope_embedder, mask, grid)
        modulation = model.t_embedder(time * model.t_scale).type_as(sample)

        image = model.all_x_embedder[EMBEDDER](_patches(sample))
        count = image.shape[1]
        padding = model.x_pad_token.expand(len(image), -count % MULTIPLE, -1).to(image.dtype)
        image = self._run(
            "noise_refiner", torch.cat([image, padding], dim=1), None, layout.image_rotary, modulation
        )

        prompt = torch.where(mask[..., None], model.cap_embedder(tokens), model.cap_pad_token)
        prompt = self._run("context_refiner", prompt, layout.prompt_mask, layout.prompt_rotary)

        joined = layout.joined()
        hidden = torch.cat([image, prompt], dim=1)
        hidden = self._run("layers", hidden, joined["attn_mask"], joined["freqs_cis"], modulation)
        return _map(model.all_final_layer[EMBEDDER](hidden, c=modulation)[:, :count], grid)

    def _run(self, name: str, hidden: Tensor, *arguments: Tensor | None) -> Tensor:
        model = self.model
        for block in getattr(model, name):
            if torch.is_grad_enabled() and model.gradient_checkpointing:
                hidden = model._gradient_checkpointing_func(block, hidden, *arguments)
            else:
                hidden = block(hidden, *arguments)
        return hidden


def _patches(sample: Tensor) -> Tensor:
    """(B, C, H, W) to (B, L, 4 C), channel last."""
    batch, channels, height, width = sample.shape
    patches = sample.reshape(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def _map(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, L, 4 C) to (B, C, H, W)."""
    split = patches.reshape(len(patches), *grid, PATCH, PATCH, -1)
    return split.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


class ZImageBackbone(TransformerBackbone):
    """A velocity model on latents (C, H, W), whose time runs from noise at 0 to image at 1."""

    lora_targets = ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0")
    repeated_blocks = ("ZImageTransformerBlock",)
    blocks = (Blocks("layers", streams=("x",), inputs=("adaln_input",), prompt_at="behind"),)
    prompt_arguments = ("encoder_hidden_states", "encoder_hidden_states_mask")

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        self.grid = (self.latent_shape[1] // PATCH, self.latent_shape[2] // PATCH)
        # Its velocity points from noise to image.
        self.prediction = torch.neg
        if not isinstance(model.forward, BatchedForward):
            model.forward = BatchedForward(model)

    @property
    def width(self) -> int:
        width: int = self.model.dim
        return width

    @property
    def image_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    def predict_with(
        self, model: nn.Module, sample: Tensor, timestep: Tensor, conditioning: Conditioning
    ) -> Tensor:
        prompt = tuple(conditioning.tensors[name] for name in self.prompt_arguments)
        return self.prediction(model(sample, (1000 - timestep) / 1000, prompt, return_dict=False)[0])

    def block_arguments(self) -> nn.Module:
        return Positions(self.model, self.grid)

    def schedule_arguments(self, num_steps: int) -> dict[str, Any]:
        return linear_schedule(self.scheduler, num_steps, self.image_tokens)


class Positions(nn.Module):
    """Mask and rotary embeddings of image and prompt, for a branch's blocks."""

    def __init__(self, model: Any, grid: tuple[int, int]) -> None:
        super().__init__()
        self.embed = copy.deepcopy(model.rope_embedder)
        self.grid = grid

    def forward(self, features: Features, conditioning: Conditioning) -> dict[str, Any]:
        mask = conditioning.tensors["encoder_hidden_states_mask"]
        return dict(Layout.of(self.embed, mask, self.grid).joined())


Z_IMAGE_PIPELINES = PipelineFamily(
    backbone_class=ZImageBackbone,
    prompt_options={"do_classifier_free_guidance": False},
    prompt_outputs={"encoder_hidden_states": 0},
    sequence_length=512,
    token_width="cap_feat_dim",
    mask="encoder_hidden_states_mask",
    pads_to=MULTIPLE,
    multiple=PATCH,
    resolution=(1024, 1024),
)
"""ZImagePipeline: Z-Image and, as far as a distilled model can be trained, Z-Image-Turbo."""
