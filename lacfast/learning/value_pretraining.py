"""Value pretraining: with the actor frozen, the critic learns what its own rollouts were worth."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.optim import Optimizer

from lacfast.config import TrainConfig
from lacfast.critic.critic import Critic
from lacfast.critic.values import (
    rollout_values,
    rollout_variance,
    update_statistics,
    value_targets,
)
from lacfast.distributed import ALONE, World
from lacfast.distributed.sharding import gathered
from lacfast.learning.batches import CriticSource, critic_minibatch
from lacfast.learning.critic_update import CriticUpdate
from lacfast.learning.gradient_guard import GradientGuard
from lacfast.learning.optimizers import missing_moments
from lacfast.learning.pairs import Shuffled, all_states
from lacfast.learning.pretraining_state import KnownScores, MeasuredCritic, PretrainingState
from lacfast.learning.replay import RewardedStates, StateMemory
from lacfast.learning.step_tables import step_tables
from lacfast.learning.totals import UpdateRecords
from lacfast.learning.value_bounds import ValueBounds
from lacfast.learning.value_confidence import ValueConfidence
from lacfast.metrics import MetricsLog
from lacfast.prompts import Draws
from lacfast.records import FirstSampleId, Rollout
from lacfast.rewards.normalizer import RewardNormalizer
from lacfast.rollout.memory import HostRoom
from lacfast.rollout.outcomes import outcomes
from lacfast.rollout.tables import TrainingTables
from lacfast.runtime.host_memory import Staging
from lacfast.seeds import derived_seed

INITIAL_RATE_FACTOR = 3.0
"""Multiple of the critic's learning rates at the start; it falls linearly to 1 over the iterations."""

ROUNDING = 1e-6
"""Explained variance by which a critic is no better: values of one critic differ by it in other units."""


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


def host_room(config: TrainConfig) -> HostRoom:
    """Room for the rollouts that value pretraining keeps, and the one that is made meanwhile."""
    settings = config.pretrain
    kept = min(settings.kept_rollouts + 1, settings.iterations)
    return HostRoom(
        settings.held_out_samples + kept * config.batch_size,
        f"lower pretrain.kept_rollouts={settings.kept_rollouts} or pretrain.held_out_samples="
        f"{settings.held_out_samples}",
    )


class PretrainingRollouts:
    """The rollouts of value pretraining, with sample ids and prompts of their own, on the host."""

    def __init__(self, collect: Callable[..., Rollout | None], draws: Draws, tables: TrainingTables) -> None:
        """
        Args:
            collect: the trainer's.
            draws: of its prompts.
            tables: of its iterations.
        """
        self._collect = collect
        self._draws = draws
        self._tables = tables
        self._room = host_room(draws.config)

    def of(self, iteration: int, known: KnownScores | None = None) -> Rollout | None:
        """The rollout of an iteration, None where its rewards failed; one made again has `known` scores."""
        return self._collect(
            self._draws.pretraining(iteration),
            FirstSampleId.VALUE_PRETRAINING + iteration * self._draws.config.batch_size,
            table=self._tables.pretraining(iteration),
            room=self._room,
            known=known,
        )

    def held_out(self, known: KnownScores | None) -> Rollout | None:
        """The one that measures value pretraining; None without one.

        Raises:
            ValueError: when its rewards failed.
        """
        draws = self._draws
        if not draws.config.pretrain.held_out_samples:
            return None
        rollout = self._collect(draws.selection(), FirstSampleId.SELECTION, room=self._room, known=known)
        if rollout is None:
            raise ValueError("the rewards failed on the held-out rollout of value pretraining; mend them")
        return rollout


def held_out_variance(
    critic: Critic, rollout: Rollout, normalizer: RewardNormalizer, world: World = ALONE
) -> Tensor:
    """Explained variance (T, M) on a rollout that the critic does not learn from, with today's critic."""
    with gathered(critic):
        valued = replace(rollout, values=rollout_values(critic, rollout))
    return rollout_variance(outcomes(valued, world), normalizer)


class ValuePretraining:
    """Fits the critic to rollouts of a frozen actor until its explained variance stops rising.

    With bounds it also stops where the overall score reaches stop_score. Without `held_out` every rollout
    measures the critic before it is learned from (prequential: A. P. Dawid, JRSS A 147, 1984), which costs no
    images.
    """

    def __init__(
        self,
        critic: Critic,
        optimizer: Optimizer,
        normalizer: RewardNormalizer,
        config: TrainConfig,
        state: PretrainingState,
        held_out: Rollout | None,
        *,
        confidence: ValueConfidence,
        log: MetricsLog,
        world: World = ALONE,
    ) -> None:
        """
        Args:
            critic: trained in place; ends as the best one seen on `held_out`, without it as the last one.
            optimizer: of the critic; its state and rates are the caller's to reset before joint training.
            normalizer: reward statistics, updated with every rollout.
            config: of the run, whose seed orders the minibatches.
            state: goes on from where it is, or begins.
            held_out: rollout with rewards on prompts that are not trained on, or None.
            confidence: has the bounds of the explained variance on `held_out`, where they were measured.
            log: gets a line per iteration.
            world: the ranks that have the rollouts together.
        """
        self.critic = critic
        self.normalizer = normalizer
        self.config = config
        self.state = state
        self.held_out = held_out
        self.confidence = confidence
        self.log = log
        self.world = world
        self._device = critic.reward_mean.device
        failed = torch.zeros((), device=self._device)
        self._guard = GradientGuard("critic", config.on_bad_gradient, failed)
        self._update = CriticUpdate(critic, optimizer, config.ppo, self._guard, world=world)
        self._recent = StateMemory(RewardedStates, config.pretrain.kept_rollouts, world)
        if state.is_under_way:
            state.require_fit(config)
            self._guard.load_state_dict(state.guard)
            self._update.microbatch.size = self._update.microbatch.size or state.microbatch_size
        else:
            measured = None if held_out is None else KnownScores.of(outcomes(held_out, world))
            state.begin(measured, config.rollout_precision)

    @property
    def _is_done(self) -> bool:
        """Whether all iterations are behind, or more of them would not help."""
        state, settings, bounds = self.state, self.config.pretrain, self.confidence.bounds
        if state.iteration >= settings.iterations:
            return True
        if state.explained_variance is None:
            return False
        is_stalled = len(state.history) - state.best_iteration >= settings.patience
        return is_stalled or (
            bounds is not None and bounds.overall_score(state.explained_variance) >= settings.stop_score
        )

    def run(
        self,
        rollout_of: Callable[..., Rollout | None],
        indivisible: Callable[[str], AbstractContextManager[None]],
        on_iteration: Callable[[int, Tensor], None] | None = None,
    ) -> PretrainResult:
        """All iterations that are left; ends with the best critic.

        Args:
            rollout_of: makes the rollout of an iteration with its rewards, None where they failed; one that
                was learned from before a run went on with its `known` scores.
            indivisible: context of learning, within which nothing is saved.
            on_iteration: gets the iteration and its explained variance (T, M).

        Raises:
            ValueError: when no rollout had usable rewards.
        """
        state = self.state
        for iteration, known in state.kept.items():
            self._remember(rollout_of(iteration, known=known))
        while not self._is_done:
            rollout = rollout_of(state.iteration)
            with indivisible(f"iteration {state.iteration + 1} of value pretraining"):
                variance = None if rollout is None else self._learn(rollout)
                state.iteration += 1
                self.log.pretrained = state.iteration
            # Or it would be kept while the next is sampled.
            del rollout
            if variance is not None and on_iteration is not None:
                on_iteration(state.iteration - 1, variance)
        return self._result()

    def _remember(self, rollout: Rollout | None) -> None:
        assert rollout is not None, "rewards that are known do not fail"
        self._recent.add(RewardedStates.of(rollout, self._device))

    def _learn(self, rollout: Rollout) -> Tensor:
        """One iteration on a rollout with rewards; returns the explained variance (T, M)."""
        state, settings, critic, normalizer = self.state, self.config.pretrain, self.critic, self.normalizer
        iteration = state.iteration
        whole = outcomes(rollout, self.world)
        state.images += rollout.total
        state.kept[iteration] = KnownScores.of(whole)
        for oldest in list(state.kept)[: -settings.kept_rollouts]:
            del state.kept[oldest]
        self._remember(rollout)
        whole = update_statistics(critic, normalizer, whole)
        like = rollout.latents.new_empty(0, device=self._device)
        self._update.prepare(step_tables(rollout.table, self.config.ppo, like))
        self._update.set_rates(_rate_factor(iteration / settings.iterations))
        generator = torch.Generator().manual_seed(derived_seed(self.config.seed, iteration))
        records = _learn_from(self._recent, self._update, normalizer, self.config, generator)
        if self.held_out is None:
            variance = rollout_variance(whole, normalizer)
        else:
            variance = held_out_variance(critic, self.held_out, normalizer, self.world)
        state.history.append(float(variance.mean()))
        state.explained_variance = variance
        self.log.write(
            "value_pretraining",
            iteration=iteration,
            explained_variance=variance.mean(dim=-1),
            **self.confidence.metrics(variance),
            **records.left_out(),
            **self._guard.metrics(),
        )
        if state.history[-1] > max(state.history[:-1], default=-math.inf) + ROUNDING:
            state.best_iteration = len(state.history)
            if self.held_out is not None:
                state.best = MeasuredCritic.of(critic, normalizer, variance)
        state.guard, state.microbatch_size = self._guard.state_dict(), self._update.microbatch.size
        return variance

    def _result(self) -> PretrainResult:
        """What was reached, with the best critic put back; `state` ends."""
        state = self.state
        if state.explained_variance is None:
            raise ValueError("value pretraining saw no rollout with usable rewards; see the warnings above")
        variance = state.explained_variance
        if state.best is not None:
            variance = state.best.restore(self.critic, self.normalizer)
        self.confidence.update(variance)
        result = PretrainResult(variance, state.history, state.images, self.confidence.bounds)
        state.end()
        return result


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
    kept_states = sum(states.num_steps * states.total for states in memory)
    for _ in range(math.ceil(settings.passes * kept_states / settings.minibatch_size)):
        states = memory[int(torch.randint(len(memory), (1,), generator=generator))]
        targets = value_targets(states.rewards, normalizer, config.ppo.target_clip)
        shuffled = Shuffled(
            *(all_states(states), generator, states.share),
            draw=config.ppo.minibatch_draw,
            even=config.shard > 1,
        )
        drawn = shuffled.between(0, min(settings.minibatch_size, shuffled.total))
        source = CriticSource(states, targets, update.tables.timesteps)
        gathered, minibatch = critic_minibatch(source, drawn, staging)
        update.find_size(gathered, reserved=missing_moments(update.optimizer))
        update.learn(gathered, minibatch, records)
    records.read()
    return records
