"""The number of ranks changes the order of sums and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from ranked_runs import ARMS, PPO, PRETRAINING, alone, assert_same_run, state, trained, trainer_for
from ranks import together
from tiny_backbones import brightness
from torch import Tensor, distributed

from lacfast.config import variant

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch is without torch.distributed")
CASES = {
    "branch": (3, 4),
    **dict.fromkeys(("two rewards", "value pretraining"), (3,)),
    **dict.fromkeys(("lora", "shared", "joint", "clean_net", "groups, hold", "uneven, kl, replay"), (2,)),
    **dict.fromkeys(("graphs", "forward process", "forward process, groups"), (2,)),
}
"""Arm -> the numbers of ranks that it is tried on."""
SAVED = ("uneven, kl, replay", "groups, hold")
"""Arms that are saved by four ranks and go on with fewer."""
Runs = dict[int, dict[str, list[Any]]]


def saved(directory: Path) -> None:
    for arm in SAVED:
        trainer = trainer_for(**ARMS[arm])
        trainer.train_iteration()
        trainer.save(directory / arm)


def resumed(directory: Path) -> dict[str, Any]:
    found = {}
    for arm in SAVED:
        trainer, rollouts = trainer_for(**ARMS[arm]), []
        trainer.load(directory / arm)
        trainer.train_iteration(rollouts.append)
        found[arm] = state(trainer) | {"latents": rollouts[0].latents}
    return found


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def runs(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Every arm on each of its numbers of ranks, and what was saved by four goes on with fewer."""

    def works(size: int) -> dict[str, Callable[[], Any]]:
        arms = [arm for arm, sizes in CASES.items() if size in sizes]
        saving = partial(saved if size == 4 else resumed, checkpoints)
        return {"trained": partial(trained, arms), "saving": saving}

    return {size: together(size, works(size), tmp_path_factory.mktemp(f"ranks{size}")) for size in (4, 3, 2)}


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_gradients_are_sent_once_per_optimizer_step(size: int, runs: Runs) -> None:
    arm = "lora" if size == 2 else "branch"
    for found in [alone(arm)] if size == 1 else [rank[arm] for rank in runs[size]["trained"]]:
        # The sums of the optimizer steps' records come on top.
        assert 0 <= found["traffic"] - found["gradient_bytes"] < 8000


@pytest.mark.parametrize(("arm", "size"), [(arm, size) for arm, sizes in CASES.items() for size in sizes])
def test_a_run_does_not_depend_on_the_number_of_ranks(arm: str, size: int, runs: Runs) -> None:
    assert_same_run(arm, runs[size]["trained"])


def test_a_run_goes_on_with_another_number_of_ranks(checkpoints: Path, runs: Runs) -> None:
    for arm, expected in resumed(checkpoints).items():
        for size in (2, 3):
            ranks = [rank[arm] for rank in runs[size]["saving"]]
            latents = torch.cat([found["latents"] for found in ranks], dim=1)
            torch.testing.assert_close(latents, expected["latents"], rtol=0, atol=0 if size == 2 else 1e-5)
            torch.testing.assert_close(ranks[0]["policy"], expected["policy"], rtol=0, atol=1e-6)
            torch.testing.assert_close(ranks[0]["critic"], expected["critic"], rtol=0, atol=2e-5)


def rounded_up(images: Tensor, prompts: list[str], metadata: list[dict[str, object]]) -> Tensor:
    """Brightness, of every other image by one unit in the last place more."""
    rewards = brightness(images, prompts, metadata)
    rewards[::2] = torch.nextafter(rewards[::2], torch.ones(()))
    return rewards


def test_where_a_gradient_is_rounding_alone_adam_makes_whole_steps_of_it() -> None:
    """What docs/distributed.md says of such weights, in one process: it has nothing to do with ranks.

    One minibatch of all states of the first rollout: the gradient of the value's bias is twice the mean of
    the standardised rewards, which is 0 up to rounding.
    """

    def learned(reward: Any, minibatch_size: int) -> tuple[dict[str, Tensor], float]:
        settings = variant(PRETRAINING, minibatch_size=minibatch_size, iterations=1, completions=0)
        trainer = trainer_for(rewards=[reward], pretrain=settings)
        critic, gradients = trainer.critic, list[float]()
        assert critic is not None
        critic.head.output.bias.register_hook(lambda gradient: gradients.append(float(gradient)))
        trainer.pretrain_critic()
        # A microbatch at a time, and a minibatch for each optimizer step.
        of_first_step = gradients[: min(minibatch_size, 24) // PPO.microbatch_size]
        return dict(critic.named_parameters()), abs(sum(of_first_step))

    def apart(minibatch_size: int) -> tuple[dict[str, float], float]:
        (exact, gradient), (rounded, _) = (
            learned(reward, minibatch_size) for reward in (brightness, rounded_up)
        )
        with torch.no_grad():
            return {name: float((exact[name] - rounded[name]).abs().max()) for name in exact}, gradient

    distances, gradient = apart(minibatch_size=256)
    assert gradient < 1e-4
    assert distances.pop("head.output.bias") > 1e-3
    assert max(distances.values()) < 2e-5
    distances, gradient = apart(minibatch_size=8)
    assert gradient > 1e-2
    assert max(distances.values()) < 2e-5
