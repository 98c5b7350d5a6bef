"""Every estimator and combination trains in the one trainer, logs its heads, and resumes bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import Refusal
from tiny_backbones import PROMPTS, brightness, tiny_backbone, tiny_config

from lacfast import AdvantageConfig, EarlyStoppingConfig, LatentActorCriticTrainer
from lacfast.config import DDPO, ESTIMATORS, GRPO, BatchMean, KLPenalty, PPOConfig, Ratio


def redness(images: torch.Tensor, prompts: list[str], metadata: list[dict[str, object]]) -> torch.Tensor:
    return images[:, 0].mean(dim=(1, 2)) - images[:, 1].mean(dim=(1, 2))


REWARDS: Any = {brightness: 1.0, redness: 0.5}


def trainer_for(rewards: Any = brightness, *, seed: int = 0, **changes: Any) -> LatentActorCriticTrainer:
    # One model for all: advantages do not know what made the trajectories.
    return LatentActorCriticTrainer(tiny_backbone("dit", seed=seed), rewards, PROMPTS, tiny_config(**changes))


def weights(trainer: LatentActorCriticTrainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.backbone.model.state_dict().items()}


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_estimator_trains_and_only_the_critic_s_have_one(estimator: str) -> None:
    advantages = AdvantageConfig(estimator=ESTIMATORS[estimator]())  # type: ignore[arg-type]
    trainer = trainer_for(samples_per_prompt=4, advantages=advantages)
    before = weights(trainer)
    metrics = trainer.train_iteration()
    assert metrics["first_max_abs_log_ratio"] < 1e-6
    assert any(not torch.equal(before[name], tensor) for name, tensor in weights(trainer).items())
    assert (trainer.critic is not None) == ("value_loss" in metrics) == estimator.endswith("critic")
    assert ("zero_std_groups" in metrics) == (estimator in ("grpo", "leave_one_out"))
    if trainer.critic is None:
        with Refusal(
            "there is no critic to pretrain: critic.trunk is 'none'",
            cause="`pretrain_critic()` of a trainer without a critic.",
            remedy="set it to 'branch'",
        ).raised():
            trainer.pretrain_critic()


def test_several_heads_log_what_each_learns() -> None:
    trainer = trainer_for(REWARDS)
    trainer.pretrain_critic()
    metrics = trainer.train_iteration()
    for name in ("brightness", "redness"):
        assert metrics[f"reward_std/{name}"] > 0
        assert metrics[f"explained_variance/{name}"].shape == (4,)
        assert metrics[f"advantage_std/{name}"].isnan().tolist() == [False, False, False, True]
    correlation = metrics["advantage_correlation"]
    torch.testing.assert_close(correlation.diagonal(), torch.ones(2))
    assert trainer.last_rollout is not None
    # The mean of the heads' parts is the whole.
    each = torch.stack([metrics[f"explained_variance/{name}"] for name in ("brightness", "redness")])
    torch.testing.assert_close(each.mean(dim=0), metrics["explained_variance"])
    assert all(metrics[f"value_loss/{name}"] > 0 for name in ("brightness", "redness"))


def test_scalarized_rewards_train_one_head_through_a_whole_run() -> None:
    trainer = trainer_for(REWARDS, advantages=AdvantageConfig(combination="scalarized"))
    assert trainer.critic is not None
    assert trainer.critic.num_rewards == 1
    assert trainer.pretrain_critic().explained_variance.shape == (4, 1)
    metrics = trainer.train_iteration()
    assert {"reward/brightness", "reward/redness"} <= metrics.keys()
    assert trainer.evaluate().explained_variance.shape == (4, 1)


CONSTRAINED = {
    "combination": "constrained",
    "floors": (("redness", 10.0),),
    "multiplier_learning_rate": 0.01,
}


@pytest.mark.parametrize(
    "changes",
    [
        {"advantages": AdvantageConfig(**CONSTRAINED)},
        {"advantages": AdvantageConfig(estimator=DDPO(min_count=2)), "prompts": PROMPTS[:3]},
        {"ppo": PPOConfig(clip=Ratio(1e-3), kl=KLPenalty(0.1, target=1e-3), num_minibatches=2)},
    ],
    ids=["constrained", "ddpo", "adaptive KL"],
)
def test_a_saved_run_goes_on_with_its_statistics(changes: dict[str, Any], tmp_path: Path) -> None:
    prompts = changes.pop("prompts", PROMPTS)

    def made(seed: int) -> LatentActorCriticTrainer:
        return LatentActorCriticTrainer(
            tiny_backbone("dit", seed=seed), REWARDS, prompts, tiny_config(**changes)
        )

    trainer, resumed = made(0), made(0)
    for _ in range(2):
        trainer.train_iteration()
    trainer.save(tmp_path / "run")
    resumed.load(tmp_path / "run")
    first, second = trainer.train_iteration(), resumed.train_iteration()
    assert first.keys() == second.keys()
    for name in first.keys() - {"seconds_rollout", "seconds_update"}:
        one, other = torch.as_tensor(first[name]), torch.as_tensor(second[name])
        assert torch.equal(one.nan_to_num(), other.nan_to_num()), name
    assert all(torch.equal(tensor, weights(resumed)[name]) for name, tensor in weights(trainer).items())
    if "advantages" in changes and changes["advantages"].combination == "constrained":
        # Ten is never reached, so the multiplier has risen in each of the three iterations.
        assert first["weight/redness"] > 0.5 + 3 * 0.01
    if "ppo" in changes:
        assert first["kl_weight"] == pytest.approx(0.1 * 0.98**2)
        assert trainer.learner.policy_update.kl_weight == pytest.approx(0.1 * 0.98**3)


def test_a_checkpoint_of_another_estimator_changes_nothing(tmp_path: Path) -> None:
    trainer_for(samples_per_prompt=4, advantages=AdvantageConfig(estimator=GRPO())).save(tmp_path / "run")
    trainer = trainer_for(seed=1, advantages=AdvantageConfig(estimator=BatchMean()))
    before = weights(trainer)
    with Refusal(
        "estimator.choice was 'grpo' and is 'batch_mean' now",
        cause="A checkpoint of a run with other advantages.",
        remedy="take the old value, or start another run from the checkpoint's weights",
    ).raised():
        trainer.load(tmp_path / "run")
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(trainer).items())


def test_a_run_stops_when_its_held_out_score_no_longer_rises(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "iterations": 20,
        "eval_every": 1,
        # The policy stands still, so the start stays the best.
        "ppo": PPOConfig(clip=Ratio(1e-3), policy_learning_rate=0.0),
        "early_stopping": EarlyStoppingConfig(patience=2),
        "advantages": AdvantageConfig(estimator=BatchMean()),
    }
    trainer = trainer_for(**changes)
    saved: list[int] = []

    def save(metrics: dict[str, Any]) -> None:
        saved.append(metrics["iteration"])
        trainer.save(tmp_path / "run")

    assert trainer.train(on_iteration=save) == 2
    assert saved == [1, 2]
    assert trainer.early_stopping.evaluations_since_best == 2
    # What was saved after the last evaluation knows that the run is over.
    resumed = trainer_for(**changes)
    resumed.load(tmp_path / "run")
    assert resumed.train() == 0


def test_early_stopping_watches_only_scores_that_exist() -> None:
    with Refusal(
        "early_stopping.score='beauty' is no score of an evaluation",
        cause="An early stop by a score that nothing measures.",
        remedy="known: brightness",
    ).raised():
        trainer_for(eval_every=1, early_stopping=EarlyStoppingConfig(patience=1, score="beauty"))
    with Refusal(
        "early_stopping.patience=1 counts evaluations, and eval_every=0 makes none",
        cause="An early stop without evaluations.",
        remedy="set eval_every",
    ).raised():
        tiny_config(early_stopping=EarlyStoppingConfig(patience=1))
