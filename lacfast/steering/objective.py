"""What steering raises: one number of a critic's heads, of several critics, and of their rewards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lacfast.config import SteeringConfig
from lacfast.critic.critic import Critic


@dataclass(frozen=True)
class Objective:
    """V = combine_m w_m V_m over heads, then the minimum of critics; R so of the standardised rewards.

    All values are in units of the first critic's statistics: V' = (V std + mean - mean_0) / std_0.
    """

    weights: Tensor
    """(M,) float32 weight of each head and reward."""
    reward_mean: Tensor
    """(E, M) float64 raw reward at V = 0 of each of E critics; one row without any."""
    reward_std: Tensor
    """(E, M) float64 raw reward in one unit of V."""
    head_combination: str

    @staticmethod
    def create(
        critics: Sequence[Critic],
        weights: Tensor | None,
        num_rewards: int,
        config: SteeringConfig,
        device: torch.device,
    ) -> Objective:
        """The objective of critics with equally many heads, or of `num_rewards` raw rewards without any.

        Raises:
            ValueError: where heads, rewards and weights are not equally many.
        """
        heads = {critic.num_rewards for critic in critics} or {num_rewards or 1}
        sizes = set(heads)
        sizes |= {num_rewards} if num_rewards else set()
        sizes |= {len(weights)} if weights is not None else set()
        if len(sizes) > 1:
            given = "none" if weights is None else str(len(weights))
            raise ValueError(
                f"critics with {sorted(heads)} heads, {num_rewards} rewards and {given} head_weights do not "
                "match; pass the rewards that the critic was trained on, in their order"
            )
        (size,) = sizes
        return Objective(
            (torch.ones(size) if weights is None else weights).to(device, torch.float32),
            torch.stack([critic.reward_mean.cpu() for critic in critics] or [torch.zeros(size).double()]),
            torch.stack([critic.reward_std.cpu() for critic in critics] or [torch.ones(size).double()]),
            config.head_combination,
        )

    def of_critics(self, values: Sequence[Tensor]) -> Tensor:
        """V (B,) of the heads' values (B, M) of each critic, with gradients.

        Of several critics the minimum counts: pessimism against adversarial gradients.
        """
        common = [self._in_first_units(heads.float(), critic) for critic, heads in enumerate(values)]
        return torch.stack([self._of_heads(heads) for heads in common]).amin(dim=0)

    def of_rewards(self, rewards: dict[str, Tensor]) -> Tensor:
        """R (B,) float64 in units of V, of raw rewards name -> (B,)."""
        raw = torch.stack(list(rewards.values()), dim=1).double()
        return self._of_heads((raw - self.reward_mean[0]) / self.reward_std[0])

    def _in_first_units(self, values: Tensor, critic: int) -> Tensor:
        """Values (B, M) of a critic in the first one's units; its own stay bit for bit what they are."""
        if critic == 0:
            return values
        scale = self.reward_std[critic] / self.reward_std[0]
        offset = (self.reward_mean[critic] - self.reward_mean[0]) / self.reward_std[0]
        return values * scale.to(values) + offset.to(values)

    def _of_heads(self, values: Tensor) -> Tensor:
        weighted = values * self.weights.to(values)
        if self.head_combination == "sum":
            return weighted.sum(dim=-1)
        return weighted[:, self.weights.to(values.device) > 0].amin(dim=-1)
