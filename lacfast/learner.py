"""The learner: what moves the weights of actor and critic, and the state that this takes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from lacfast.adaptive_kl import AdaptiveKL
from lacfast.advantages import Advantages
from lacfast.averaging import WeightAverage
from lacfast.config import TrainConfig
from lacfast.critic import Critic
from lacfast.metrics import policy_metrics
from lacfast.profiling import span
from lacfast.protocols import Backbone
from lacfast.records import Rollout
from lacfast.update import (
    all_pairs,
    all_states,
    critic_optimizer,
    critic_step,
    minibatches,
    policy_optimizer,
    policy_step,
    warmup,
)


class Learner:
    """PPO on the actor and regression on the critic, over one rollout at a time."""

    def __init__(self, backbone: Backbone, config: TrainConfig) -> None:
        """
        Args:
            backbone: its model and its critic are trained in place.
            config: of the run.
        """
        self.backbone = backbone
        self.config = config
        self.reference = backbone.frozen_reference() if config.ppo.kl_weight > 0 else None
        self.policy_optimizer = policy_optimizer(backbone.policy_parameters(), config.ppo)
        self.policy_schedule = warmup(self.policy_optimizer, config.ppo.warmup_steps)
        self.critic_optimizer = critic_optimizer(backbone.critic, config.ppo)
        self.average = WeightAverage(backbone.policy_state(), config.ema_decay) if config.ema_decay else None
        target = config.ppo.kl_target
        self.adaptive_kl = None if target is None else AdaptiveKL(config.ppo.kl_weight, target)
        if config.gradient_checkpointing:
            backbone.enable_gradient_checkpointing()

    @property
    def critic(self) -> Critic | None:
        return self.backbone.critic

    def reset_critic_optimizer(self) -> None:
        """Forget the critic's moments and rates: joint training starts as if none had been."""
        self.critic_optimizer = critic_optimizer(self.critic, self.config.ppo)

    def learn(self, rollout: Rollout, advantages: Advantages, iteration: int) -> dict[str, Any]:
        """All passes over a rollout, in an order that depends on seed and iteration; returns their metrics.

        Raises:
            FloatingPointError: for a gradient that is not finite, before the optimizer step.
        """
        metrics: dict[str, Any] = {}
        for epoch in range(self.config.ppo.num_inner_epochs):
            seed = (self.config.seed * 1_000_003 + iteration) * 97 + epoch
            generator = torch.Generator().manual_seed(seed)
            metrics |= self._update_policy(rollout, advantages, generator, metrics)
            metrics |= self._update_critic(rollout, advantages, generator)
        if self.adaptive_kl is not None:
            metrics["kl_weight"] = self.adaptive_kl.weight
            self.adaptive_kl.update(float(metrics["kl_ref"].nanmean()))
        if self.average is not None:
            self.average.update()
        return metrics

    def _update_policy(
        self, rollout: Rollout, advantages: Advantages, generator: torch.Generator, earlier: dict[str, Any]
    ) -> dict[str, Any]:
        ppo, metrics = self.config.ppo, dict(earlier)
        if self.adaptive_kl is not None:
            ppo = replace(ppo, kl_weight=self.adaptive_kl.weight)
        pairs = all_pairs(advantages.steps, rollout.batch_size)
        for minibatch in minibatches(pairs, ppo.num_minibatches, generator, fraction=ppo.timestep_fraction):
            if metrics.get("mean_kl_old", 0.0) > ppo.kl_limit:
                return metrics | {"stopped_by_kl_limit": True}
            stats, loss, norm = policy_step(
                self.backbone,
                self.reference,
                self.policy_optimizer,
                rollout,
                advantages,
                minibatch,
                ppo,
                self.config.sampler.guidance_scale,
            )
            self.policy_schedule.step()
            with span("sync"):
                metrics.setdefault("first_max_abs_log_ratio", float(stats.log_ratio.abs().max()))
                metrics |= policy_metrics(stats, advantages.steps)
                metrics |= {"policy_loss": float(loss), "policy_grad_norm": norm}
        return metrics

    def _update_critic(
        self, rollout: Rollout, advantages: Advantages, generator: torch.Generator
    ) -> dict[str, Any]:
        if self.critic is None or self.critic_optimizer is None:
            return {}
        metrics: dict[str, Any] = {}
        for minibatch in minibatches(all_states(rollout), self.config.ppo.num_minibatches, generator):
            loss, norm = critic_step(
                self.critic,
                self.critic_optimizer,
                rollout,
                advantages.targets,
                minibatch,
                self.config.ppo,
                old_values=rollout.values,
            )
            metrics = {"value_loss": float(loss), "critic_grad_norm": norm}
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs besides the weights."""
        return {
            "kl_weight": None if self.adaptive_kl is None else self.adaptive_kl.weight,
            "average": None if self.average is None else self.average.weights,
            "policy_optimizer": self.policy_optimizer.state_dict(),
            "policy_schedule": self.policy_schedule.state_dict(),
            "critic_optimizer": None if self.critic_optimizer is None else self.critic_optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`; the weights are loaded before."""
        self.policy_optimizer.load_state_dict(state["policy_optimizer"])
        self.policy_schedule.load_state_dict(state["policy_schedule"])
        if self.adaptive_kl is not None and state["kl_weight"] is not None:
            self.adaptive_kl.weight = state["kl_weight"]
        if self.critic_optimizer is not None:
            self.critic_optimizer.load_state_dict(state["critic_optimizer"])
        if self.average is not None:
            self.average.load(state["average"] or self.backbone.policy_state())
