"""How far value pretraining is, as a checkpoint holds it: all but the rollouts, which a run makes again.

The actor is frozen, and trajectories are functions of seed and iteration, so of a rollout its scores suffice.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from torch import Tensor

from lacfast.checkpoint import load_in_place
from lacfast.config import TrainConfig
from lacfast.critic.critic import Critic
from lacfast.distributed import World
from lacfast.distributed.sharding import whole_on_first
from lacfast.records import Rollout
from lacfast.rewards.normalizer import RewardNormalizer


@dataclass(frozen=True)
class KnownScores:
    """What the rewards said of a rollout of all ranks that is made again."""

    prompts: list[str]
    """B of them."""
    rewards: dict[str, Tensor]
    """name -> (B,)"""

    @staticmethod
    def of(rollout: Rollout) -> KnownScores:
        """A rollout with rewards."""
        return KnownScores(rollout.prompts, rollout.rewards)

    def given_to(self, rollout: Rollout) -> Rollout:
        """The rollout with its rows of the rewards.

        Raises:
            ValueError: for one of other prompts.
        """
        rows = slice(None) if rollout.share is None else rollout.share.rows
        if rollout.prompts != self.prompts[rows]:
            raise ValueError(
                "value pretraining goes on from rollouts that are made again, and their prompts are others "
                "now; give those that the run began with until it is through, or begin another with --out"
            )
        return rollout.with_rewards({name: scores[rows] for name, scores in self.rewards.items()})


@dataclass(frozen=True)
class MeasuredCritic:
    """A critic as it was when it was measured."""

    weights: dict[str, Tensor]
    normalizer: dict[str, Any]
    """Its state."""
    explained_variance: Tensor
    """(T, M)"""

    @staticmethod
    def of(critic: Critic, normalizer: RewardNormalizer, explained_variance: Tensor) -> MeasuredCritic:
        weights = {name: tensor.detach().clone() for name, tensor in critic.state_dict().items()}
        return MeasuredCritic(weights, normalizer.state_dict(), explained_variance)

    def restore(self, critic: Critic, normalizer: RewardNormalizer) -> Tensor:
        """Put both back; returns the explained variance (T, M)."""
        load_in_place(critic.state_dict(), self.weights, "best critic")
        normalizer.load_state_dict(self.normalizer)
        return self.explained_variance


@dataclass
class PretrainingState:
    """Value pretraining between two of its iterations. Only `iteration` outlives it."""

    iteration: int = 0
    """Iterations that are behind."""
    is_under_way: bool = False
    """Whether it has begun and not ended."""
    held_out: KnownScores | None = None
    """Scores of the rollout that measures it."""
    images: int = 0
    """Generated so far."""
    history: list[float] = field(default_factory=list)
    """Mean explained variance of every iteration that was not skipped."""
    explained_variance: Tensor | None = None
    """(T, M), the last."""
    best: MeasuredCritic | None = None
    best_iteration: int = 0
    """Place in `history`, from 1."""
    kept: dict[int, KnownScores] = field(default_factory=dict)
    """Iteration -> scores of the rollouts that are learned from."""
    guard: dict[str, Any] = field(default_factory=dict)
    """State of the critic's GradientGuard."""
    microbatch_size: int = 0
    rollout_precision: str = ""
    """Precision of the policy that made the rollouts."""

    def begin(self, held_out: KnownScores | None, rollout_precision: str) -> None:
        """Start anew, behind the rollout that measures."""
        images = 0 if held_out is None else len(held_out.prompts)
        begun = PretrainingState(
            is_under_way=True, held_out=held_out, images=images, rollout_precision=rollout_precision
        )
        vars(self).update(vars(begun))

    def require_fit(self, config: TrainConfig) -> None:
        """
        Raises:
            ValueError: when the rollouts that are made again would be others.
        """
        if self.rollout_precision != config.rollout_precision:
            raise ValueError(
                f"value pretraining goes on from rollouts of rollout_precision={self.rollout_precision!r}, "
                "which are made again; keep it until it is through, or begin another run with --out"
            )

    def end(self) -> None:
        """Forget all but how many iterations there were."""
        vars(self).update(vars(PretrainingState(self.iteration)))

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors, whole ones on the first rank; all ranks call it."""
        best = self.best
        if best is not None:
            weights = whole_on_first(best.weights, World.current(), "the weights of the best critic")
            best = replace(best, weights=weights)
        return asdict(replace(self, best=best))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        vars(self).update({each.name: state[each.name] for each in fields(self)})
        if state["held_out"] is not None:
            self.held_out = KnownScores(**state["held_out"])
        if state["best"] is not None:
            self.best = MeasuredCritic(**state["best"])
        self.kept = {iteration: KnownScores(**known) for iteration, known in state["kept"].items()}
