"""The advantages of a run: its estimator, its combination of rewards, and the statistics that both keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lacfast.advantages.critic_baseline import critic_advantages, with_baseline
from lacfast.advantages.multipliers import LagrangeMultipliers
from lacfast.advantages.prompt_statistics import PromptStatistics
from lacfast.advantages.reward_baselines import (
    batch_advantages,
    combined,
    group_advantages,
    prompt_advantages,
    zero_std_groups,
)
from lacfast.config import DDPO, CriticValues, GroupBaseline, LeaveOneOut, TrainConfig
from lacfast.records import Advantages, Rollout
from lacfast.rewards.heads import RewardHeads, stack_rewards
from lacfast.rewards.normalizer import RewardNormalizer
from lacfast.transfer import to_device


class AdvantageEstimator:
    """Turns rollouts with rewards into what the update learns from; see AdvantageConfig."""

    def __init__(self, config: TrainConfig, names: Sequence[str], weights: Tensor) -> None:
        """
        Args:
            config: of the run.
            names: of the M rewards.
            weights: (M,) of the rewards.

        Raises:
            ValueError: settings that name a reward which is not there.
        """
        self.config = config.advantages
        self.ppo = config.ppo
        self.samples_per_prompt = config.samples_per_prompt
        self._heads = heads = RewardHeads.create(names, weights, self.config)
        self.normalizer = RewardNormalizer.create(len(heads.names), heads=heads)
        self.head_names = heads.names
        self.multipliers: LagrangeMultipliers | None = None
        if self.config.combination == "constrained":
            self.multipliers = LagrangeMultipliers.create(names, weights, self.config)
        self.prompt_statistics: list[PromptStatistics] = []
        chosen = self.config.estimator
        if isinstance(chosen, DDPO):
            buffers = (chosen.buffer_size, chosen.min_count)
            self.prompt_statistics = [PromptStatistics(*buffers) for _ in heads.names]
        self._weights = heads.head_weights

    @property
    def heads(self) -> RewardHeads:
        """What a critic predicts; its weights are those of now."""
        if self.multipliers is None:
            return self._heads
        return replace(self._heads, weights=tuple(self.multipliers.weights.tolist()))

    @property
    def weights(self) -> Tensor:
        """(M,) of the heads' advantages, now."""
        return self._weights if self.multipliers is None else self.multipliers.weights

    def __call__(self, rollout: Rollout, gae_lambda: float | Tensor | None = None) -> Advantages:
        """Advantages of a rollout with rewards.

        `gae_lambda` is one, or (T,) of each step's value; None: the run's.
        Takes it into the multipliers and the statistics per prompt, so it is called once for each rollout;
        the normalizer must have seen it before.
        """
        config = self.config
        if self.multipliers is not None:
            self.multipliers.update(stack_rewards(rollout), self.normalizer.std)
        if isinstance(config.estimator, CriticValues):
            return critic_advantages(
                with_baseline(config.estimator, rollout),
                self.normalizer,
                self.weights,
                gae_lambda=self.ppo.gae_lambda if gae_lambda is None else gae_lambda,
                advantage_clip=self.ppo.advantage_clip,
                target_clip=self.ppo.target_clip,
                combination="sum" if config.combination == "sum" else "sum_normalized",
            )
        rewards = self.normalizer.head_rewards(stack_rewards(rollout))
        raw = self._relative_rewards(rewards, rollout.prompts)
        bound = self.ppo.advantage_clip
        steps, device = torch.tensor(rollout.trained_steps), rollout.latents.device
        policy = combined(raw, self.weights).clamp(-bound, bound)
        return Advantages(
            to_device(steps, device),
            to_device(policy, device).expand(len(steps), -1),
            raw.new_zeros((rollout.batch_size, 0), device=device),
            to_device(raw, device).expand(len(steps), -1, -1),
            self._group_counts(rewards),
        )

    def _relative_rewards(self, rewards: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B, M) of rewards (B, M)."""
        estimator = self.config.estimator
        if isinstance(estimator, DDPO):
            return prompt_advantages(rewards, prompts, self.prompt_statistics)
        if isinstance(estimator, GroupBaseline):
            return group_advantages(
                rewards,
                samples_per_prompt=self.samples_per_prompt,
                std=estimator.std,
                leave_one_out=isinstance(estimator, LeaveOneOut),
            )
        return batch_advantages(rewards)

    def _group_counts(self, rewards: Tensor) -> dict[str, float]:
        if not isinstance(self.config.estimator, GroupBaseline):
            return {}
        return {
            "zero_std_groups": zero_std_groups(rewards, self.samples_per_prompt),
            "groups": len(rewards) // self.samples_per_prompt,
        }

    def metrics(self) -> dict[str, float]:
        """The multipliers as they are now."""
        if self.multipliers is None:
            return {}
        return {
            f"weight/{name}": float(weight)
            for name, weight in zip(self.head_names, self.weights, strict=True)
        }

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs."""
        return {
            "estimator": self.config.estimator.name,
            "combination": self.config.combination,
            "normalizer": self.normalizer.state_dict(),
            "multipliers": None if self.multipliers is None else self.multipliers.weights,
            "prompt_statistics": [statistics.state() for statistics in self.prompt_statistics],
        }

    def require_fit(self, state: dict[str, Any]) -> None:
        """
        Raises:
            ValueError: when the state is of another estimator or combination.
        """
        settings = {"estimator": self.config.estimator.name, "combination": self.config.combination}
        for setting, own in settings.items():
            saved = state[setting]
            if saved != own:
                raise ValueError(
                    f"the checkpoint was trained with {setting}={saved!r}, this trainer has {own!r}; "
                    "use the same"
                )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`.

        Raises:
            ValueError: when it does not fit.
        """
        self.require_fit(state)
        for statistics, saved in zip(self.prompt_statistics, state["prompt_statistics"], strict=True):
            statistics.load_state(saved)
        self.normalizer.load_state_dict(state["normalizer"])
        if self.multipliers is not None:
            self.multipliers.weights = state["multipliers"]
