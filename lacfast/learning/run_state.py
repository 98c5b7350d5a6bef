"""The state of a run between two iterations, as a checkpoint holds it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from lacfast.advantages import AdvantageEstimator
from lacfast.backbone import Backbone
from lacfast.checkpoint import Notes, load_weights, read_state, save_run
from lacfast.config import TrainConfig, from_json, to_json
from lacfast.config.resumption import CHANGEABLE, require_resumable
from lacfast.learning.learner import Learner
from lacfast.rewards.registry import RewardSet


class Part(Protocol):
    """What keeps something from one iteration to the next."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Counts(NamedTuple):
    """How far a run is."""

    iteration: int
    images: int
    evaluated: int
    """The iteration that was evaluated last, -1: none."""


class RunState:
    """Weights, settings and everything else that the next iteration needs."""

    def __init__(
        self,
        backbone: Backbone,
        config: TrainConfig,
        rewards: RewardSet,
        estimator: AdvantageEstimator,
        learner: Learner,
        parts: Mapping[str, Part],
    ) -> None:
        """`parts` by their names in a checkpoint, besides estimator and learner."""
        self.backbone = backbone
        self.config = config
        self.rewards = rewards
        self.estimator = estimator
        self.learner = learner
        self.parts: dict[str, Part] = {"advantages": estimator, "learner": learner, **parts}

    def save(self, directory: Path, counts: Counts, notes: Notes | None, *, is_whole: bool) -> None:
        """Write all of it; see lacfast.checkpoint. All ranks call it.

        Raises:
            ValueError: unless `is_whole`; when that would delete something that no save has written.
        """
        if not is_whole:
            raise ValueError(
                "an update was cut off, so the weights are those of no iteration; load the checkpoint of "
                f"iteration {counts.iteration} or one before it"
            )
        state = {
            **counts._asdict(),
            "config": to_json(self.config),
            "rewards": self.rewards.names,
            "weights": self.rewards.weights.tolist(),
            **{name: part.state_dict() for name, part in self.parts.items()},
        }
        save_run(self.backbone, state, directory, notes, self.learner.world)

    def load(self, directory: Path) -> Counts:
        """Continue from what `save` wrote, in place; returns its counts.

        Raises:
            ValueError: when it is damaged or does not fit; nothing is changed then.
        """
        state = read_state(directory)
        self.require_fit(state)
        load_weights(self.backbone, directory)
        for name, part in self.parts.items():
            # Earlier versions had fewer parts: no confidence, no drift.
            if name in state:
                part.load_state_dict(state[name])
        if self.backbone.critic is not None:
            self.backbone.critic.rewards = self.estimator.heads
        # Earlier versions saved behind an evaluation that was due.
        iteration = state["iteration"]
        return Counts(iteration, state["images"], state.get("evaluated", iteration))

    def require_fit(self, state: dict[str, Any]) -> None:
        """
        Raises:
            ValueError: when the state in a checkpoint is of other rewards, settings or shapes.
        """
        own = dict(zip(self.rewards.names, self.rewards.weights.tolist(), strict=True))
        saved = dict(zip(state["rewards"], state.get("weights", own.values()), strict=False))
        if state["rewards"] != self.rewards.names or saved != own:
            raise ValueError(
                f"the checkpoint was trained on rewards {saved}, this trainer has {own}; use the same"
            )
        if "config" in state:
            require_resumable(from_json(TrainConfig, state["config"]), self.config, CHANGEABLE)
        self.estimator.require_fit(state["advantages"])
        self.learner.require_fit(state["learner"])
