"""The weights that act: rollout i is of the policy that has seen the updates up to i - staleness.

So it can be made while the updates before it still run. That is a property of the algorithm: who samples, and
when, changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from lacfast.runtime.weights import in_place, on_host


class ActingWeights:
    """The policy's weights before the last `staleness` updates, on the host, for the rollouts to come.

    They are what a checkpoint holds of rollouts that are under way: trajectories are functions of weights,
    seed and iteration, and a LoRA is smaller than its rollouts.
    """

    def __init__(self, live: Mapping[str, Tensor], staleness: int) -> None:
        """
        Args:
            live: the tensors that training changes, see Backbone.policy_state.
            staleness: of every rollout, see TrainConfig; 0 keeps nothing.
        """
        self.live = live
        self.staleness = staleness
        self._kept: dict[int, dict[str, Tensor]] = {}

    def version(self, iteration: int) -> int:
        """How many iterations the weights have seen that make the rollout of an iteration."""
        return max(iteration - self.staleness, 0)

    def remember(self, iteration: int) -> None:
        """Keep the live weights before the update of `iteration`, and forget those that its rollout had."""
        if self.staleness:
            self._kept[iteration] = on_host(self.live)
            self._kept = {
                seen: kept for seen, kept in self._kept.items() if seen > iteration - self.staleness
            }

    def of(self, iteration: int, now: int) -> Mapping[str, Tensor]:
        """The weights that make the rollout of `iteration`; the live ones where they are those of `now`."""
        seen = self.version(iteration)
        return self.live if seen == now else self._kept[seen]

    @contextmanager
    def applied(self, iteration: int) -> Iterator[None]:
        """Within the context the model has the weights that make the rollout of `iteration`, the next."""
        weights = self.of(iteration, iteration)
        if weights is self.live:
            yield
            return
        with in_place(self.live, weights):
            yield

    def state_dict(self) -> dict[str, Any]:
        """Weights by the iterations that they have seen."""
        return {"kept": self._kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self._kept = dict(state["kept"])
