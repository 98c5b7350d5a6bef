"""What the critic takes from the policy's training forward: nothing, a joint gradient, or its features."""

from __future__ import annotations

from torch import Tensor

from lacfast.critic.critic import Critic
from lacfast.critic.trunk import Features
from lacfast.learning.batches import CriticBatch, PolicyBatch
from lacfast.learning.critic_update import CriticUpdate, critic_outputs
from lacfast.learning.totals import UpdateRecords


class Reader:
    """What the critic takes from the policy's training forward; this one takes nothing."""

    critic: Critic | None = None
    """The critic whose features the forward records."""
    is_detached = True
    """Cut them off the actor's graph."""

    def joined(self, loss: Tensor, batch: PolicyBatch, features: Features) -> Tensor:
        """The loss () whose gradient the actor follows."""
        return loss

    def begin(self) -> None:
        """Before the policy's microbatches."""

    def learn(self, batch: PolicyBatch, features: Features) -> None:
        """After each."""

    def finish(self, records: UpdateRecords, pairs: int) -> None:
        """After the policy's optimizer step on `pairs` pairs."""


class JointGradient(Reader):
    """The gradient of the values enters the actor; the head itself learns in the critic's update."""

    is_detached = False

    def __init__(self, critic: Critic) -> None:
        self.critic: Critic = critic

    def joined(self, loss: Tensor, batch: PolicyBatch, features: Features) -> Tensor:
        critic = self.critic
        outputs = critic_outputs(critic, batch.states, features)
        return loss + critic.config.joint_weight * critic.loss(outputs, batch.targets, mask=batch.mask)


class RecordedFeatures(Reader):
    """The critic learns on the features of the actor's own forward, so that the rollout need not keep any."""

    def __init__(self, update: CriticUpdate) -> None:
        self.critic = update.critic
        self.update = update

    def begin(self) -> None:
        self.update.begin()

    def learn(self, batch: PolicyBatch, features: Features) -> None:
        self.update.gradient(
            CriticBatch(batch.states, features, batch.targets, batch.old_values, batch.share, batch.mask)
        )

    def finish(self, records: UpdateRecords, pairs: int) -> None:
        records.add_critic(self.update.finish(), self.update.guard, pairs=pairs)


def reader_for(update: CriticUpdate | None) -> Reader:
    """The part that the critic's config gives it."""
    if update is None:
        return Reader()
    if update.critic.config.trunk == "joint":
        return JointGradient(update.critic)
    return Reader() if update.critic.config.keep_features else RecordedFeatures(update)
