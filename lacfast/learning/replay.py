"""What the critic learns from after a rollout: its states, and those of the rollouts before it.

The policy must learn from its own trajectories; what states are worth changes little from one rollout to the
next, so the critic may see a state more than once. Experience replay: L.-J. Lin, Machine Learning 8, 1992.
States of older rollouts lie on the host, and come to the device by the minibatch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Generic, Self, TypeVar

import torch
from torch import Tensor

from lacfast.critic.critic import Critic
from lacfast.critic.trunk import Features
from lacfast.learning.pairs import Pairs, all_states, minibatches
from lacfast.records import Conditioning, Rollout
from lacfast.rewards.heads import stack_rewards
from lacfast.transfer import to_device


@dataclass(frozen=True)
class KeptStates:
    """The states of a rollout, all that a critic reads of them."""

    latents: Tensor
    """(T, B, ...), before each step."""
    features: Features
    """name -> (T, B, ...)"""
    conditioning: Conditioning
    """(B, ...)"""

    @property
    def num_steps(self) -> int:
        return self.latents.shape[0]

    @property
    def batch_size(self) -> int:
        return self.latents.shape[1]

    def on_host(self) -> Self:
        """The same with its states on the host; what they were worth, a few numbers, stays where it is."""
        features = {name: tensor.cpu() for name, tensor in self.features.items()}
        conditioning = self.conditioning.to("cpu")
        return replace(self, latents=self.latents.cpu(), features=features, conditioning=conditioning)

    def state(self) -> dict[str, Any]:
        """All of it for a checkpoint."""
        return vars(self) | {"conditioning": self.conditioning.tensors}

    @classmethod
    def from_state(cls, state: dict[str, Any], device: torch.device) -> Self:
        """What `state` gave, with the states on the host and the rest on the device of the model."""
        own = [each.name for each in fields(cls) if each.name not in ("features", "conditioning")]
        kept = cls(
            **{name: state[name].to(device if name != "latents" else "cpu") for name in own},
            features=state["features"],
            conditioning=Conditioning(state["conditioning"]),
        )
        return kept.on_host()


@dataclass(frozen=True)
class Experience(KeptStates):
    """The states of a rollout and what they were worth, in the critic's units of that time."""

    targets: Tensor
    """(B, M) standardised and clipped, in the units of that time."""
    reward_mean: Tensor
    """(M,) raw reward of target 0."""
    reward_std: Tensor
    """(M,) raw reward in one unit of the targets."""

    @staticmethod
    def of(rollout: Rollout, targets: Tensor, critic: Critic) -> Experience:
        """A rollout whose rewards are in the critic's units already."""
        return Experience(
            rollout.latents[:-1],
            rollout.features,
            rollout.conditioning,
            targets,
            critic.reward_mean.clone(),
            critic.reward_std.clone(),
        )

    def targets_for(self, critic: Critic) -> Tensor:
        """(B, M) in the critic's units of today."""
        raw = self.targets * self.reward_std + self.reward_mean
        return ((raw - critic.reward_mean) / critic.reward_std).to(self.targets.dtype)


@dataclass(frozen=True)
class RewardedStates(KeptStates):
    """The states of a rollout of value pretraining, with its raw rewards."""

    rewards: Tensor
    """(B, M) of the M rewards."""

    @staticmethod
    def of(rollout: Rollout, device: torch.device) -> RewardedStates:
        """A rollout with rewards, which go to the `device` of the critic."""
        rewards = to_device(stack_rewards(rollout), device)
        return RewardedStates(rollout.latents[:-1], rollout.features, rollout.conditioning, rewards)


Kept = TypeVar("Kept", bound=KeptStates)


class StateMemory(Generic[Kept]):
    """The last few rollouts as the critic reads them, on the host."""

    def __init__(self, kind: type[Kept], rollouts: int) -> None:
        """`rollouts`: that are kept, the latest; 0 keeps none."""
        self._kind = kind
        self._kept: deque[Kept] = deque(maxlen=rollouts)

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[Kept]:
        return iter(self._kept)

    def __getitem__(self, index: int) -> Kept:
        return self._kept[index]

    def add(self, states: Kept) -> None:
        """Keep the latest, and forget the oldest before."""
        if self._kept.maxlen:
            if len(self._kept) == self._kept.maxlen:
                self._kept.popleft()
            self._kept.append(states.on_host())

    def state_dict(self) -> list[dict[str, Any]]:
        """State of all that is kept."""
        return [states.state() for states in self._kept]

    def load_state_dict(self, states: Sequence[dict[str, Any]], device: torch.device) -> None:
        """Continue from a `state_dict`, for a model on `device`."""
        self._kept.clear()
        self._kept.extend(self._kind.from_state(state, device) for state in states)


class ValueReplay(StateMemory[Experience]):
    """The rollouts before today's that a pass of the critic draws from."""

    def __init__(self, rollouts: int) -> None:
        """`rollouts`: that a pass draws from, today's included; 1 keeps none."""
        super().__init__(Experience, rollouts - 1)

    def minibatches(
        self, today: Experience, count: int, generator: torch.Generator
    ) -> Iterator[tuple[Experience, Pairs]]:
        """`count` minibatches, which together have as many states as today's rollout.

        Each is of one rollout, drawn at random, and has states of it that no earlier one had; its pairs lie
        where the rollout does.

        Raises:
            ValueError: for fewer states than minibatches.
        """
        known = [*self, today]
        parts = [list(minibatches(all_states(experience), count, generator)) for experience in known]
        for part in range(count):
            drawn = int(torch.randint(len(known), (), generator=generator)) if len(self) else 0
            yield known[drawn], parts[drawn][part]
