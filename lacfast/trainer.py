"""The trainer: rollout, rewards, advantages, update. It holds only what must live between iterations."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lacfast.advantages import AdvantageEstimator
from lacfast.backbone import Backbone, attach_critic, require_gradients
from lacfast.checkpoint import Notes
from lacfast.config import TrainConfig
from lacfast.critic.critic import Critic
from lacfast.critic.values import rollout_variance, update_statistics
from lacfast.distributed import World
from lacfast.learning.early_stopping import EarlyStopping
from lacfast.learning.learner import Learner
from lacfast.learning.pretraining_state import KnownScores, PretrainingState
from lacfast.learning.run_state import Counts, Part, RunState
from lacfast.learning.value_bounds import ValueBounds, value_bounds
from lacfast.learning.value_confidence import ValueConfidence
from lacfast.learning.value_pretraining import PretrainingRollouts, PretrainResult, ValuePretraining
from lacfast.metrics import IterationMeter, MetricsLog, Tracker, evaluation_metrics, on_host, rollout_metrics
from lacfast.prompts import Draws, PromptSet, PromptSource
from lacfast.records import Advantages, Evaluation, Rollout, TransitionTable
from lacfast.rewards.heads import stack_rewards
from lacfast.rewards.normalizer import RewardNormalizer
from lacfast.rewards.registry import RewardSet, RewardSpec
from lacfast.rewards.reward import RewardError
from lacfast.rollout.actor import Actor
from lacfast.rollout.drift import LatentDrift
from lacfast.rollout.memory import HostRoom, RolloutMemory
from lacfast.rollout.outcomes import outcomes, own_rows
from lacfast.rollout.renoising import acting_sampler
from lacfast.rollout.sampler import RolloutSampler
from lacfast.rollout.scored import RewardFailures, Watcher, collect, evaluate, judged, unwatched
from lacfast.rollout.shares import require_ranks
from lacfast.rollout.source import RolloutSource
from lacfast.rollout.tables import TrainingTables
from lacfast.runtime.graph import EAGER, GraphRunner
from lacfast.runtime.memory import BatchSize
from lacfast.runtime.profiling import span
from lacfast.runtime.signals import Indivisible, held_back


class LatentActorCriticTrainer:
    """Latent actor-critic post-training of a diffusion model (arXiv 2605.27736).

    All draws are functions of (seed, iteration): a run that is saved and loaded goes on as if never stopped.
    """

    def __init__(
        self,
        backbone: Backbone,
        rewards: RewardSpec,
        prompts: PromptSet | PromptSource,
        config: TrainConfig | None = None,
        *,
        held_out: PromptSet | PromptSource | None = None,
        evaluation_rewards: RewardSpec | None = None,
        metrics_path: Path | None = None,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        """
        Args:
            backbone: see load_backbone; its model and critic are trained in place, a missing critic is made.
            rewards: a callable, a registered name, several of them, or a dict reward -> weight.
            prompts: strings, objects with `text` and `metadata`, or a file, directory or function of
                lacfast.load_prompts.
            config: defaults are the paper's.
            held_out: prompts for evaluation. None: the training prompts.
            evaluation_rewards: scores that are only reported (gold measures).
            metrics_path: JSONL file. None: no file is written.
            trackers: services that get the numbers besides.

        Raises:
            ValueError: for settings that cannot train, or a reward whose model or server is not there.
        """
        self.config = config or TrainConfig()
        require_gradients(backbone)
        self.world = require_ranks(self.config, World.current())
        self.backbone = backbone
        self.scorers = RewardSet.scorers((rewards, evaluation_rewards), backbone.judged_frames)
        self.rewards = self.scorers[0]
        self.prompts = PromptSet.create(prompts)
        self.held_out = self.prompts if held_out is None else PromptSet.create(held_out)
        RewardSet.require_judges(self.scorers, self.prompts, self.held_out)
        self.tables = TrainingTables.of(backbone, self.config)
        self.estimator = AdvantageEstimator(self.config, self.rewards.names, self.rewards.weights)
        scores = RewardSet.union(self.scorers).names
        self.early_stopping = EarlyStopping.create(self.config.early_stopping, scores)
        attach_critic(backbone, self.estimator.heads, self.config.critic, seed=self.config.seed)
        if self.config.compile:
            backbone.compile_blocks()
        self.graphs = GraphRunner(self.config.graph if self.config.shard == 1 else EAGER, self.device)
        self.sampler = RolloutSampler(backbone, self.critic, self.graphs)
        # The learner comes later: it is of the ranks that the source knows.
        acting = acting_sampler(self.sampler, self.config.objective, lambda: self.learner.old_weights())
        self.actor = Actor(backbone, acting, self.graphs, self.config)
        self.behaviour, self.rollout_sampler = self.actor.backbone, self.actor.sampler
        self.eval_part_size = BatchSize(self.config.eval_batch_size, unit="sample", setting="eval_batch_size")
        # Ranks start alike also where a kernel draws or loads otherwise.
        trained = [*backbone.policy_parameters(), *(() if self.critic is None else self.critic.parameters())]
        self.world.copy_from_first_(trained, "the first weights")
        self.source = RolloutSource(self.actor, self.rewards, self.tables, self.draws, self.world)
        self.learner = Learner(backbone, self.config, self.graphs, self.source.world)
        self.confidence, self.pretraining = ValueConfidence(), PretrainingState()
        self.drift = LatentDrift()
        self.log = MetricsLog(metrics_path, trackers)
        self.watch_evaluation: Watcher = unwatched
        self.iteration, self.images, self.evaluated = 0, 0, -1
        """The last is the iteration that `train` evaluated last."""
        self._planned = self.config.iterations
        self.indivisible = Indivisible()
        self.last_rollout: Rollout | None = None
        self._failures = RewardFailures(self.config.on_reward_error)

    @property
    def table(self) -> TransitionTable:
        """The schedule with all of the window stochastic."""
        return self.tables.whole

    @property
    def draws(self) -> Draws:
        return Draws(self.prompts, self.held_out, self.config)

    @property
    def critic(self) -> Critic | None:
        return self.backbone.critic

    @property
    def device(self) -> torch.device:
        return next(self.backbone.model.parameters()).device

    @property
    def normalizer(self) -> RewardNormalizer:
        """Units of the critic's values."""
        return self.estimator.normalizer

    def averaged(self) -> AbstractContextManager[None]:
        """Within the context the model has its averaged weights: for steering and for saving the result."""
        return self.learner.averaged()

    def rollout(self, prompts: PromptSet, first_id: int) -> Rollout:
        """Trajectories for `prompts`, without rewards; sample ids count from `first_id`."""
        version = self.learner.version
        parts = self.actor.parts(prompts, first_id, self.table, world=self.world, version=version)
        return RolloutMemory.of(parts, len(prompts), world=self.world)

    def collect(
        self,
        prompts: PromptSet,
        first_id: int,
        *,
        keep_features: bool = True,
        table: TransitionTable | None = None,
        room: HostRoom | None = None,
        known: KnownScores | None = None,
    ) -> Rollout | None:
        """A `rollout` with its rewards. None when one failed and config.on_reward_error is "skip".

        Without `keep_features` no critic can learn from it. `table` None: the whole window is stochastic.
        With `room` it lies on the host, with `known` scores it is made again. The last is released before.

        Raises:
            RewardError: under "raise", or when one rollout after the other was skipped; see `last_rollout`.
        """
        self.last_rollout = None
        parts = self.actor.parts(
            *(prompts, first_id, table or self.table),
            keep_features=keep_features,
            version=self.learner.version,
            world=self.world,
        )
        if known is not None:
            return known.given_to(RolloutMemory.of(parts, len(prompts), room, self.world))
        scored = collect(parts, len(prompts), self.backbone, self.rewards, room=room, world=self.world)
        return self._taken_in(*scored)

    def _taken_in(self, rollout: Rollout, error: RewardError | None) -> Rollout | None:
        """A rollout that was scored, or failed to be."""
        self.last_rollout = rollout
        self._failures.take_in(error, f"rollout of {rollout.total} images")
        self.images += rollout.total
        return rollout if error is None else None

    def next_rollout(self) -> Rollout | None:
        """The next iteration's rollout with its rewards, for `update`; None as in `collect`."""
        self.last_rollout, version = None, self.learner.version
        return self._taken_in(*self.source.rollout(self.iteration, version=version, last=self._planned - 1))

    def pretrain_critic(self, on_iteration: Callable[[int, Tensor], None] | None = None) -> PretrainResult:
        """Value pretraining with the actor frozen, or what is left of it; resets the critic's optimizer then.

        `on_iteration` gets the iteration and its explained variance (T, M).
        """
        if self.critic is None or self.learner.critic_update is None:
            raise ValueError("there is no critic to pretrain: critic.trunk is 'none'; set it to 'branch'")
        state, rollouts = self.pretraining, PretrainingRollouts(self.collect, self.draws, self.tables)
        held_out = rollouts.held_out(state.held_out)
        if not state.is_under_way:
            self.confidence = ValueConfidence()
            if held_out is not None and self.config.pretrain.completions:
                self.confidence.bounds = self.measure_bounds(held_out)
        pretraining = ValuePretraining(
            *(self.critic, self.learner.critic_update.optimizer, self.normalizer, self.config),
            *(state, held_out),
            confidence=self.confidence,
            log=self.log,
            world=self.world,
        )
        result = pretraining.run(rollouts.of, self.indivisible, on_iteration)
        self.learner.reset_critic_optimizer()
        return result

    def measure_bounds(self, rollout: Rollout) -> ValueBounds:
        """Floor and ceiling of the explained variance on a rollout of today's policy, some prompts twice."""
        bounds = value_bounds(self.behaviour, rollout, self.rewards, self.normalizer, self.config, self.world)
        self.images += bounds.images
        return bounds

    def advantages(self, rollout: Rollout) -> Advantages:
        """Advantages of a rollout with rewards, by config.advantages; taken into its statistics."""
        ppo = self.config.ppo
        gate = (ppo.gae_lambda, ppo.lambda_gate, self.table.num_steps)
        return self.estimator(rollout, None if math.isinf(gate[1]) else self.confidence.gated_lambda(*gate))

    def update(self, rollout: Rollout, *, progress: float | None = None) -> dict[str, Any]:
        """Learn from a rollout with rewards, which ends the iteration; returns its metrics.

        `update(next_rollout())` learns what `train_iteration` does, bit for bit. `progress` of the run, 0 to
        1; None: by config.iterations.

        Raises:
            FloatingPointError: for a gradient that is not finite, by config.on_bad_gradient.
        """
        behind = min(self.iteration / max(self.config.iterations, 1), 1.0)
        self.learner.progress = behind if progress is None else progress
        with self.indivisible(f"the update of iteration {self.iteration + 1}"):
            self.source.acting.remember(self.iteration)
            metrics = self._learn(rollout)
            self.iteration += 1
        return metrics

    def _learn(self, rollout: Rollout) -> dict[str, Any]:
        """Statistics of the rewards, advantages, and all passes over the rollout."""
        self.learner.require_made_for(rollout)
        whole, variance = outcomes(rollout, self.source.world), None
        if self.critic is None:
            self.normalizer.update(stack_rewards(whole))
        else:
            whole = update_statistics(self.critic, self.normalizer, whole)
            variance = rollout_variance(whole, self.normalizer)
            if not math.isinf(self.config.ppo.lambda_gate):
                self.confidence.update(variance)
        with span("advantages"):
            advantages = self.advantages(whole)
        metrics = rollout_metrics(whole, advantages, self.normalizer, variance) | self.estimator.metrics()
        if self.critic is not None and variance is not None:
            self.critic.rewards = self.estimator.heads
            metrics |= self.confidence.metrics(variance)
        return on_host(metrics | self.learner.learn(*own_rows(rollout, whole, advantages), self.iteration))

    def train_iteration(
        self, on_rollout: Callable[[Rollout], None] | None = None, *, progress: float | None = None
    ) -> dict[str, Any]:
        """One rollout and its update; returns its metrics, which are logged too.

        `on_rollout` gets the scored rollout first. `progress` is that of `update`.
        """
        meter = IterationMeter(self.graphs, self.world.traffic, compiles=self.config.compile)
        rollout = self.next_rollout()
        meter.end_rollout()
        if rollout is not None and on_rollout is not None:
            on_rollout(rollout)
        # What is learned is logged too, or a run that goes on would miss a line.
        with held_back(f"iteration {self.iteration + 1}"):
            if rollout is None:
                metrics: dict[str, Any] = {"skipped": True}
                self.source.acting.remember(self.iteration)
                self.iteration += 1
            else:
                metrics = self.update(rollout, progress=progress)
            metrics |= {"iteration": self.iteration, "images": self.images}
            metrics |= self.source.metrics | meter.metrics()
            self.log.write("train", **metrics)
        return metrics

    def train(
        self,
        iterations: int | None = None,
        *,
        seconds: float = math.inf,
        on_iteration: Callable[[dict[str, Any]], None] | None = None,
        on_evaluation: Callable[[Evaluation], None] | None = None,
    ) -> int:
        """Train for `iterations` (None: what config.iterations leaves) or `seconds`; returns how many ran.

        With config.eval_every the start is evaluated too, for it may be the best. An evaluation that is due
        comes before `on_iteration`: what is saved there knows of it. Ends early by config.early_stopping.
        On one of config.rollout_ranks it makes rollouts for the others, and `on_iteration` follows each.
        """
        if self.pretraining.is_under_way:
            self.pretrain_critic()
        start, first, done = time.perf_counter(), self.iteration, 0
        if self.source.is_server:
            with held_back("the rollouts that are wanted"):
                for number in self.source.served():
                    self.iteration = number
                    if on_iteration is not None:
                        on_iteration({"iteration": self.iteration})
            return self.iteration - first
        planned = max(self.config.iterations - self.iteration if iterations is None else iterations, 0)
        self._planned = first + planned
        with self.source.wanted():
            self._evaluate_when_due(on_evaluation)
            while done < planned and not self.early_stopping.is_exhausted:
                elapsed = self.source.world.of_first(time.perf_counter() - start, "the clock")
                if elapsed >= seconds:
                    break
                behind = self.iteration / self._planned
                metrics = self.train_iteration(progress=max(behind, elapsed / seconds))
                self._evaluate_when_due(on_evaluation)
                done += 1
                if on_iteration is not None:
                    on_iteration(metrics)
        return done

    def _evaluate_when_due(self, on_evaluation: Callable[[Evaluation], None] | None) -> None:
        """Evaluate unless it was done before a run was stopped; a skipped one is neither better nor worse."""
        every = self.config.eval_every
        if not every or self.iteration % every or self.evaluated == self.iteration:
            return
        self.source.order(self.iteration, self._planned - 1)
        evaluation = self._failures.unless_skipped(self.evaluate, f"evaluation of iteration {self.iteration}")
        if evaluation is None:
            self.log.write("skipped_evaluation", iteration=self.iteration)
            return
        if on_evaluation is not None:
            on_evaluation(evaluation)
        with held_back("this evaluation"):
            self.early_stopping.update(evaluation.means()[self.early_stopping.score])
            self.evaluated = self.iteration

    def evaluate(self, *, samples: int | None = None) -> Evaluation:
        """Score held-out prompts with averaged weights, config.eval_sampler and noise that never changes."""
        config, settings = self.config, self.config.eval_sampler or self.config.sampler
        with self.averaged():
            parts = judged(
                self.sampler,
                self.table if config.eval_sampler is None else self.backbone.transition_table(settings),
                self.draws.evaluation(samples),
                seed=config.seed,
                guidance_scale=settings.guidance_scale,
                part_size=self.eval_part_size,
                watcher=self.watch_evaluation,
                world=self.source.world,
            )
            evaluation = evaluate(parts, self.backbone, self.scorers, self.normalizer, self.source.world)
        drift = self.drift.update(evaluation)
        if self.world.is_first:
            metrics = evaluation_metrics(evaluation) | {"latent_drift": drift}
            self.log.write("evaluate", iteration=self.iteration, **metrics)
        return evaluation

    def close(self) -> None:
        """Close the log and its trackers, free captured graphs, and let ranks go that make rollouts alone."""
        for part in (self.source, self.log, self.sampler, self.rollout_sampler, self.graphs):
            part.close()

    def save(self, directory: str | Path, *, notes: Notes | None = None) -> None:
        """Write what `load` needs and JSON `notes` by file name; the directory appears whole or not at all.

        Raises:
            ValueError: when that would delete something in `directory` that no save has written.
        """
        counts = Counts(self.iteration, self.images, self.evaluated)
        self._state().save(Path(directory), counts, notes, is_whole=self.indivisible.is_whole)

    def load(self, directory: str | Path) -> None:
        """Continue from what `save` wrote, in place, with those settings of this trainer's that may change.

        Raises:
            ValueError: when it is damaged or does not fit this trainer; nothing is changed then.
        """
        self.iteration, self.images, self.evaluated = self._state().load(Path(directory))
        self.indivisible.is_whole, self.log.pretrained = True, self.pretraining.iteration

    def _state(self) -> RunState:
        parts: dict[str, Part] = {"early_stopping": self.early_stopping, "confidence": self.confidence}
        parts |= {"value_pretraining": self.pretraining, "acting": self.source.acting, "drift": self.drift}
        return RunState(self.backbone, self.config, self.rewards, self.estimator, self.learner, parts)
