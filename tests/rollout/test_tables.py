"""A stochastic window moves from iteration to iteration, and nothing but the trained steps follows it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import Refusal
from tiny_backbones import PROMPTS, brightness, tiny_backbone, tiny_config
from tolerances import assert_same_step, assert_same_sum
from torch import Tensor

from lacfast import LatentActorCriticTrainer
from lacfast.config import (
    Fixed,
    GraphConfig,
    KLPenalty,
    PPOConfig,
    Random,
    Ratio,
    SamplerConfig,
    Sliding,
    TrainConfig,
    ValuePretrainingConfig,
)
from lacfast.rollout.tables import TrainingTables

SLIDING = SamplerConfig(num_steps=5, window=Sliding(2, every=1))
RANDOM = SamplerConfig(num_steps=5, window=Random(2))
# Balanced steps, KL to the anchor and two passes: all that an update reads of a table is used.
PPO = PPOConfig(
    clip=Ratio(1e-3),
    num_minibatches=2,
    microbatch_size=8,
    balance_steps=True,
    kl=KLPenalty(0.1),
    adam_eps=1e-4,
)


def windows(sampler: SamplerConfig, iterations: int, seed: int = 0) -> list[tuple[int, int]]:
    return [sampler.at(iteration, seed=seed).stochastic_window for iteration in range(iterations)]


def trainer_for(sampler: SamplerConfig, **changes: Any) -> LatentActorCriticTrainer:
    config = tiny_config(sampler=sampler, ppo=PPO, **changes)
    return LatentActorCriticTrainer(tiny_backbone("dit"), brightness, PROMPTS, config)


def trained_steps(metrics: dict[str, Any], name: str = "kl_old") -> list[int]:
    return [step for step, number in enumerate(metrics[name].tolist()) if number == number]


def weights(trainer: LatentActorCriticTrainer) -> dict[str, Tensor]:
    assert trainer.critic is not None
    modules = {"model": trainer.backbone.model, "critic": trainer.critic}
    return {
        f"{owner}.{name}": tensor.clone()
        for owner, module in modules.items()
        for name, tensor in module.state_dict().items()
    }


def test_a_sliding_window_goes_from_noise_to_image_and_starts_over() -> None:
    assert windows(SLIDING, 4) == [(0, 2), (1, 3), (2, 4), (0, 2)]
    slow = SamplerConfig(num_steps=9, window=Sliding(4, every=2, stride=2, within=(1, 8)))
    # The last place ends where the range does, also where the stride would miss it.
    assert windows(slow, 7) == [(1, 5), (1, 5), (3, 7), (3, 7), (4, 8), (4, 8), (1, 5)]


def test_a_random_window_is_a_function_of_seed_and_iteration_and_takes_every_place() -> None:
    drawn = windows(RANDOM, 60)
    assert windows(RANDOM, 60) == drawn != windows(RANDOM, 60, seed=1)
    counts = [drawn.count(place) for place in ((0, 2), (1, 3), (2, 4))]
    assert sum(counts) == 60
    assert min(counts) >= 10


def test_a_fixed_window_stays() -> None:
    fixed = SamplerConfig(num_steps=5, window=Fixed((1, 3)))
    assert fixed.at(7, seed=3) is fixed
    tables = TrainingTables(tiny_backbone("dit"), fixed, seed=0)
    assert tables.at(0) is tables.at(9) is tables.pretraining(4) is tables.whole


@pytest.mark.parametrize(
    ("window", "message"),
    [
        (lambda: Random(0), "size=0 must be >= 1"),
        (lambda: Sliding(2, every=0), "every=0 must be >= 1"),
        (lambda: Sliding(2, every=1, stride=0), "stride=0 must be >= 1"),
        (lambda: Random(10), r"random:10 must fit into the 9 steps \(0, 9\)"),
        (lambda: Sliding(4, every=1, within=(2, 5)), r"the 3 steps \(2, 5\) it moves in"),
    ],
)
def test_windows_that_cannot_move_are_refused(window: Callable[[], Random | Sliding], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplerConfig(window=window())


def test_a_window_does_not_move_where_no_step_is_stochastic() -> None:
    with Refusal(
        "window=random:2 says which steps are stochastic, and kind='ode'",
        cause="A window of stochastic steps for a sampler that has none.",
        remedy="leave it out, or use 'flow_sde' with noise_level > 0",
    ).raised():
        SamplerConfig(kind="ode", noise_level=0.0, window=Random(2))
    with pytest.raises(ValueError, match=r"noise_level=0.0 has none"):
        SamplerConfig(noise_level=0.0, window=Fixed((0, 2)))


def test_a_place_without_noise_and_an_evaluation_that_would_move_are_refused() -> None:
    last = SamplerConfig(num_steps=4, kind="cps", window=Random(1, within=(0, 4)))
    with Refusal(
        "kind='cps' with noise_level=0.7 and window=fixed:3..4 makes every step deterministic",
        cause="A window that can move to a step without noise.",
        remedy="use noise_level > 0 (0.7 for 'flow_sde') and a window that ends before a last step",
    ).raised():
        trainer_for(last)
    with Refusal(
        "eval_sampler.window=random:2 would be ignored",
        cause="An evaluation whose window would move.",
        remedy="use Fixed((start, stop)) or None",
    ).raised():
        TrainConfig(eval_sampler=RANDOM)


def test_each_iteration_trains_its_window_and_the_critic_values_every_state() -> None:
    trainer = trainer_for(SLIDING)
    for iteration, start in enumerate((0, 1, 2, 0)):
        metrics = trainer.train_iteration()
        assert metrics["first_max_abs_log_ratio"] == 0
        for name in ("kl_old", "kl_ref", "clip_fraction_high", "advantage_std"):
            assert trained_steps(metrics, name) == [start, start + 1], name
        assert trained_steps(metrics, "explained_variance") == [0, 1, 2, 3, 4]
        rollout = trainer.last_rollout
        assert rollout is not None
        assert rollout.table.trainable_steps == [start, start + 1]
        # A new critic's value is 0.
        assert rollout.values.any(dim=(1, 2)).tolist() == [iteration > 0] * 5
        deterministic = [step for step in range(5) if step not in (start, start + 1)]
        assert bool((rollout.log_probs[deterministic] == 0).all())


def test_evaluation_is_that_of_the_whole_range() -> None:
    moving, fixed = trainer_for(RANDOM), trainer_for(SamplerConfig(num_steps=5))
    assert torch.equal(moving.evaluate().images, fixed.evaluate().images)


def test_value_pretraining_meets_every_place_and_is_judged_on_the_whole_range() -> None:
    slow = SamplerConfig(num_steps=5, window=Sliding(2, every=10))
    pretrain = ValuePretrainingConfig(iterations=3, patience=3, held_out_samples=8)
    trainer = trainer_for(slow, pretrain=pretrain)
    seen, collect = [], trainer.collect

    def recorded(*arguments: Any, **named: Any) -> Any:
        rollout = collect(*arguments, **named)
        assert rollout is not None
        seen.append(rollout.table.trainable_steps)
        return rollout

    trainer.collect = recorded  # type: ignore[method-assign]
    result = trainer.pretrain_critic()
    assert seen == [[0, 1, 2, 3], [0, 1], [1, 2], [2, 3]]
    assert result.explained_variance.shape == (5, 1)
    assert trained_steps({"all": result.explained_variance[:, 0]}, "all") == [0, 1, 2, 3, 4]


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole, first, second = (trainer_for(RANDOM) for _ in range(3))
    assert len(set(windows(RANDOM, 3))) > 1
    for _ in range(3):
        whole.train_iteration()
    first.train_iteration()
    first.save(tmp_path / "run")
    second.load(tmp_path / "run")
    for _ in range(2):
        second.train_iteration()
    expected = weights(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(second).items())


@pytest.mark.isa
def test_a_window_that_moves_captures_nothing_again_and_learns_what_eager_steps_do() -> None:
    graph = GraphConfig(mode="fake", strict=True, warmup_steps=1)
    graphed, eager = trainer_for(SLIDING, graph=graph), trainer_for(SLIDING, graph=GraphConfig(mode="off"))
    captures, before = [], weights(eager)
    for _ in range(4):
        ours, theirs = graphed.train_iteration(), eager.train_iteration()
        captures.append(graphed.graphs.statistics.captures)
        assert trained_steps(ours) == trained_steps(theirs)
        assert_same_sum(ours["policy_loss"], theirs["policy_loss"], unit=1)
        # Squares cancel nothing, but the critic's AdamW carries rounding from one iteration to the next.
        assert ours["value_loss"] == pytest.approx(theirs["value_loss"], rel=1e-4)
        assert_same_sum(ours["policy_grad_norm"], theirs["policy_grad_norm"], unit=theirs["policy_grad_norm"])
        # The mean of log_ratio^2 / 2, whose log-ratios are what rounds.
        assert_same_sum((2 * ours["mean_kl_old"]) ** 0.5, (2 * theirs["mean_kl_old"]) ** 0.5, unit=1)
    # The second iteration is the first whose window has moved; what warms up is captured by then.
    assert captures[1] == captures[2] == captures[3] > 0
    assert graphed.graphs.statistics.fallbacks == 0
    assert graphed.graphs.statistics.replays > 12
    assert_same_step(weights(graphed), weights(eager), before)
