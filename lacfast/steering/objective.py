"""What steering raises: one number of a critic's heads, of several critics, and of their rewards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lacfast.config import SteeringConfig
from lacfast.critic.critic import Critic
from lacfast.rewards.heads import SCALARIZED, RewardHeads
from lacfast.rewards.registry import RewardSet
from lacfast.transfer import to_device, to_like


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
    heads: RewardHeads | None = None
    """What the heads predict of the rewards; None: each reward as it is."""

    @staticmethod
    def create(
        critics: Sequence[Critic],
        rewards: RewardSet | None,
        given_weights: Tensor | None,
        config: SteeringConfig,
        device: torch.device,
    ) -> Objective:
        """The objective of critics, or of raw rewards without any.

        Args:
            critics: of the same heads.
            rewards: the critics', or None.
            given_weights: (M,) of the heads. None: those of the critics' training, or without critics the
                rewards'.
            config: its head_combination.
            device: of the values.

        Raises:
            ValueError: for critics of different rewards, rewards that are not theirs, and weights that do not
                fit or that nobody knows.
        """
        heads = _common_heads(critics)
        if rewards is not None and heads is not None and tuple(rewards.names) != heads.rewards:
            raise ValueError(
                f"rewards {rewards.names} are not the critic's {list(heads.rewards)}; pass those, in this "
                "order (gold takes any others)"
            )
        size = critics[0].num_rewards if critics else 1 if rewards is None else len(rewards.names)
        if heads is None and rewards is not None and len(rewards.names) != size:
            raise ValueError(
                f"rewards {rewards.names} do not fit a critic with {size} heads; pass those that it was "
                "trained on, in their order"
            )
        weights = _weights(critics, heads, rewards, given_weights)
        if len(weights) != size:
            raise ValueError(
                f"head_weights={weights.tolist()} are {len(weights)} for {size} heads; give one for each "
                "head, or none for those of the training"
            )
        _require_combinable(weights, config.head_combination)
        return Objective(
            weights.to(device, torch.float32),
            torch.stack([critic.reward_mean.cpu() for critic in critics] or [torch.zeros(size).double()]),
            torch.stack([critic.reward_std.cpu() for critic in critics] or [torch.ones(size).double()]),
            config.head_combination,
            heads,
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
        mean, std = self.reward_mean[0], self.reward_std[0]
        return self._of_heads(
            (raw - mean) / std if self.heads is None else self.heads.standardize(raw, mean, std)
        )

    def _in_first_units(self, values: Tensor, critic: int) -> Tensor:
        """Values (B, M) of a critic in the first one's units; its own stay bit for bit what they are."""
        if critic == 0:
            return values
        scale = self.reward_std[critic] / self.reward_std[0]
        offset = (self.reward_mean[critic] - self.reward_mean[0]) / self.reward_std[0]
        return values * to_like(scale, values) + to_like(offset, values)

    def _of_heads(self, values: Tensor) -> Tensor:
        weighted = values * to_like(self.weights, values)
        if self.head_combination == "sum":
            return weighted.sum(dim=-1)
        return weighted.masked_fill(to_device(self.weights, values.device) <= 0, torch.inf).amin(dim=-1)


def _common_heads(critics: Sequence[Critic]) -> RewardHeads | None:
    """What all critics predict, as far as they say it."""
    sizes = [critic.num_rewards for critic in critics]
    if len(set(sizes)) > 1:
        raise ValueError(f"critics with {sizes} heads cannot be compared; pass critics of the same rewards")
    known = [critic.rewards for critic in critics if critic.rewards is not None]
    for heads in known:
        # On a weighted sum the weights are part of what is predicted, elsewhere those of the first count.
        alike = replace(heads, weights=known[0].weights)
        if known[0] != (heads if heads.combination == SCALARIZED else alike):
            raise ValueError(
                f"critics of {known[0]} and {heads} cannot be compared; pass critics of the same rewards, "
                "combined alike"
            )
    return known[0] if known else None


def _weights(
    critics: Sequence[Critic], heads: RewardHeads | None, rewards: RewardSet | None, given: Tensor | None
) -> Tensor:
    if given is not None:
        return given
    if heads is not None:
        return heads.head_weights
    if not critics:
        return torch.ones(1) if rewards is None else rewards.weights
    if critics[0].num_rewards > 1:
        raise ValueError(
            f"nobody knows the weights of the critic's {critics[0].num_rewards} heads: it was not trained, "
            "or its file is of an earlier version and does not say; pass head_weights, one for each head"
        )
    return torch.ones(1)


def _require_combinable(weights: Tensor, head_combination: str) -> None:
    usable = bool((weights >= 0).all()) if head_combination == "minimum" else True
    if not usable or not bool((weights != 0).any()):
        raise ValueError(
            f"head_weights={weights.tolist()} leave the {head_combination} of the heads nothing to raise; "
            "give a weight that is not 0"
            + ("" if usable else ", and none below 0, or use head_combination='sum'")
        )
