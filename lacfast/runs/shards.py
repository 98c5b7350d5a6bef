"""What sharded weights take and send: bytes on paper, of the same blocks that training gathers."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from lacfast.backbone import Backbone
from lacfast.distributed.sharding import Divisible


@dataclass(frozen=True)
class Part:
    """A block that is gathered on its own, or all else of a module."""

    kept: int
    """Bytes of its weights where they are divided."""
    gathered: int
    """Bytes of its weights when they are whole."""
    gradient: int
    """Bytes of its gradient in float32; 0 where it is frozen."""


@dataclass(frozen=True)
class Divided:
    """A module with divided weights: the model, the critic's own blocks."""

    parts: tuple[Part, ...] = ()

    @property
    def kept(self) -> int:
        """Bytes of the weights, of all ranks of a group together."""
        return sum(part.kept for part in self.parts)

    @property
    def gathered(self) -> int:
        """Bytes when all weights are whole, as they are while a rollout is sampled."""
        return sum(part.gathered for part in self.parts)

    @property
    def gradient(self) -> int:
        """Bytes of the gradients."""
        return sum(part.gradient for part in self.parts)

    def at_work(self, *, scatters: bool) -> int:
        """Bytes beside the divided weights in forward and backward: two blocks and the rest of the module,
        gradients of two blocks, or of all until the last microbatch unless each `scatters` them."""
        if not self.parts:
            return 0
        *blocks, rest = self.parts
        blocks = sorted(blocks, key=lambda part: part.gathered)[-2:]
        gathered = rest.gathered + sum(part.gathered for part in blocks)
        if scatters:
            return gathered + rest.gradient + sum(part.gradient for part in blocks)
        return gathered + self.gradient


@dataclass
class Shards:
    """What a backbone would divide over `count` ranks; itself it divides nothing."""

    count: int = 1
    modules: list[Divided] = field(default_factory=list)

    @staticmethod
    def of(backbone: Backbone, count: int) -> Shards:
        """What is divided of model and critic; nothing for a `count` of 1."""
        found = Shards(count)
        if count > 1:
            backbone.shard(found)
        return found

    def divide(self, module: Divisible) -> None:
        """See lacfast.distributed.Sharding."""
        self.modules.append(Divided(tuple(_part(weights, module.dtype) for _, weights in module.parts())))

    @property
    def model(self) -> Divided:
        """The model."""
        return self.modules[0] if self.modules else Divided()

    @property
    def critic(self) -> Divided:
        """The critic's own blocks."""
        return self.modules[1] if len(self.modules) > 1 else Divided()

    @property
    def gathered(self) -> int:
        """Bytes of all that is whole while a rollout is sampled."""
        return self.model.gathered + self.critic.gathered

    def saved(self, size: int) -> int:
        """Bytes of `size` that a rank does without."""
        return size - -(-size // self.count)


def _part(weights: list[nn.Parameter], dtype: torch.dtype) -> Part:
    is_trained = any(weight.requires_grad for weight in weights)
    kept = sum(weight.nbytes for weight in weights)
    numbers = sum(weight.numel() for weight in weights)
    return Part(kept, numbers * dtype.itemsize if is_trained else kept, 4 * numbers if is_trained else 0)
