"""Where the rollout of an iteration comes from: this rank, or ranks that do nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

from lacfast.critic.values import rollout_values
from lacfast.distributed import Bridge, LostRankError, World
from lacfast.prompts import Draws
from lacfast.rewards.registry import RewardSet
from lacfast.rollout.acting import ActingWeights
from lacfast.rollout.actor import Actor
from lacfast.rollout.apart import RolloutRanks, serve
from lacfast.rollout.scored import Scored, collect
from lacfast.rollout.tables import TrainingTables
from lacfast.runtime.profiling import span


class RolloutSource:
    """The scored rollouts of a run's iterations, whichever ranks make them."""

    def __init__(
        self, actor: Actor, rewards: RewardSet, tables: TrainingTables, draws: Draws, world: World
    ) -> None:
        """
        Args:
            actor: makes those that are made here.
            rewards: that score them.
            tables: of the iterations.
            draws: of their prompts.
            world: of all ranks, of which config.rollout_ranks do nothing else.

        Raises:
            ValueError: for more of these than leave one that learns.
        """
        config = actor.config
        self.actor = actor
        self.rewards = rewards
        self.tables = tables
        self.draws = draws
        self.acting = ActingWeights(actor.trained.policy_state(), config.staleness)
        self.world = world
        """The ranks that do the same as this one: they learn together, or make rollouts together."""
        self.metrics: dict[str, float] = {}
        """What the rollout that was handed out last says of its staleness, and of waiting and sending."""
        self.ranks: RolloutRanks | None = None
        self._bridge: Bridge | None = None
        if config.rollout_ranks:
            self._bridge = Bridge(world, config.rollout_ranks, staleness=config.staleness)
            self.world = self._bridge.own
            if self._bridge.is_learner:
                device = next(actor.trained.model.parameters()).device
                self.ranks = RolloutRanks(self._bridge, self.acting, config.batch_size, device)

    @property
    def is_server(self) -> bool:
        """Whether this rank makes rollouts and nothing else."""
        return self._bridge is not None and not self._bridge.is_learner

    def order(self, iteration: int, last: int) -> None:
        """Have the next rollouts made while this rank does something else, where others make them."""
        if self.ranks is not None:
            self.ranks.order(iteration, last)

    def rollout(self, iteration: int, *, version: int, last: int) -> Scored:
        """The rollout of an iteration, the next that is learned from, with today's critic's values.

        Args:
            iteration: its number.
            version: Learner.version of today's weights.
            last: iteration up to which rollouts may be made meanwhile.

        Raises:
            LostRankError: when another rank ended or hangs.
        """
        if self.ranks is None:
            with self.acting.applied(iteration):
                rollout, error = self.made(iteration, version)
        else:
            rollout, error = self.ranks.rollout(iteration, last)
            rollout = replace(rollout, table=self.tables.at(iteration), policy_version=self._known(version))
        if self.acting.staleness or self.ranks is not None:
            self.metrics = {"staleness": iteration - self.acting.version(iteration)}
            self.metrics |= {} if self.ranks is None else self.ranks.metrics
        critic = self.actor.trained.critic
        if critic is not None and not rollout.values.shape[-1]:
            with span("rollout/values"):
                rollout = replace(rollout, values=rollout_values(critic, rollout))
        return rollout, error

    def made(self, iteration: int, version: int | None = None) -> Scored:
        """The rollout of an iteration by the weights that the model has, made with the ranks of `world`."""
        config, prompts = self.actor.config, self.draws.training(iteration)
        parts = self.actor.parts(
            *(prompts, iteration * config.batch_size, self.tables.at(iteration)),
            keep_features=config.critic.keep_features,
            # Of a stale rollout the critic of the time of learning tells the values.
            valued=config.staleness == 0 and not self.is_server,
            version=None if version is None else self._known(version),
            world=self.world,
        )
        return collect(parts, len(prompts), self.actor.trained, self.rewards, world=self.world)

    def _known(self, version: int) -> int | None:
        """The version of the weights that make a rollout where they are today's."""
        is_todays = self.acting.staleness == 0 and self.actor.backbone is self.actor.trained
        return version if is_todays else None

    def served(self) -> Iterator[int]:
        """Make rollouts as long as they are wanted; yields, after each, the iteration behind it."""
        assert self._bridge is not None, "a rank that learns serves nobody"
        for number in serve(self._bridge, self.acting.live, self.made, self.actor.config.batch_size):
            yield number + 1

    @contextmanager
    def wanted(self) -> Iterator[None]:
        """Within the context ranks that do nothing else make rollouts; then what is under way comes in.

        An error that ends it is not held up by that.
        """
        if self.ranks is None:
            yield
            return
        try:
            yield
        except BaseException:
            # One that is lost cannot be told.
            with suppress(LostRankError):
                self.ranks.end(wait=False)
            raise
        self.ranks.end(wait=True)

    def close(self) -> None:
        """Go on when everything that was sent has arrived."""
        if self.ranks is not None:
            self.ranks.close()
