"""What steering raises: the training's weights and combination, in the first critic's units."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import Refusal
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_backbones import PROMPTS, brightness, tiny_backbone, tiny_config
from tiny_critics import critic_of
from torch import Tensor

from lacfast import LatentActorCriticTrainer, load_backbone, steer
from lacfast.backbones.latent import LatentBackbone
from lacfast.checkpoint import CRITIC_DESCRIPTION, CRITIC_WEIGHTS, save_backbone
from lacfast.config import AdvantageConfig, SamplerConfig, SteeringConfig
from lacfast.rewards.heads import RewardHeads
from lacfast.rewards.registry import RewardSet
from lacfast.runtime.directories import MANIFEST
from lacfast.steering.objective import Objective

SAMPLER = SamplerConfig(num_steps=2)
PLAIN = SteeringConfig(method="best_of_n", particles=1)
RED_AND_BLUE = RewardHeads(("red", "blue"), (1.0, -0.2))


def red(images: Tensor, prompts: list[str], metadata: list[dict[str, object]]) -> Tensor:
    return images[:, 0].mean(dim=(1, 2))


def blue(images: Tensor, prompts: list[str], metadata: list[dict[str, object]]) -> Tensor:
    return images[:, 2].mean(dim=(1, 2)) - 3


def backbone_of(heads: RewardHeads | None, size: int = 2) -> LatentBackbone:
    """With a critic of these heads, whose statistics are no 0 and 1."""
    backbone = tiny_backbone("dit")
    critic = backbone.critic = critic_of(backbone, heads=size)
    critic.rewards = heads
    critic.reward_mean.copy_(torch.linspace(0.5, -2.5, size))
    critic.reward_std.copy_(torch.linspace(0.1, 0.2, size))
    return backbone


def first_value(backbone: LatentBackbone, **arguments: Any) -> Tensor:
    return steer(backbone, PROMPTS, PLAIN, sampler=SAMPLER, **arguments)[1].values[0]


def test_the_weights_of_the_training_count_where_none_are_given() -> None:
    backbone = backbone_of(RED_AND_BLUE)
    trained = first_value(backbone, head_weights=torch.tensor([1.0, -0.2]))
    assert torch.equal(first_value(backbone), trained)
    assert torch.equal(first_value(backbone, rewards=[red, blue]), trained)
    assert torch.equal(first_value(backbone, rewards={red: 1.0, blue: -0.2}), trained)
    assert not torch.allclose(first_value(backbone, head_weights=torch.ones(2)), trained)


def test_selection_makes_of_the_rewards_what_the_training_made_of_them() -> None:
    by_reward = SteeringConfig(method="best_of_n", selection="reward")
    gate = RewardHeads(("red", "blue"), (1.0, 1.0), "conditional", (("blue", "red", 0.5),))
    total = RewardHeads(("red", "blue"), (1.0, -0.2), "scalarized")
    for heads, size, expected in (
        (RED_AND_BLUE, 2, lambda r, b: (r - 0.5) / 0.1 - 0.2 * (b + 2.5) / 0.2),
        (gate, 2, lambda r, b: (r - 0.5) / 0.1 + (r >= 0.5) * (b + 2.5) / 0.2),
        (total, 1, lambda r, b: (r - 0.2 * b - 0.5) / 0.1),
    ):
        objective = Objective.create(
            (backbone_of(heads, size).critic,),  # type: ignore[arg-type]
            RewardSet.create([red, blue]),
            None,
            by_reward,
            torch.device("cpu"),
        )
        images = torch.rand((6, 3, 4, 4), generator=torch.Generator().manual_seed(0))
        scores = {"red": red(images, [], []), "blue": blue(images, [], [])}
        wanted = expected(scores["red"].double(), scores["blue"].double())
        torch.testing.assert_close(objective.of_rewards(scores), wanted)


def test_a_trained_critic_says_what_its_heads_predict_also_from_its_file(tmp_path: Path) -> None:
    config = tiny_config(advantages=AdvantageConfig(combination="constrained", floors=(("blue", 9.0),)))
    trainer = LatentActorCriticTrainer(tiny_backbone("dit"), {red: 1.0, blue: 0.5}, PROMPTS, config)
    assert trainer.critic is not None
    assert trainer.critic.rewards == RewardHeads(("red", "blue"), (1.0, 0.5), "constrained")
    trainer.train_iteration()
    save_backbone(trainer.backbone, tmp_path / "saved")
    critic = load_backbone(tmp_path / "saved").critic
    assert critic is not None
    assert critic.rewards is not None
    # The floor is out of reach, so its reward weighs more now.
    assert critic.rewards.weights == tuple(trainer.estimator.weights.tolist())
    assert critic.rewards.weights[1] > 0.5


def earlier(saved: Path) -> None:
    """Let a saved critic say no more of its rewards than that of the version before: how many they are."""
    (saved / MANIFEST).unlink()
    file = saved / CRITIC_WEIGHTS
    with safe_open(file, framework="pt") as opened:
        description = json.loads(opened.metadata()[CRITIC_DESCRIPTION])
    del description["rewards"]
    save_file(load_file(file), file, {CRITIC_DESCRIPTION: json.dumps(description)})


def test_heads_without_known_weights_are_refused_and_one_head_needs_none(tmp_path: Path) -> None:
    for size in (1, 2):
        save_backbone(backbone_of(RED_AND_BLUE, size), tmp_path / str(size))
        earlier(tmp_path / str(size))
    one, two = (load_backbone(tmp_path / str(size)) for size in (1, 2))
    assert torch.equal(first_value(one), first_value(one, head_weights=torch.ones(1)))
    with Refusal(
        "nobody knows the weights of the critic's 2 heads",
        cause="Steering by a critic of several rewards whose file was written by an earlier version.",
        remedy="pass head_weights, one for each head",
    ).raised():
        first_value(two)
    assert first_value(two, head_weights=torch.tensor([1.0, -0.2])).isfinite().all()
    assert first_value(two, rewards={red: 1.0, blue: -0.2}).isfinite().all()


MISFITS = {
    "order": (
        {"rewards": [blue, red]},
        Refusal(
            "rewards ['blue', 'red'] are not the critic's ['red', 'blue']",
            cause="Steering with a critic's rewards in another order than it was trained on.",
            remedy="pass those, in this order",
        ),
    ),
    "others": (
        {"rewards": brightness},
        Refusal(
            "rewards ['brightness'] are not the critic's ['red', 'blue']",
            cause="Steering with rewards that the critic does not know.",
            remedy="(gold takes any others)",
        ),
    ),
    "other weights": (
        {"rewards": {red: 1.0, blue: 1.0}},
        Refusal(
            "rewards weigh [1.0, 1.0], in the critic's training [1.0, -0.2]",
            cause="Steering with rewards under other weights than the critic's training had.",
            remedy="leave the weights out, or give others as head_weights",
        ),
    ),
    "too many weights": (
        {"head_weights": torch.ones(3)},
        Refusal(
            "head_weights=[1.0, 1.0, 1.0] are 3 for 2 heads",
            cause="More head weights than the critic has heads.",
            remedy="give one for each head",
        ),
    ),
    "no weight": (
        {"head_weights": torch.zeros(2)},
        Refusal(
            "leave the sum of the heads nothing to raise",
            cause="Head weights that are all 0.",
            remedy="give a weight that is not 0",
        ),
    ),
}


@pytest.mark.parametrize(("arguments", "refusal"), MISFITS.values(), ids=MISFITS)
def test_rewards_and_weights_that_are_not_the_critics_are_refused(
    arguments: dict[str, Any], refusal: Refusal
) -> None:
    with refusal.raised():
        first_value(backbone_of(RED_AND_BLUE), **arguments)


def test_the_minimum_of_heads_takes_no_penalty() -> None:
    with Refusal(
        "head_weights=[1.0, -0.20000000298023224] leave the minimum of the heads nothing to raise",
        cause="The minimum over heads of which one is a penalty.",
        remedy="use head_combination='sum'",
    ).raised():
        steer(backbone_of(RED_AND_BLUE), PROMPTS, replace(PLAIN, head_combination="minimum"), sampler=SAMPLER)


def test_critics_of_different_rewards_are_refused() -> None:
    backbone = backbone_of(RED_AND_BLUE)
    other = backbone_of(RewardHeads(("red", "green"), (1.0, -0.2))).critic
    assert other is not None
    with Refusal(
        "cannot be compared",
        cause="An ensemble whose critics were trained on different rewards.",
        remedy="pass critics of the same rewards",
    ).raised():
        first_value(backbone, more_critics=[other])
    # Weights of heads are no part of what they predict.
    other.rewards = RewardHeads(("red", "blue"), (3.0, 1.0))
    assert torch.equal(first_value(backbone, more_critics=[other]), first_value(backbone))
