"""Values are in units of the standardised reward whatever they are trained with."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from refusals import Refusal
from torch import Tensor, nn

from lacfast.config import CriticConfig, PPOConfig, TrainConfig
from lacfast.critic.value_loss import BinaryCrossEntropy, HLGauss, SquaredError, ValueLoss, build_value_loss

LOSSES = ("mse", "bce", "hl_gauss")
MEAN, STD = torch.tensor([0.3, 0.6]), torch.tensor([0.4, 0.2])


def loss_for(name: str, num_rewards: int = 2) -> ValueLoss:
    return build_value_loss(num_rewards, CriticConfig(loss=name))


def head_for(loss: ValueLoss, num_rewards: int = 2) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(6, num_rewards * loss.num_outputs)
    nn.init.normal_(layer.bias)
    return layer


def values_of(loss: ValueLoss, layer: nn.Linear, features: Tensor) -> Tensor:
    return loss.values(layer(features).unflatten(-1, (-1, loss.num_outputs)))


@torch.no_grad()
def rescaled(loss: ValueLoss, layer: nn.Linear, *statistics: Tensor) -> None:
    loss.rescale(layer, *statistics)


def fitted_value(loss: ValueLoss, targets: Tensor) -> Tensor:
    """The value (M,) of the outputs that minimise the mean loss on standardised targets (B, M)."""
    outputs = torch.zeros(1, targets.shape[1], loss.num_outputs, requires_grad=True)
    optimizer = torch.optim.LBFGS([outputs], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        total = loss.losses(outputs.expand(len(targets), -1, -1), targets).mean()
        total.backward()
        return total

    optimizer.step(closure)
    return loss.values(outputs)[0].detach()


@pytest.mark.parametrize("name", LOSSES)
def test_the_best_value_of_a_known_distribution_is_its_mean(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    rewards = (torch.rand(4000, 2, generator=generator) < torch.tensor([0.1, 0.7])).float()
    loss, mean, std = loss_for(name), rewards.mean(dim=0), rewards.std(dim=0)
    rescaled(loss, head_for(loss), *loss.units(mean, std), mean, std)
    # Against the mean of other statistics, so that 0 is not the answer.
    rescaled(loss, head_for(loss), mean, std, MEAN, STD)
    value = fitted_value(loss, (rewards - MEAN) / STD)
    torch.testing.assert_close(value * STD + MEAN, mean, atol=2e-3, rtol=0)


def test_hl_gauss_is_calibrated_on_a_skewed_distribution() -> None:
    generator = torch.Generator().manual_seed(1)
    targets = (torch.rand(4000, 1, generator=generator).log().neg() - 1).clamp(max=5)
    value = fitted_value(loss_for("hl_gauss", 1), targets)
    torch.testing.assert_close(value, targets.mean(dim=0), atol=2e-3, rtol=0)


def test_a_target_s_probabilities_sum_to_one_and_average_to_it() -> None:
    loss = HLGauss(1, num_bins=51, bin_range=6.0)
    targets = torch.linspace(-5, 5, 41)[:, None]
    probabilities = loss.target_probabilities(targets)
    torch.testing.assert_close(probabilities.sum(dim=-1), torch.ones(41, 1))
    torch.testing.assert_close(probabilities @ loss.centers, targets, atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_new_statistics_leave_raw_predictions_and_losses_as_they_were(name: str) -> None:
    loss, features = loss_for(name), torch.randn(5, 6, generator=torch.Generator().manual_seed(2))
    layer = head_for(loss)
    rescaled(loss, layer, *loss.units(MEAN, STD), MEAN, STD)
    new_mean, new_std = torch.tensor([0.5, 0.1]), torch.tensor([0.3, 0.9])
    rewards = torch.rand(5, 2, generator=torch.Generator().manual_seed(3))
    before = values_of(loss, layer, features) * STD + MEAN
    outputs = layer(features).unflatten(-1, (2, -1))
    old_losses = loss.losses(outputs, (rewards - MEAN) / STD)
    rescaled(loss, layer, MEAN, STD, new_mean, new_std)
    torch.testing.assert_close(values_of(loss, layer, features) * new_std + new_mean, before)
    outputs = layer(features).unflatten(-1, (2, -1))
    losses = loss.losses(outputs, (rewards - new_mean) / new_std)
    # A squared error is in units of the variance, a likelihood has no units.
    units = (new_std / STD).square() if name == "mse" else 1.0
    torch.testing.assert_close(losses * units, old_losses)


def test_bce_values_are_probabilities_in_raw_units_from_the_first_statistics_on() -> None:
    loss = BinaryCrossEntropy(2)
    layer = head_for(loss)
    features = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    rescaled(loss, layer, *loss.units(MEAN, STD), MEAN, STD)
    torch.testing.assert_close(
        values_of(loss, layer, features) * STD + MEAN, layer(features).sigmoid(), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("rewards", [[0.0, 1.01], [-0.01, 0.5]])
def test_bce_refuses_rewards_that_are_no_probability(rewards: list[float]) -> None:
    with pytest.raises(ValueError, match=r"loss='bce' values rewards in \[0, 1\], got .*use loss='mse'"):
        BinaryCrossEntropy(1).require_representable(torch.tensor(rewards)[:, None])


def test_a_value_that_moved_past_the_clip_towards_its_target_learns_nothing_more() -> None:
    loss, old, targets = SquaredError(), torch.zeros(4, 1), torch.full((4, 1), 1.0)
    outputs = torch.tensor([0.1, 0.5, -0.5, 1.5])[:, None, None].requires_grad_()
    losses = loss.clipped_losses(outputs, targets, old, 0.2)
    losses.sum().backward()
    torch.testing.assert_close(losses[:, 0], torch.tensor([0.81, 0.64, 2.25, 0.64]))
    assert outputs.grad is not None
    torch.testing.assert_close(outputs.grad.flatten(), torch.tensor([-1.8, 0.0, -3.0, 0.0]))


def test_bins_reach_beyond_the_clipped_targets() -> None:
    assert CriticConfig().bin_range > PPOConfig().target_clip


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        (
            {"loss": "mae"},
            Refusal("unknown loss 'mae'", cause="A loss that no critic has.", remedy="did you mean 'mse'?"),
        ),
        (
            {"text_conditioning": "clip"},
            Refusal(
                "unknown text_conditioning 'clip'",
                cause="A way to read the prompt that no head has.",
                remedy="known: none, pooled, tokens",
            ),
        ),
        (
            {"loss": "bce", "value_clip": 0.2},
            Refusal(
                "value_clip=0.2 would be ignored by loss='bce'",
                cause="PPO's value clip with a loss that has none.",
                remedy="leave it out, or use 'mse'",
            ),
        ),
        (
            {"value_clip": 0.0},
            Refusal("value_clip=0.0", cause="A clip without room.", remedy="must be > 0 (inf: off)"),
        ),
        (
            {"trunk": "branch", "taps": (0.5,)},
            Refusal(
                "taps=(0.5,) would be ignored by trunk='branch'",
                cause="Taps for a trunk that reads none.",
                remedy="leave it out, or use 'shared'",
            ),
        ),
        (
            {"trunk": "shared", "taps": (0.0, 1.0)},
            Refusal("taps[0]=0.0", cause="A tap before the first block.", remedy="must lie in (0, 1]"),
        ),
        (
            {"num_bins": 1},
            Refusal("num_bins=1", cause="A histogram of one bin.", remedy="must be >= 2"),
        ),
        (
            {"num_bins": 101},
            Refusal(
                "num_bins=101 would be ignored by loss='mse'",
                cause="Bins for a loss without a histogram.",
                remedy="leave it out, or use 'hl_gauss'",
            ),
        ),
        (
            {"trunk": "shared", "num_blocks": 2},
            Refusal(
                "num_blocks=2 would be ignored by trunk='shared'",
                cause="Blocks for a trunk that has none of its own.",
                remedy="leave it out, or use 'branch'",
            ),
        ),
        (
            {"lora_rank": 4},
            Refusal(
                "lora_rank=4 would be ignored by trunk='branch'",
                cause="An adapter's rank for a trunk without an adapter.",
                remedy="leave it out, or use 'lora'",
            ),
        ),
        (
            {"joint_weight": 1.0},
            Refusal(
                "joint_weight=1.0 would be ignored by trunk='branch'",
                cause="The weight of a gradient that does not reach the actor.",
                remedy="leave it out, or use 'joint'",
            ),
        ),
    ],
)
def test_settings_that_would_be_ignored_or_cannot_work_are_refused(
    changes: dict[str, Any], refused: Refusal
) -> None:
    with refused.raised():
        CriticConfig(**changes)


def test_bce_wants_targets_that_nobody_cut() -> None:
    with pytest.raises(ValueError, match=r"target_clip=5.0 would cut a rare 1 .*target_clip=math.inf"):
        TrainConfig(critic=CriticConfig(loss="bce"))
    TrainConfig(critic=CriticConfig(loss="bce"), ppo=PPOConfig(target_clip=math.inf))
