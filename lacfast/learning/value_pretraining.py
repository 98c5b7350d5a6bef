"""Value pretraining: with the actor frozen, the critic learns what its own rollouts were worth."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from lacfast.config import TrainConfig, ValuePretrainingConfig
from lacfast.critic.critic import Critic
from lacfast.critic.values import (
    held_out_variance,
    rollout_variance,
    update_statistics,
    value_targets,
)
from lacfast.learning.batches import CriticSource, critic_minibatch
from lacfast.learning.critic_update import CriticUpdate
from lacfast.learning.gradient_guard import GradientGuard
from lacfast.learning.optimizers import missing_moments
from lacfast.learning.pairs import all_states
from lacfast.learning.replay import RewardedStates, StateMemory
from lacfast.learning.step_tables import step_tables
from lacfast.learning.totals import UpdateRecords
from lacfast.learning.value_bounds import ValueBounds
from lacfast.learning.value_confidence import ValueConfidence
from lacfast.metrics import MetricsLog
from lacfast.prompts import PromptSet
from lacfast.records import FirstSampleId, Rollout
from lacfast.rewards.normalizer import RewardNormalizer
from lacfast.rollout.memory import HostRoom
from lacfast.runtime.host_memory import Staging
from lacfast.seeds import derived_seed

INITIAL_RATE_FACTOR = 3.0
"""Multiple of the critic's learning rates at the start; it falls linearly to 1 over the iterations."""


@dataclass(frozen=True)
class PretrainResult:
    """What value pretraining reached."""

    explained_variance: Tensor
    """(T, M) of the critic that was kept, on held-out states; without any, of the last critic but one on the
    rollout that it then learned from."""
    history: list[float]
    """Mean explained variance of every iteration: held out after it, or else on its rollout before it."""
    images: int
    """Generated for training and selection; they count in every comparison."""
    bounds: ValueBounds | None = None
    """Floor and ceiling of the explained variance, whose images count too; None where not measured."""


@dataclass(frozen=True)
class _Kept:
    """A critic as it was when it was measured."""

    weights: dict[str, Tensor]
    normalizer: RewardNormalizer
    explained_variance: Tensor
    """(T, M)"""

    @staticmethod
    def of(critic: Critic, normalizer: RewardNormalizer, explained_variance: Tensor) -> _Kept:
        weights = {name: tensor.detach().clone() for name, tensor in critic.state_dict().items()}
        return _Kept(weights, copy.deepcopy(normalizer), explained_variance)

    def restore(self, critic: Critic, normalizer: RewardNormalizer) -> Tensor:
        """Put both back; returns the explained variance (T, M)."""
        critic.load_state_dict(self.weights)
        normalizer.restore(self.normalizer)
        return self.explained_variance


def selection_prompts(held_out: PromptSet, config: ValuePretrainingConfig) -> PromptSet:
    """Held-out prompts of the rollout that measures value pretraining, one per trajectory."""
    # The floor needs every prompt twice.
    distinct = max(config.held_out_samples // 2, 1) if config.completions else len(held_out)
    return held_out.cycle(min(distinct, len(held_out))).cycle(config.held_out_samples)


def host_room(config: TrainConfig) -> HostRoom:
    """Room for the rollouts that value pretraining keeps, and the one that is made meanwhile."""
    settings = config.pretrain
    kept = min(settings.kept_rollouts + 1, settings.iterations)
    return HostRoom(
        settings.held_out_samples + kept * config.batch_size,
        f"lower pretrain.kept_rollouts={settings.kept_rollouts} or pretrain.held_out_samples="
        f"{settings.held_out_samples}",
    )


def held_out_rollout(
    collect: Callable[..., Rollout | None], held_out: PromptSet, config: TrainConfig, room: HostRoom
) -> Rollout | None:
    """The rollout that measures value pretraining, made by the trainer's `collect`; None without one.

    Raises:
        ValueError: when its rewards failed.
    """
    if not config.pretrain.held_out_samples:
        return None
    prompts = selection_prompts(held_out, config.pretrain)
    rollout = collect(prompts, FirstSampleId.SELECTION, room=room)
    if rollout is None:
        raise ValueError("the rewards failed on the held-out rollout of value pretraining; mend them")
    return rollout


def pretrain_values(
    critic: Critic,
    optimizer: Optimizer,
    normalizer: RewardNormalizer,
    held_out: Rollout | None,
    rollouts: Iterable[Rollout | None],
    config: TrainConfig,
    *,
    confidence: ValueConfidence,
    log: MetricsLog,
    on_iteration: Callable[[int, Tensor], None] | None = None,
) -> PretrainResult:
    """Fit the critic to rollouts of a frozen actor until its explained variance stops rising.

    With bounds it also stops where the overall score reaches stop_score. Without `held_out` every rollout
    measures the critic before it is learned from (prequential: A. P. Dawid, JRSS A 147, 1984), which costs no
    images.

    Args:
        critic: trained in place; ends as the best one seen on `held_out`, without it as the last one.
        optimizer: of the critic; its state and rates are the caller's to reset before joint training.
        normalizer: reward statistics, updated with every rollout.
        held_out: rollout with rewards on prompts that are not trained on, or None.
        rollouts: pretrain.iterations of them with rewards, each made when it is asked for; None: skipped.
        config: of the run, whose seed orders the minibatches.
        confidence: has the bounds of the explained variance on `held_out`, where they were measured.
        log: gets a line per iteration.
        on_iteration: gets the iteration and its explained variance (T, M).
    """
    settings, device = config.pretrain, critic.reward_mean.device
    guard = GradientGuard("critic", config.on_bad_gradient, torch.zeros((), device=device))
    update = CriticUpdate(critic, optimizer, config.ppo, guard)
    recent = StateMemory(RewardedStates, settings.kept_rollouts)
    history: list[float] = []
    bounds = confidence.bounds
    best: _Kept | None = None
    best_iteration = 0
    variance: Tensor | None = None
    images = 0 if held_out is None else held_out.batch_size
    iteration = -1
    # enumerate would keep each rollout while the next is sampled.
    for rollout in rollouts:
        iteration += 1
        if rollout is None:
            continue
        images += rollout.batch_size
        recent.add(RewardedStates.of(rollout, device))
        rollout = update_statistics(critic, normalizer, rollout)
        update.prepare(step_tables(rollout.table, config.ppo, rollout.latents.new_empty(0, device=device)))
        generator = torch.Generator().manual_seed(derived_seed(config.seed, iteration))
        update.set_rates(_rate_factor(iteration / settings.iterations))
        records = _learn_from(recent, update, normalizer, config, generator)
        if held_out is None:
            variance = rollout_variance(rollout, normalizer)
        else:
            variance = held_out_variance(critic, held_out, normalizer)
        history.append(float(variance.mean()))
        log.write(
            "value_pretraining",
            iteration=iteration,
            explained_variance=variance.mean(dim=-1),
            **confidence.metrics(variance),
            **records.left_out(),
            **guard.metrics(),
        )
        del rollout
        if on_iteration is not None:
            on_iteration(iteration, variance)
        if history[-1] > max(history[:-1], default=-math.inf):
            best_iteration = len(history)
            best = None if held_out is None else _Kept.of(critic, normalizer, variance)
        if len(history) - best_iteration >= settings.patience:
            break
        if bounds is not None and bounds.overall_score(variance) >= settings.stop_score:
            break
    if variance is None:
        raise ValueError("value pretraining saw no rollout with usable rewards; see the warnings above")
    if best is not None:
        variance = best.restore(critic, normalizer)
    return PretrainResult(variance, history, images, bounds)


def _rate_factor(done: float) -> float:
    """Factor of the learning rates between INITIAL_RATE_FACTOR and 1, linear in the share that is done."""
    return INITIAL_RATE_FACTOR + (1 - INITIAL_RATE_FACTOR) * done


def _learn_from(
    memory: StateMemory[RewardedStates],
    update: CriticUpdate,
    normalizer: RewardNormalizer,
    config: TrainConfig,
    generator: torch.Generator,
) -> UpdateRecords:
    """Minibatches of random states, each from one kept rollout, until they make up config.pretrain.passes."""
    settings, records, staging = config.pretrain, UpdateRecords(), Staging(update.guard.failed.device)
    kept_states = sum(states.num_steps * states.batch_size for states in memory)
    for _ in range(math.ceil(settings.passes * kept_states / settings.minibatch_size)):
        states = memory[int(torch.randint(len(memory), (1,), generator=generator))]
        targets = value_targets(states.rewards, normalizer, config.ppo.target_clip)
        drawn = next(all_states(states).shuffled(generator).split(settings.minibatch_size))
        source = CriticSource(states, targets, update.tables.timesteps)
        gathered, minibatch = critic_minibatch(source, drawn, staging)
        update.find_size(gathered, reserved=missing_moments(update.optimizer))
        update.learn(gathered, minibatch, records)
    records.read()
    return records
