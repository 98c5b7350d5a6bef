"""A control: the critic chooses which trajectories are scored and learnt from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from torch import Tensor

from lacfast.prompts import PromptSet
from lacfast.records import Rollout, TransitionTable
from lacfast.rollout.actor import Actor
from lacfast.rollout.memory import RolloutMemory, rows_of
from lacfast.trainer import LatentActorCriticTrainer

CANDIDATES = 4
"""Trajectories of a prompt, of which one is chosen: as many as steering has."""
LAST_STATES = 2
"""States before the end whose mean V chooses; behind them hardly anything changes."""
Choice = Literal["best", "extremes"]
"""The highest V, or the highest for one prompt and the lowest for the next."""


def choose(trainer: LatentActorCriticTrainer, choice: Choice) -> None:
    """Have the critic choose among the trajectories of the trainer's rollouts from here on."""
    trainer.actor = trainer.source.actor = _ChoosingActor(trainer, choice)


class _ChoosingActor(Actor):
    """Samples CANDIDATES trajectories of every prompt and hands one of them on."""

    def __init__(self, trainer: LatentActorCriticTrainer, choice: Choice) -> None:
        super().__init__(trainer.backbone, trainer.actor.sampler, trainer.graphs, trainer.config)
        self._choice = choice

    def parts(
        self, prompts: PromptSet, first_id: int, table: TransitionTable, **options: Any
    ) -> Iterator[Rollout]:
        """As Actor's, all in one part."""
        tried = prompts.take([row for row in range(len(prompts)) for _ in range(CANDIDATES)])
        parts = super().parts(tried, CANDIDATES * first_id, table, **options)
        made = RolloutMemory.of(parts, len(tried))
        chosen = (rows_of(made, slice(row, row + 1)) for row in self._chosen(made.values).tolist())
        yield RolloutMemory.of(chosen, len(prompts))

    def _chosen(self, values: Tensor) -> Tensor:
        """Rows (B,) that values (T, B CANDIDATES, M) choose, one of each prompt."""
        scores = values[-LAST_STATES:].mean(dim=0).sum(dim=-1).view(-1, CANDIDATES)
        picked = scores.argmax(dim=1)
        if self._choice == "extremes":
            picked[1::2] = scores[1::2].argmin(dim=1)
        return picked + CANDIDATES * picked.new_tensor(range(len(picked)))
