"""The learner: minibatches of a rollout for the updates of policy and critic, and what lives between them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from lacfast.backbone import Backbone
from lacfast.checkpoint import require_same_shapes
from lacfast.config import ForwardProcess, TrainConfig
from lacfast.critic.states import state_bytes
from lacfast.distributed import ALONE, Sharding, World
from lacfast.distributed.sharding import gathered
from lacfast.learning.adaptive_kl import adapted_weight
from lacfast.learning.averaging import WeightAverage
from lacfast.learning.batches import CriticSource, PolicySource, critic_minibatch
from lacfast.learning.critic_update import CriticUpdate
from lacfast.learning.gradient_guard import GradientGuard
from lacfast.learning.hold import HeldSteps, held_minibatches
from lacfast.learning.kl_anchor import KLAnchor
from lacfast.learning.old_policy import OldPolicy
from lacfast.learning.optimizers import (
    critic_optimizer,
    critic_rate_factor,
    load_moments,
    missing_moments,
    policy_optimizer,
    policy_schedule,
    refresh,
    require_same_parameters,
    take_back,
)
from lacfast.learning.policy_update import PolicyUpdate
from lacfast.learning.readers import reader_for
from lacfast.learning.replay import Experience, ValueReplay
from lacfast.learning.runner import EAGER, GradientMemory, GraphedUpdate, UpdateRunner
from lacfast.learning.step_tables import StepTables, step_tables
from lacfast.learning.totals import UpdateRecords
from lacfast.records import Advantages, Rollout, TransitionTable
from lacfast.runtime.graph import GraphRunner, weights_of
from lacfast.runtime.host_memory import SLOTS, Staging
from lacfast.runtime.profiling import span
from lacfast.seeds import epoch_seed


class Learner:
    """The objective on the actor and regression on the critic, over one rollout at a time."""

    def __init__(
        self,
        backbone: Backbone,
        config: TrainConfig,
        graphs: GraphRunner | None = None,
        world: World = ALONE,
    ) -> None:
        """
        Args:
            backbone: its model and its critic are trained in place.
            config: of the run.
            graphs: captures the steps. None: they run eagerly.
            world: the ranks that learn the same weights, each from its own trajectories.
        """
        ppo = config.ppo
        anchor = None if ppo.anchor is None else backbone.frozen_anchor(ppo.anchor)
        if config.shard > 1:
            self._shard(backbone, anchor, config, world)
        parameters = backbone.policy_parameters()
        self.backbone = backbone
        self.config = config
        self.world = world
        self.failed = torch.zeros((), device=parameters[0].device)
        self.progress = 0.0
        """Share of the run that is behind, for the rates that fall."""
        self._graphs = GraphRunner() if graphs is None else graphs
        self._gradients = GradientMemory(self._weights)
        self.anchor = None
        if anchor is not None:
            self.anchor = KLAnchor(anchor, self._graphs, config.sampler.guidance_scale)
        self.hold = None
        if self.anchor is not None and ppo.hold is not None:
            self.hold = HeldSteps(backbone, self.anchor, config)
        self.critic_update = None
        if backbone.critic is not None:
            optimizer = critic_optimizer(backbone.critic, ppo)
            runner = self._runner("critic")
            guard = self._guard("critic")
            self.critic_update = CriticUpdate(backbone.critic, optimizer, ppo, guard, runner, world)
        self.old: OldPolicy | None = None
        """The average that a loss on the forward process compares with."""
        if isinstance(config.objective, ForwardProcess):
            self.old = OldPolicy(backbone.policy_state(), config.objective)
        self.policy_update = PolicyUpdate(
            *(
                backbone,
                policy_optimizer(parameters, ppo),
                config,
                self._guard("policy"),
                self._runner("policy"),
            ),
            anchor=None if ppo.kl is None else self.anchor,
            hold=self.hold,
            old=self.old if backbone.critic is None else None,
            reader=reader_for(self.critic_update),
            world=world,
        )
        self.policy_schedule = policy_schedule(
            *(self.policy_update.optimizer, ppo),
            progress=lambda: self.progress,
            halved=lambda: self.policy_update.guard.rate_factor,
        )
        self.replay = ValueReplay(ppo.critic_rollouts, world)
        self.average = WeightAverage(backbone.policy_state(), config.ema_decay) if config.ema_decay else None
        self._table: TransitionTable | None = None
        self._tables: StepTables | None = None
        if config.gradient_checkpointing:
            backbone.enable_gradient_checkpointing()

    @staticmethod
    def _shard(backbone: Backbone, anchor: Backbone | None, config: TrainConfig, world: World) -> None:
        """Divide the weights over the ranks: behind all that copies them, before all that holds them."""
        world.require_shards(config.shard)
        device = next(backbone.model.parameters()).device
        sharding = Sharding(world, config.shard, device, scatters=config.shard_gradients, span=span)
        if anchor is not None and anchor.model is not backbone.model:
            anchor.shard(sharding)
        backbone.shard(sharding)

    @property
    def updates(self) -> list[PolicyUpdate | CriticUpdate]:
        return [self.policy_update] + ([] if self.critic_update is None else [self.critic_update])

    @property
    def version(self) -> int:
        """Changes with the weights of the policy."""
        return self.policy_update.version

    def reset_critic_optimizer(self) -> None:
        """Forget the critic's moments and rates: joint training starts as if none had been."""
        if self.critic_update is not None:
            self.critic_update.runner.release()
            self.critic_update.optimizer = critic_optimizer(self.critic_update.critic, self.config.ppo)

    def learn(self, rollout: Rollout, advantages: Advantages, iteration: int) -> dict[str, Any]:
        """All passes over a rollout, in an order that depends on seed and iteration; returns their metrics.

        The host reads from the device once, at the end; with a kl_limit also after each step of the policy.

        Raises:
            FloatingPointError: for a gradient that is not finite, where config.on_bad_gradient does not leave
                its step out. Neither that step nor, under "raise", a later one has changed anything.
        """
        tables, ppo = self._prepare(rollout), self.config.ppo
        records = UpdateRecords(forward=self.old is not None)
        source = PolicySource(rollout, advantages, tables.timesteps)
        experience = self._experience(rollout, advantages)
        if experience is not None:
            self.replay.require_room(experience)
        self._find_sizes(source, experience)
        source = self.policy_update.completed(source)
        self.failed.zero_()
        refresh(self.policy_schedule)
        if self.critic_update is not None:
            self.critic_update.set_rates(critic_rate_factor(ppo, self.progress))
        is_stopped = False
        try:
            for epoch in range(ppo.num_inner_epochs):
                generator = torch.Generator().manual_seed(epoch_seed(self.config.seed, iteration, epoch))
                is_stopped = is_stopped or self._policy_pass(source, generator, records)
                if experience is not None:
                    self._critic_pass(experience, rollout.values, generator, records)
            records.read()
        except FloatingPointError:
            take_back(self.policy_schedule, records.policy_steps - len(records.policy))
            raise
        if experience is not None:
            self.replay.add(experience)
        if self.average is not None:
            self.average.update()
        if self.old is not None:
            self.old.follow(len(records.policy))
        metrics = records.metrics() | ({"stopped_by_kl_limit": True} if is_stopped else {})
        for update in self.updates:
            metrics |= update.guard.metrics()
        if self.hold is not None and records.policy:
            metrics["hold_distance"] = records.hold_distance
        if ppo.kl is not None and ppo.kl.target is not None and records.policy:
            weight, kl = self.policy_update.kl_weight, float(metrics["kl_ref"].nanmean())
            metrics["kl_weight"] = weight
            self.policy_update.kl_weight = adapted_weight(weight, kl, ppo.kl.target)
        return metrics

    def _policy_pass(self, source: PolicySource, generator: torch.Generator, records: UpdateRecords) -> bool:
        """One pass of the policy; returns whether the KL limit ended it."""
        ppo = self.config.ppo
        trained = self.policy_update.minibatches(source, generator)
        for minibatch, held in zip(trained, held_minibatches(source.rollout, ppo, generator), strict=True):
            if records.policy and records.policy[-1].mean_kl_old > ppo.kl_limit:
                return True
            self.policy_update.learn(source, minibatch, records, held)
            self.policy_schedule.step()
            if ppo.kl_limit < math.inf:
                records.read()
        return False

    def _critic_pass(
        self, today: Experience, old_values: Tensor, generator: torch.Generator, records: UpdateRecords
    ) -> None:
        """One pass of the critic: as many states as a rollout has, of the last rollouts."""
        ppo, update = self.config.ppo, self.critic_update
        assert update is not None
        # The same fields for every rollout, so that a graph fits all.
        bounds = old_values if ppo.critic_rollouts == 1 else None
        count, staging = ppo.critic_minibatches or ppo.num_minibatches, Staging(self.failed.device)
        even = self.config.shard > 1
        for experience, minibatch in self.replay.minibatches(
            today, count, generator, ppo.minibatch_draw, even=even
        ):
            targets, timesteps = experience.targets_for(update.critic), update.tables.timesteps
            source = CriticSource(experience, targets, timesteps, bounds)
            update.learn(*critic_minibatch(source, minibatch, staging), records)

    def _experience(self, rollout: Rollout, advantages: Advantages) -> Experience | None:
        """What the critic learns from; None without one, or where it does on the policy's own forward."""
        if self.critic_update is None or not self.config.critic.keep_features:
            return None
        return Experience.of(rollout, advantages.targets, self.critic_update.critic)

    def old_weights(self) -> AbstractContextManager[None]:
        """Within the context the model has the old policy's weights."""
        assert self.old is not None, "an objective on the forward process has an old policy"
        return self.old.applied()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the context the model has its averaged weights, whole ones: ranks may steer as they like."""
        whole = gathered(self.backbone.model, self.backbone.critic)
        if self.average is None:
            with whole:
                yield
            return
        # What is sampled within is not of the weights that learn.
        self.policy_update.version += 1
        try:
            with self.average.applied(), whole:
                yield
        finally:
            self.policy_update.version += 1

    def require_made_for(self, rollout: Rollout) -> None:
        """
        Raises:
            ValueError: for a chain where states noised anew are learned from, or the other way round.
        """
        if (rollout.forward_steps is None) != (self.old is None):
            made = "a chain" if rollout.forward_steps is None else "noised anew"
            raise ValueError(
                f"the rollout is {made}, which objective={self.config.objective} does not learn from; take "
                "what trainer.rollout, trainer.collect or trainer.next_rollout of the same objective returns"
            )

    def _prepare(self, rollout: Rollout) -> StepTables:
        """The rollout's tables, where the last ones were if they fit, as those of a window that moves.

        Nothing is copied for the same table again: a copy of host numbers waits for the device.
        """
        if self._tables is None or self._table is not rollout.table:
            self._table = rollout.table
            tables = step_tables(
                *(rollout.table, self.config.ppo, rollout.latents), forward=self.old is not None
            )
            if self._tables is not None and self._tables.layout == tables.layout:
                self._tables.copy_(tables)
            else:
                self._tables = tables
        for update in self.updates:
            update.prepare(self._tables)
        return self._tables

    def _find_sizes(self, source: PolicySource, experience: Experience | None) -> None:
        """Sizes of microbatches, at the first rollout, when nothing of size but it and the weights exists."""
        reserved = sum(missing_moments(update.optimizer) for update in self.updates)
        ppo = self.config.ppo
        if experience is not None and ppo.critic_rollouts > 1:
            # Minibatches of older rollouts come from the host.
            whole = experience.num_steps * experience.batch_size * state_bytes(experience)
            reserved += SLOTS * whole // (ppo.critic_minibatches or ppo.num_minibatches)
        self.policy_update.find_size(source, reserved=reserved)
        if experience is not None and self.critic_update is not None:
            states = CriticSource(experience, experience.targets, source.timesteps)
            self.critic_update.find_size(states, reserved=reserved)

    def _guard(self, what: str) -> GradientGuard:
        return GradientGuard(what, self.config.on_bad_gradient, self.failed)

    def _runner(self, name: str) -> UpdateRunner:
        """How an update's steps run."""
        if not self._graphs.captures:
            return EAGER
        return GraphedUpdate(
            *(name, self._graphs, self._weights, self._gradients, self._sums),
            self.backbone.forward_signature,
        )

    def _weights(self) -> dict[str, Tensor]:
        """All that an update reads and that an owner could replace."""
        modules = {"model": self.backbone.model}
        if self.critic_update is not None:
            modules["critic"] = self.critic_update.critic
        if self.anchor is not None:
            modules["anchor"] = self.anchor.backbone.model
        return weights_of(modules)

    def _sums(self) -> list[Tensor]:
        return [*(tensor for update in self.updates for tensor in update.totals.tensors), self.failed]

    @property
    def _first_kl_weight(self) -> float:
        penalty = self.config.ppo.kl
        return 0.0 if penalty is None else penalty.weight

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs besides the weights."""
        policy, critic = self.policy_update, self.critic_update
        return {
            "kl_weight": policy.kl_weight,
            "first_kl_weight": self._first_kl_weight,
            "average": None if self.average is None else self.average.weights,
            "old_policy": None if self.old is None else self.old.state_dict(),
            "policy_optimizer": policy.optimizer.state_dict(),
            "policy_schedule": {"last_epoch": self.policy_schedule.last_epoch},
            "critic_optimizer": None if critic is None else critic.optimizer.state_dict(),
            "guards": {update.guard.what: update.guard.state_dict() for update in self.updates},
            "replay": self.replay.state_dict(),
            "microbatch_sizes": (policy.microbatch.size, 0 if critic is None else critic.microbatch.size),
        }

    def require_fit(self, state: dict[str, Any]) -> None:
        """
        Raises:
            ValueError: when a `state_dict` is of other weights.
        """
        require_same_parameters(self.policy_update.optimizer, state["policy_optimizer"], "policy")
        if (self.critic_update is None) != (state["critic_optimizer"] is None):
            there, here = (
                "no critic" if missing else "a critic"
                for missing in (state["critic_optimizer"] is None, self.critic_update is None)
            )
            raise ValueError(
                f"the checkpoint was trained with {there}, this trainer has {here}; use its critic.trunk"
            )
        if self.critic_update is not None:
            require_same_parameters(self.critic_update.optimizer, state["critic_optimizer"], "critic")
        if self.average is not None and state["average"] is not None:
            require_same_shapes(self.average.weights, state["average"], "average of the weights")
        if self.old is not None:
            require_same_shapes(self.old.weights, state["old_policy"]["weights"], "old policy")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict` that fits, with this run's rates; the weights are loaded before."""
        policy, critic = self.policy_update, self.critic_update
        for update in self.updates:
            # torch makes new moments, not at the addresses of the old.
            update.runner.release()
        policy.version += 1
        for update in self.updates:
            # Earlier versions left no step out.
            if "guards" in state:
                update.guard.load_state_dict(state["guards"][update.guard.what])
        load_moments(policy.optimizer, state["policy_optimizer"])
        self.policy_schedule.last_epoch = state["policy_schedule"]["last_epoch"]
        refresh(self.policy_schedule)
        penalty = self.config.ppo.kl
        is_same = state.get("first_kl_weight", self._first_kl_weight) == self._first_kl_weight
        if penalty is not None and penalty.target is not None and state["kl_weight"] and is_same:
            policy.kl_weight = state["kl_weight"]
        if critic is not None:
            load_moments(critic.optimizer, state["critic_optimizer"])
        # Runs that were saved before rollouts were kept have none.
        self.replay.load_state_dict(state.get("replay", []), self.failed.device)
        # What was found by the free memory is kept: another size would round sums in another order.
        if not self.config.ppo.microbatch_size:
            for update, size in zip(self.updates, state["microbatch_sizes"], strict=False):
                update.microbatch.size = size
        if self.average is not None:
            self.average.load(state["average"] or self.backbone.policy_state())
        if self.old is not None:
            self.old.load_state_dict(state["old_policy"])
