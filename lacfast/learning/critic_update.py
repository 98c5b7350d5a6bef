"""The critic's update: regression of its values on the returns of states that were kept for it."""

from __future__ import annotations

from torch import Tensor
from torch.optim import Optimizer

from lacfast.config import PPOConfig
from lacfast.critic.critic import Critic
from lacfast.critic.trunk import Features
from lacfast.distributed import ALONE, World
from lacfast.learning.batches import CriticBatch, CriticSource, GatheredSource
from lacfast.learning.gradient_guard import GradientGuard
from lacfast.learning.pairs import Pairs
from lacfast.learning.runner import EAGER, UpdateRunner
from lacfast.learning.totals import Totals, UpdateRecords
from lacfast.learning.update import Update
from lacfast.policy import States


class CriticUpdate(Update[CriticBatch, Totals]):
    """Optimizer steps of the critic towards the returns of states."""

    def __init__(
        self,
        critic: Critic,
        optimizer: Optimizer,
        config: PPOConfig,
        guard: GradientGuard,
        runner: UpdateRunner = EAGER,
        world: World = ALONE,
    ) -> None:
        """`critic` is trained in place; for the others see Update."""
        super().__init__(Totals, optimizer, config, guard, runner, world, modules=(critic,))
        self.critic = critic

    def learn(self, source: CriticSource | GatheredSource, minibatch: Pairs, records: UpdateRecords) -> None:
        """One optimizer step on `minibatch`, pairs of `source`."""
        records.add_critic(self.step(source, minibatch), self.guard, pairs=minibatch.total)

    def gradient(self, batch: CriticBatch) -> None:
        outputs = critic_outputs(self.critic, batch.states, batch.features)
        loss = self.critic.loss(outputs, batch.targets, batch.old_values, batch.mask) * batch.share
        loss.backward()  # type: ignore[no-untyped-call]
        self.totals.loss.add_(loss.detach())


def critic_outputs(critic: Critic, states: States, features: Features) -> Tensor:
    """The head's outputs (P, M, K) for states on `features` (P, ...) of the actor."""
    return critic.outputs(features, states.sample, states.timestep, states.conditioning)
