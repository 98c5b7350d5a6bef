"""What the trainer asks of a model, and how a model gets its critic."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from lacfast.config import CriticConfig, SamplerConfig
from lacfast.critic.critic import Critic
from lacfast.critic.trunk import Trunk
from lacfast.distributed.sharding import Divider
from lacfast.records import Conditioning, TransitionTable
from lacfast.rewards.heads import RewardHeads, require_rewards


class Backbone(Protocol):
    """A diffusion model with its prompt encoder and image codec, implemented in lacfast.backbones."""

    model: nn.Module
    """The network that is trained, whole or by adapters in it."""
    dtype: torch.dtype
    """Dtype that the model runs in and takes its samples in."""
    latent_shape: tuple[int, ...]
    """(C, H, W), (C, F, H, W) of videos, or (L, D) where the family packs its latents."""
    judged_frames: int
    """Frames of a video that rewards of images judge; 0 where `decode` gives images."""
    critic: Critic | None
    """Its value function; the trainer makes one, load_backbone loads one."""

    @property
    def rescales_guidance(self) -> bool:
        """Whether guidance is policy.rescaled_guidance."""

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning (B, ...) of the prompts."""

    def encode_unconditional(self, count: int) -> Conditioning:
        """Conditioning (B, ...) of `count` samples without a prompt, for classifier-free guidance."""

    def predict(self, sample: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """Model output (B, ...) float32, or float64 where the noisy latents (B, ...) are, at timesteps (B,)
        float32."""

    def forward_signature(self) -> Hashable:
        """What decides the operations of `predict` besides tensors: dtype, adapters, attention. A captured
        graph has frozen it."""

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W), or videos (B, F, 3, H, W), float in [0, 1] of clean latents."""

    def transition_table(self, config: SamplerConfig) -> TransitionTable:
        """The schedule that `config` describes, for this model's prediction type and scheduler."""

    def build_trunk(self, config: CriticConfig) -> Trunk:
        """A new trunk for a critic of this model."""

    def policy_parameters(self) -> list[nn.Parameter]:
        """What the policy's optimizer moves: all weights, or those of the policy's LoRA."""

    def policy_state(self) -> dict[str, Tensor]:
        """The live tensors that a checkpoint of the policy holds, by diffusers' names without adapters."""

    def frozen_anchor(self, which: str = "start") -> Backbone:
        """A frozen policy for the KL: that of today, or the model without its LoRA; see KLPenalty.anchor."""

    def shard(self, sharding: Divider) -> None:
        """Divide the weights of the model and of its critic's own blocks over ranks, see TrainConfig.shard;
        the parameters are other objects then."""

    def enable_gradient_checkpointing(self) -> None:
        """Recompute the model's activations in the backward pass instead of keeping them."""

    def compile_blocks(self) -> None:
        """torch.compile the repeated blocks of model and critic, for sampling and training alike."""

    def quantized(self, precision: str) -> Backbone:
        """The same policy with quantised weights, for rollouts; see TrainConfig.rollout_precision."""

    def requantize(self) -> None:
        """Make a quantised policy follow the weights that it was made of; any other has nothing to do."""

    def saved_weights(self) -> dict[str, Tensor]:
        """The live tensors that `save_pretrained` writes, by name."""

    def save_pretrained(self, directory: Path, weights: dict[str, Tensor] | None = None) -> None:
        """Write what `load_backbone` and plain diffusers read, on one rank.

        `weights` are those of `saved_weights`, with what is sharded whole; None: they are as they are.
        """

    def read_policy(self, directory: Path) -> dict[str, Tensor]:
        """The `policy_state` in a directory that `save_pretrained` wrote."""


def require_gradients(backbone: Backbone) -> None:
    """
    Raises:
        ValueError: for a model that runs in float16.
    """
    if getattr(backbone, "dtype", None) == torch.float16:
        raise ValueError(
            "the model runs in float16, whose smallest numbers lie above the gradients of a mean-reduced "
            "log-prob: much of a LoRA's would be 0; load it with dtype=torch.bfloat16 or float32, on the "
            "command line --dtype bfloat16. Evaluation and steering take float16"
        )


def build_critic(
    backbone: Backbone, num_rewards: int, config: CriticConfig, *, seed: int = 0
) -> Critic | None:
    """A new critic for `backbone` on its device, or None for trunk "none"."""
    if config.trunk == "none":
        return None
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        critic = Critic(backbone.build_trunk(config), num_rewards, config)
    return critic.to(next(backbone.model.parameters()).device)


def attach_critic(backbone: Backbone, heads: RewardHeads, config: CriticConfig, *, seed: int = 0) -> None:
    """Give a backbone the critic that `config` describes, if it has none yet; it says what it predicts.

    Args:
        backbone: its critic is set.
        heads: what is valued.
        config: of the critic; trunk "none" takes the backbone's critic away.
        seed: of a new critic's weights.

    Raises:
        ValueError: when the backbone has another one.
    """
    attached = backbone.critic
    if config.trunk == "none":
        backbone.critic = None
    elif attached is None:
        backbone.critic = build_critic(backbone, len(heads.names), config, seed=seed)
    elif (attached.num_rewards, attached.config) != (len(heads.names), config):
        raise ValueError(
            f"the backbone's critic has {attached.num_rewards} heads and {attached.config}; "
            f"{len(heads.names)} rewards {list(heads.names)} and {config} do not fit it. Train with the "
            "critic's own, or set backbone.critic = None for a new one"
        )
    else:
        require_rewards(attached.rewards, heads.rewards, "the backbone's critic")
    if backbone.critic is not None:
        backbone.critic.rewards = heads
