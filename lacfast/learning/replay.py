"""What the critic learns from after a rollout: its states, and those of the rollouts before it.

The policy must learn from its own trajectories; what states are worth changes little from one rollout to the
next, so the critic may see a state more than once. Experience replay: L.-J. Lin, Machine Learning 8, 1992.
States of older rollouts lie on the host, and come to the device by the minibatch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
from torch import Tensor

from lacfast.critic.critic import Critic
from lacfast.critic.trunk import Features
from lacfast.distributed import ALONE, Share, World
from lacfast.learning.pairs import Pairs, all_states, minibatches
from lacfast.records import Conditioning, Rollout
from lacfast.rewards.heads import stack_rewards
from lacfast.rollout.memory import HostRoom
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
    share: Share | None = field(default=None, kw_only=True)
    """Rows of the whole batch that these are, where several ranks have it; None: all."""
    by_row: ClassVar[tuple[str, ...]] = ()
    """Names of a subclass's fields (B, ...)."""

    @property
    def num_steps(self) -> int:
        return self.latents.shape[0]

    @property
    def batch_size(self) -> int:
        return self.latents.shape[1]

    @property
    def total(self) -> int:
        """Trajectories of the whole batch."""
        return self.batch_size if self.share is None else self.share.total

    @property
    def nbytes(self) -> int:
        """Bytes of the states."""
        kept = [self.latents, *self.features.values(), *self.conditioning.tensors.values()]
        return sum(tensor.nbytes for tensor in kept)

    def _mapped(
        self, stacked: Callable[[Tensor], Tensor], by_row: Callable[[Tensor], Tensor], share: Share | None
    ) -> Self:
        """Other tensors in place of those (T, B, ...) and of those (B, ...)."""
        prompts = self.conditioning.tensors
        return replace(
            self,
            latents=stacked(self.latents),
            features={name: stacked(tensor) for name, tensor in self.features.items()},
            conditioning=Conditioning({name: by_row(tensor) for name, tensor in prompts.items()}),
            **{name: by_row(getattr(self, name)) for name in self.by_row},
            share=share,
        )

    def on_host(self) -> Self:
        """The same with its states on the host; what they were worth, a few numbers, stays where it is."""
        features = {name: tensor.cpu() for name, tensor in self.features.items()}
        conditioning = self.conditioning.to("cpu")
        return replace(self, latents=self.latents.cpu(), features=features, conditioning=conditioning)

    def of_all(self, world: World) -> Self:
        """The rows of all ranks on the first one; on another its own."""
        if self.share is None:
            return self
        whole = partial(world.rows_on_first, what="the states of older rollouts")
        return self._mapped(partial(whole, dim=1), whole, None)

    def of_share(self, share: Share) -> Self:
        """Some of the rows of a whole batch, copied: the rest of it need not stay."""
        rows = share.rows
        return self._mapped(
            lambda tensor: tensor[:, rows].clone(), lambda tensor: tensor[rows].clone(), share
        )

    def state(self) -> dict[str, Any]:
        """All of it for a checkpoint."""
        state = vars(self) | {"conditioning": self.conditioning.tensors}
        del state["share"]
        return state

    @classmethod
    def from_state(cls, state: dict[str, Any], device: torch.device) -> Self:
        """What `state` gave, with the states on the host and the rest on the device of the model."""
        own = [each.name for each in fields(cls) if each.name not in ("features", "conditioning", "share")]
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
    by_row = ("targets",)

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
            share=rollout.share,
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
    by_row = ("rewards",)

    @staticmethod
    def of(rollout: Rollout, device: torch.device) -> RewardedStates:
        """A rollout with rewards, which go to the `device` of the critic."""
        states = rollout.latents[:-1], rollout.features, rollout.conditioning
        return RewardedStates(*states, to_device(stack_rewards(rollout), device), share=rollout.share)


Kept = TypeVar("Kept", bound=KeptStates)


class StateMemory(Generic[Kept]):
    """The last few rollouts as the critic reads them, on the host."""

    def __init__(self, kind: type[Kept], rollouts: int, world: World = ALONE) -> None:
        """
        Args:
            kind: of states.
            rollouts: that are kept, the latest; 0 keeps none.
            world: the ranks that have them together.
        """
        self._kind = kind
        self._world = world
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
        """State of all that is kept, whole on the first rank; every rank asks for it."""
        return [states.of_all(self._world).state() for states in self._kept]

    def load_state_dict(self, states: Sequence[dict[str, Any]], device: torch.device) -> None:
        """Continue from a whole `state_dict`, for a model on `device`."""
        self._kept.clear()
        for state in states:
            kept = self._kind.from_state(state, device)
            self._kept.append(
                kept if self._world.size == 1 else kept.of_share(self._world.share(kept.batch_size))
            )


class ValueReplay(StateMemory[Experience]):
    """The rollouts before today's that a pass of the critic draws from."""

    def __init__(self, rollouts: int, world: World = ALONE) -> None:
        """
        Args:
            rollouts: that a pass draws from, today's included; 1 keeps none.
            world: see StateMemory.
        """
        super().__init__(Experience, rollouts - 1, world)
        self._room: HostRoom | None = None

    def require_room(self, today: Experience) -> None:
        """Ask the host, once, for room for as many rollouts like today's as are kept.

        Raises:
            ValueError: when it has less free.
        """
        count = self._kept.maxlen
        if count and self._room is None:
            self._room = HostRoom(count * today.batch_size, f"lower ppo.critic_rollouts={count + 1}")
            self._room.require(today.nbytes // today.batch_size)

    def minibatches(
        self,
        today: Experience,
        count: int,
        generator: torch.Generator,
        draw: str = "free",
        *,
        even: bool = False,
    ) -> Iterator[tuple[Experience, Pairs]]:
        """`count` minibatches, which together have as many states as today's rollout.

        `draw` and `even` as in pairs.minibatches.

        Each is of one rollout, drawn at random, and has states of it that no earlier one had; its pairs lie
        where the rollout does.

        Raises:
            ValueError: for fewer states than minibatches.
        """
        known = [*self, today]
        parts = [
            list(
                minibatches(
                    *(all_states(experience), count, generator),
                    share=experience.share,
                    draw=draw,
                    even=even,
                )
            )
            for experience in known
        ]
        for part in range(count):
            drawn = int(torch.randint(len(known), (), generator=generator)) if len(self) else 0
            yield known[drawn], parts[drawn][part]
