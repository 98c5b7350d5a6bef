"""The old policy of a loss on the forward process: an average of the policy's weights that follows it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lacfast.config import ForwardProcess
from lacfast.learning.averaging import WeightAverage


class OldPolicy(WeightAverage):
    """An average whose decay follows the objective's schedule, see ForwardProcess."""

    def __init__(self, live: Mapping[str, Tensor], objective: ForwardProcess) -> None:
        """
        Args:
            live: the tensors that training changes, see Backbone.policy_state.
            objective: has the schedule.
        """
        super().__init__(live, objective.decay(0))
        self.objective = objective
        self.optimizer_steps = 0
        """Steps of the policy since the run began."""

    def follow(self, optimizer_steps: int) -> None:
        """Take in the weights after so many more optimizer steps, those of an iteration."""
        self.optimizer_steps += optimizer_steps
        self.decay = self.objective.decay(self.optimizer_steps)
        self.update()

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs."""
        return {"weights": self.weights, "optimizer_steps": self.optimizer_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict` of the same model."""
        self.load(state["weights"])
        self.optimizer_steps = state["optimizer_steps"]
