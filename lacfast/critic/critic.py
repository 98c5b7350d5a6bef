"""The critic: the model's own features read as a value function V(x_t, t, prompt) on noisy latents."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from lacfast.config import CriticConfig
from lacfast.critic.head import ValueHead, of_states
from lacfast.critic.trunk import Features, Trunk
from lacfast.critic.value_loss import SquaredError, build_value_loss
from lacfast.records import Conditioning
from lacfast.reference.surrogate import masked_mean
from lacfast.rewards.heads import RewardHeads
from lacfast.runtime.precision import running_in


class Critic(nn.Module):
    """Trunk and head. Predicts standardised rewards; see rewards.normalizer.RewardNormalizer.

    `forward` gives values; how they are trained is the business of `outputs` and `loss` alone.
    """

    reward_mean: Tensor
    """(M,) float64 raw reward that V = 0 stands for."""
    reward_std: Tensor
    """(M,) float64 raw reward in one unit of V."""
    rewards: RewardHeads | None
    """What the heads predict, as the training said; None: nobody did, as in files of earlier versions."""

    def __init__(self, trunk: Trunk, num_rewards: int, config: CriticConfig) -> None:
        super().__init__()
        self.trunk = trunk
        self.value_loss = build_value_loss(num_rewards, config)
        self.head = ValueHead(trunk.tap_dims, num_rewards, config, num_outputs=self.value_loss.num_outputs)
        self.config = config
        self.rewards = None
        # In the weights' file, so that a critic knows its units wherever it is used.
        self.register_buffer("reward_mean", torch.zeros(num_rewards, dtype=torch.float64))
        self.register_buffer("reward_std", torch.ones(num_rewards, dtype=torch.float64))

    @property
    def num_rewards(self) -> int:
        return self.head.num_rewards

    @property
    def has_units(self) -> bool:
        """Whether rewards have said what V means; of a new critic the value loss does."""
        return bool((self.reward_mean != 0).any() or (self.reward_std != 1).any())

    def record(self, model: nn.Module, *, detach: bool = True) -> AbstractContextManager[Features]:
        """Within the context, a forward of the actor fills the returned dict with what the critic reads."""
        return self.trunk.record(model, detach=detach)

    def forward(
        self, features: Features, sample: Tensor, timestep: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """Values (B, M) of the states (sample (B, ...), timestep (B,), conditioning (B, ...)).

        Where neighbours share their timestep, `timestep` may be (S,) of S runs of B / S states.
        """
        return self.value_loss.values(self.outputs(features, sample, timestep, conditioning))

    def outputs(
        self, features: Features, sample: Tensor, timestep: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """The head's outputs (B, M, K), for `loss`; arguments as `forward`."""
        with running_in(self.trunk.compute_dtype, sample):
            taps = self.trunk(features, sample, of_states(timestep, len(sample)), conditioning)
        return self.head(taps, timestep)  # type: ignore[no-any-return]

    def loss(
        self,
        outputs: Tensor,
        targets: Tensor,
        old_values: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Mean loss () of config.loss over samples and rewards.

        Args:
            outputs: (B, M, K), see `outputs`.
            targets: (B, M) standardised.
            old_values: (B, M) of the rollout, for config.value_clip. None: values may move freely.
            mask: (B,) bool, samples that count. None: all.
        """
        clip = self.config.value_clip
        if old_values is not None and math.isfinite(clip) and isinstance(self.value_loss, SquaredError):
            losses = self.value_loss.clipped_losses(outputs, targets, old_values, clip)
        else:
            losses = self.value_loss.losses(outputs, targets)
        return losses.mean() if mask is None else masked_mean(losses.mean(dim=1), mask)

    @torch.no_grad()
    def rescale(self, old_mean: Tensor, old_std: Tensor, new_mean: Tensor, new_std: Tensor) -> None:
        """Keep raw predictions std V + mean when the statistics (M,) change (PopArt, arXiv 1602.07714)."""
        self.value_loss.rescale(self.head.output, old_mean, old_std, new_mean, new_std)
