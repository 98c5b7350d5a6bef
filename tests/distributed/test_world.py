"""Two ranks with half of the rollout each get what one rank with all of it gets."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_backbones import tiny_critic
from tiny_rollouts import made_rollout
from torch import distributed

from lacfast.advantages import AdvantageEstimator
from lacfast.config import DDPO, GRPO, AdvantageConfig, BatchMean, TrainConfig
from lacfast.distributed.world import all_reduce, gathered, moments

STEPS, BATCH = 3, 8
PROMPTS = ["a", "a", "b", "b", "a", "a", "c", "c"]
ARMS = {
    "critic": AdvantageConfig(),
    "constrained": AdvantageConfig(combination="constrained", floors=(("first", 1.0),)),
    "grpo": AdvantageConfig(estimator=GRPO()),
    "batch_mean": AdvantageConfig(estimator=BatchMean()),
    "ddpo": AdvantageConfig(estimator=DDPO(min_count=2, buffer_size=3)),
}


def results(rows: range) -> dict[str, Any]:
    """The advantages of every arm for the trajectories `rows` of one fixed rollout, and its statistics."""
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(BATCH, 2, generator=generator) * 3 + 100
    values = torch.randn(STEPS, BATCH, 2, generator=generator)
    chosen = torch.tensor(rows)
    found: dict[str, Any] = {}
    for name, advantages in ARMS.items():
        config = TrainConfig(
            batch_size=BATCH,
            samples_per_prompt=2,
            advantages=advantages,
            critic=tiny_critic(advantages),
        )
        estimator = AdvantageEstimator(config, ("first", "second"), torch.ones(2))
        estimator.normalizer.update(rewards[chosen])
        heads = values[:, chosen] if advantages.uses_critic else values[:, chosen, :0]
        scores = {"first": rewards[chosen, 0], "second": rewards[chosen, 1]}
        result = estimator(made_rollout(heads, scores, [PROMPTS[row] for row in rows]))
        found[name] = result.policy.clone()
        found[f"{name} std"], found[f"{name} weights"] = estimator.normalizer.std, estimator.weights
    return found


def _rank(rank: int, meeting: Path, out: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    entries, first = gathered([f"rank {rank}"] * (rank + 1))
    assert (entries, first) == (["rank 0", "rank 1", "rank 1"], rank)
    torch.save(results(range(4 * rank, 4 * rank + 4)), out / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.skipif(not distributed.is_available(), reason="torch was built without torch.distributed")
def test_two_ranks_normalise_like_one(tmp_path: Path) -> None:
    # A forked process does not import torch again.
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_rank, args=(rank, tmp_path / "meeting", tmp_path)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=120)
        assert process.exitcode == 0
    halves = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for name, expected in results(range(BATCH)).items():
        parts = [half[name] for half in halves]
        if name in ARMS:
            torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(*parts)
            torch.testing.assert_close(parts[0], expected)


def test_one_process_is_the_sum_of_itself() -> None:
    assert all_reduce() is None
    assert gathered(["x"]) == (["x"], 0)
    count, mean, variance = moments(torch.tensor([[1.0], [3.0]]))
    assert (count, mean.item(), variance.item()) == (2.0, 2.0, 1.0)
