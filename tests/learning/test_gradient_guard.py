"""Steps with a bad gradient are left out; many in a row halve the rate, and then end the run."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import Refusal
from tiny_backbones import PROMPTS, brightness, tiny_backbone, tiny_config
from tolerances import assert_same_step
from torch import Tensor

from lacfast import LatentActorCriticTrainer
from lacfast.config import GraphConfig, PPOConfig, Ratio, ValuePretrainingConfig
from lacfast.learning.critic_update import CriticUpdate
from lacfast.learning.gradient_guard import IN_A_ROW, GradientGuard
from lacfast.learning.learner import Learner
from lacfast.learning.pairs import all_pairs, minibatches
from lacfast.records import Rollout
from lacfast.runtime.graph import GraphRunner

PPO = PPOConfig(clip=Ratio(1e-3), num_minibatches=3, microbatch_size=8)
NAN_ENDS = Refusal(
    "the gradient norm of the policy was not finite in 5 optimizer steps in a row, at half the learning",
    cause="Gradients that are not finite, in one rollout after the other.",
    remedy="or use float32 or bfloat16",
    error=FloatingPointError,
)


def trainer_for(**changes: Any) -> LatentActorCriticTrainer:
    config = tiny_config(**({"ppo": PPO} | changes))
    return LatentActorCriticTrainer(tiny_backbone("dit"), brightness, PROMPTS, config)


def poisoned(rollout: Rollout, *parts: int) -> Rollout:
    """The rollout with one pair that is NaN in some of the policy's three minibatches."""
    outputs = rollout.model_outputs.clone()
    pairs = all_pairs(torch.tensor(rollout.table.trainable_steps), rollout.batch_size)
    for number, part in enumerate(minibatches(pairs, 3, torch.Generator().manual_seed(0))):
        if number in parts:
            outputs[part.steps[0], part.rows[0]] = torch.nan
    return replace(rollout, model_outputs=outputs)


def learned(trainer: LatentActorCriticTrainer) -> dict[str, Tensor]:
    state = trainer.backbone.model.state_dict()
    return {name: tensor.clone() for name, tensor in state.items()}


def learn(trainer: LatentActorCriticTrainer, *parts: int) -> dict[str, Any]:
    rollout = trainer.collect(trainer.prompts, 0)
    assert rollout is not None
    trainer.normalizer.update(torch.stack(list(rollout.rewards.values()), dim=1))
    return trainer.learner.learn(poisoned(rollout, *parts), trainer.advantages(rollout), 0)


@pytest.mark.parametrize("mode", ["off", "fake"])
def test_a_step_with_a_bad_gradient_is_left_out_and_the_others_are_taken(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, shorter = trainer_for(), trainer_for()
    if mode == "fake":
        graphs = GraphRunner(GraphConfig(mode="fake", strict=True, warmup_steps=1))
        ours.learner = Learner(ours.backbone, ours.config, graphs)
        # What was captured without a bad gradient leaves one out, too.
        for trainer in (ours, shorter):
            learn(trainer)
    before = learned(shorter)
    metrics = learn(ours, 1)
    # The same without the second step.
    step = shorter.learner.policy_update.learn
    calls = []

    def all_but_the_second(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) != 2:
            step(*arguments)

    monkeypatch.setattr(shorter.learner.policy_update, "learn", all_but_the_second)
    expected = learn(shorter)
    assert_same_step(learned(ours), learned(shorter), before)
    assert metrics["bad_gradients/policy"] == 1
    assert "bad_gradients/policy" not in expected
    # A mean of terms near 1 that cancel, of steps whose padded parts other processors sum in another order.
    assert metrics["policy_loss"] == pytest.approx(expected["policy_loss"], abs=1e-5)
    steps = {float(state["step"]) for state in ours.learner.policy_update.optimizer.state.values()}
    assert steps == {2.0 if mode == "off" else 5.0}
    assert ours.learner.critic_update is not None
    critic = ours.learner.critic_update.optimizer.state.values()
    assert {float(state["step"]) for state in critic} == {3.0 if mode == "off" else 6.0}


def test_an_iteration_of_bad_gradients_alone_changes_no_weight_of_the_policy() -> None:
    trainer = trainer_for()
    before = learned(trainer)
    metrics = learn(trainer, 0, 1, 2)
    assert metrics["bad_gradients/policy"] == 3
    assert "policy_loss" not in metrics
    assert metrics["value_loss"] > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in learned(trainer).items())


@pytest.mark.filterwarnings("ignore:the gradient norm of the policy was not finite in 5")
def test_bad_gradients_in_a_row_halve_the_rate_once_and_then_end_the_run(tmp_path: Path) -> None:
    through, resumed = trainer_for(), trainer_for()
    rate = PPO.policy_learning_rate

    def rates(trainer: LatentActorCriticTrainer) -> float:
        return float(trainer.learner.policy_update.optimizer.param_groups[0]["lr"])

    for parts in ((0, 1, 2), (0, 1, 2), ()):
        metrics = learn(through, *parts)
    # The sixth was not made at the new rate.
    assert (metrics["rate_factor/policy"], rates(through)) == (0.5, rate / 2)
    learn(through, 0, 1, 2)
    through.save(tmp_path / "run")
    resumed.load(tmp_path / "run")
    for trainer in (through, resumed):
        assert learn(trainer, 0)["rate_factor/policy"] == 0.5, (
            "three and one are not five, two steps came after"
        )
        assert rates(trainer) == rate / 2
        learn(trainer, 0, 1, 2)
        with NAN_ENDS.raised():
            learn(trainer, 0, 1, 2)


def test_a_good_step_begins_the_count_anew() -> None:
    guard = GradientGuard("critic", "skip", torch.zeros(()))
    for _ in range(3):
        for norm in [math.nan] * (IN_A_ROW - 1) + [1.0]:
            guard.admits(norm)
            guard.settle()
    assert guard.metrics() == {}
    # Whether the host looks after every step or at the end of an iteration.
    for norm in [math.inf] * IN_A_ROW + [1.0]:
        guard.admits(norm)
    with pytest.warns(UserWarning, match="gradient norm of the critic was not finite in 5 .* rate is half"):
        guard.settle()
    assert guard.metrics() == {"rate_factor/critic": 0.5}


def test_value_pretraining_leaves_out_bad_gradients_and_counts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    pretrain = ValuePretrainingConfig(iterations=2, held_out_samples=8, minibatch_size=8)
    trainer, lines = trainer_for(pretrain=pretrain), []
    monkeypatch.setattr(trainer.log, "write", lambda phase, **values: lines.append(values))
    gradient, calls = CriticUpdate.gradient, []

    def nan_once(update: CriticUpdate, batch: Any) -> None:
        gradient(update, batch)
        calls.append(batch)
        if len(calls) == 2:
            update.critic.head.output.weight.grad.fill_(torch.nan)  # type: ignore[union-attr]

    monkeypatch.setattr(CriticUpdate, "gradient", nan_once)
    result = trainer.pretrain_critic()
    assert [line.get("bad_gradients/critic") for line in lines] == [1, None]
    assert all(map(math.isfinite, result.history))
