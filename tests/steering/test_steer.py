"""Steering follows the critic, counts what it costs and refuses what cannot work."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import pytest
import torch
from refusals import Refusal
from tiny_backbones import PROMPTS, brightness, tiny_backbone
from torch import Tensor, nn

from lacfast import ops, steer
from lacfast.backbone import build_critic
from lacfast.backbones.latent import LatentBackbone
from lacfast.backbones.taps import record_taps
from lacfast.config import CriticConfig, Fixed, SamplerConfig, SteeringConfig
from lacfast.critic.critic import Critic
from lacfast.critic.trunk import Features, Trunk
from lacfast.records import Conditioning, FirstSampleId, NoiseKey
from lacfast.rewards.heads import RewardHeads
from lacfast.rewards.reward import RewardError
from lacfast.rollout.sampler import RolloutSampler
from lacfast.runtime.graph import GraphRunner
from lacfast.steering import planned_evaluations, trajectories_per_step

SAMPLER = SamplerConfig(num_steps=8)
STEERED = range(FirstSampleId.STEERING, FirstSampleId.STEERING + 3)
"""Sample ids of the first three images of a call."""
GUIDED = SAMPLER.num_steps - 2
"""Steps of SAMPLER at sigma 0.875 to 0.25, within the default window."""


class LatentMean(nn.Module):
    """A critic in closed form: V is the mean of the noisy latent, so its gradient is the same everywhere."""

    num_rewards = 1
    rewards: RewardHeads | None = None

    def __init__(self, sign: float = 1.0, mean: float = 0.0, std: float = 1.0) -> None:
        """`mean` and `std`: of the raw reward, the latent's mean times `sign`."""
        super().__init__()
        self.sign = sign
        self.trunk = Trunk()
        self.reward_mean, self.reward_std = torch.tensor([mean]).double(), torch.tensor([std]).double()

    def record(self, model: nn.Module, *, detach: bool = True) -> AbstractContextManager[Features]:
        return record_taps(model, [], detach=detach)

    def forward(
        self, features: Features, sample: Tensor, timestep: Tensor, conditioning: Conditioning
    ) -> Tensor:
        reward = self.sign * sample.mean(dim=(1, 2, 3), keepdim=True)[:, 0, 0]
        return (reward - self.reward_mean.float()) / self.reward_std.float()


def backbone_with(critic: nn.Module | None) -> LatentBackbone:
    backbone = tiny_backbone("dit")
    backbone.critic = critic  # type: ignore[assignment]
    return backbone


def real_critic(backbone: LatentBackbone, trunk: str = "branch", heads: int = 1, seed: int = 0) -> Critic:
    critic = build_critic(backbone, heads, CriticConfig(trunk=trunk, hidden_dim=16), seed=seed)
    assert critic is not None
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        nn.init.normal_(critic.head.output.weight)
    return critic


def plain(**changes: object) -> SteeringConfig:
    return SteeringConfig(method="best_of_n", particles=1, **changes)  # type: ignore[arg-type]


def final_value(backbone: LatentBackbone, config: SteeringConfig) -> float:
    return float(steer(backbone, PROMPTS, config, sampler=SAMPLER)[1].values[-1].mean())


METHODS = {
    "plain": (plain(), [1] * 8),
    "best of 4": (SteeringConfig(method="best_of_n"), [4] * 8),
    "pruning": (SteeringConfig(method="pruning"), [4] * 5 + [2] * 2 + [1]),
    "pruning 16-8-4-2": (
        SteeringConfig(particles=16, prune_fractions=(0.25, 0.5, 0.75)),
        [16] * 3 + [8] * 2 + [4] * 2 + [2],
    ),
    "smc": (SteeringConfig(method="smc"), [4] * 8),
    "svdd": (SteeringConfig(method="beam", particles=1, candidates=3), [1] + [3] * 7),
    "beam": (SteeringConfig(method="beam", particles=2, candidates=3), [2] + [6] * 7),
}


@pytest.mark.parametrize(("config", "states"), METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("guidance_weight", [0.0, 0.1])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_the_counter_equals_the_closed_formula(
    config: SteeringConfig, states: list[int], guidance_weight: float, guidance_scale: float
) -> None:
    backbone = backbone_with(LatentMean())
    config = replace(config, guidance_weight=guidance_weight)
    sampler = replace(SAMPLER, guidance_scale=guidance_scale)
    prompts = PROMPTS[:2]
    images, stats = steer(backbone, prompts, config, sampler=sampler)
    per_state = 1 + (guidance_scale > 1)
    first_guided = 1
    expected = sum(states) * per_state
    tried = min(32, states[first_guided] * len(prompts)) * per_state / len(prompts)
    backwards = sum(states[first_guided : first_guided + GUIDED]) if guidance_weight else 0
    table = backbone.transition_table(sampler)
    assert trajectories_per_step(config, table) == states
    assert planned_evaluations(config, table, guidance_scale=guidance_scale) == expected + 2 * backwards
    assert stats.evaluations.forwards == (expected + (tried if guidance_weight else 0)) * len(prompts)
    assert stats.evaluations.backwards == backwards * len(prompts)
    assert images.shape == (len(prompts), 3, 32, 32)
    assert stats.values.shape == (8, len(prompts))


@pytest.mark.parametrize(("trunk", "own"), [("branch", 0), ("shared", 0), ("copy", 1), ("clean_net", 0)])
def test_a_critic_that_runs_the_model_itself_is_counted(trunk: str, own: int) -> None:
    backbone = tiny_backbone("dit")
    backbone.critic = real_critic(backbone, trunk)
    config = SteeringConfig(particles=2, prune_fractions=(0.5,))
    stats = steer(backbone, PROMPTS[:2], config, sampler=SAMPLER)[1]
    planned = planned_evaluations(config, backbone.transition_table(SAMPLER), critic_forwards=own)
    assert stats.evaluations.per_image == planned == (2 * 5 + 3) * (1 + own)


def test_children_are_only_tried_where_a_step_draws_noise() -> None:
    sampler = replace(SAMPLER, window=Fixed((0, 4)))
    backbone = backbone_with(LatentMean())
    config = SteeringConfig(method="beam", particles=1)
    stats = steer(backbone, PROMPTS, config, sampler=sampler)[1]
    assert stats.evaluations.per_image == 1 + 4 * 4 + 3


def test_one_trajectory_without_guidance_is_plain_sampling() -> None:
    backbone = backbone_with(LatentMean())
    images, stats = steer(backbone, PROMPTS[:3], plain(), sampler=SAMPLER)
    table = backbone.transition_table(SAMPLER)
    sampler = RolloutSampler(backbone, None, GraphRunner())
    rollout = sampler.sample(table, PROMPTS[:3], [{}] * 3, NoiseKey.create(0, STEERED))
    assert torch.equal(images, backbone.decode(rollout.clean_latents))
    assert stats.evaluations.per_image == 8


def test_classifier_free_guidance_is_that_of_sampling() -> None:
    backbone = backbone_with(LatentMean())
    sampler = replace(SAMPLER, guidance_scale=4.0)
    images, stats = steer(backbone, PROMPTS[:3], plain(), sampler=sampler)
    table = backbone.transition_table(sampler)
    rollout = RolloutSampler(backbone, None, GraphRunner()).sample(
        table, PROMPTS[:3], [{}] * 3, NoiseKey.create(0, STEERED), guidance_scale=4.0
    )
    torch.testing.assert_close(images, backbone.decode(rollout.clean_latents), rtol=1e-5, atol=1e-5)
    assert stats.evaluations.per_image == 16


@pytest.mark.parametrize("name", ["best of 4", "pruning", "smc", "svdd", "beam"])
def test_every_method_raises_the_value(name: str) -> None:
    backbone = backbone_with(LatentMean())
    config = METHODS[name][0]
    if config.method in ("smc", "beam"):
        config = replace(config, temperature=0.01)
    assert final_value(backbone, config) > final_value(backbone, plain())


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_guidance_moves_the_latents_up_the_value_whatever_its_sign(sign: float) -> None:
    backbone = backbone_with(LatentMean(sign))
    _, stats = steer(backbone, PROMPTS, plain(guidance_weight=0.3), sampler=SAMPLER)
    assert float(stats.values[-1].mean()) > final_value(backbone, plain()) + 0.01
    assert stats.gradient_gain > 0


@pytest.mark.parametrize("trunk", ["branch", "shared", "copy"])
def test_the_gradient_of_a_real_critic_passes_its_sign_test_and_trains_nothing(trunk: str) -> None:
    backbone = tiny_backbone("dit")
    critic = backbone.critic = real_critic(backbone, trunk, heads=2)
    parameters = [*backbone.model.parameters(), *critic.parameters()]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 0.25)
    before = [parameter.detach().clone() for parameter in parameters]
    stats = steer(backbone, PROMPTS, plain(guidance_weight=0.1), sampler=SAMPLER, head_weights=torch.ones(2))[
        1
    ]
    assert stats.gradient_gain > 0
    for parameter, value in zip(parameters, before, strict=True):
        assert torch.equal(parameter, value)
        assert parameter.grad is not None
        assert bool((parameter.grad == 0.25).all())


class Cliff(LatentMean):
    """Its gradient points up, its value falls: the gradient is not of the function that it reports."""

    def forward(
        self, features: Features, sample: Tensor, timestep: Tensor, conditioning: Conditioning
    ) -> Tensor:
        value = super().forward(features, sample, timestep, conditioning)
        return value if torch.is_grad_enabled() else value - 1


def test_a_gradient_that_lowers_the_value_is_refused() -> None:
    with Refusal(
        "along its own gradient, so it cannot guide",
        cause="A critic whose value falls where its gradient points up.",
        remedy="train the critic longer or use guidance_weight=0",
    ).raised():
        steer(backbone_with(Cliff()), PROMPTS[:2], plain(guidance_weight=0.1), sampler=SAMPLER)


@pytest.mark.parametrize("name", ["pruning", "smc", "beam"])
def test_images_do_not_depend_on_the_batch_size(name: str) -> None:
    backbone = backbone_with(LatentMean())
    config = METHODS[name][0]
    whole = steer(backbone, PROMPTS[:3], config, sampler=SAMPLER)[0]
    # Fewer latents per call than trajectories of one image.
    parts = steer(backbone, PROMPTS[:3], replace(config, batch_size=3), sampler=SAMPLER)[0]
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["plain", "smc"])
def test_calls_differ_by_their_first_image_and_repeat_under_the_same(name: str) -> None:
    backbone = backbone_with(LatentMean())
    config = METHODS[name][0]
    two = steer(backbone, PROMPTS[:1] * 2, config, sampler=SAMPLER)[0]
    assert not torch.allclose(two[0], two[1])
    behind = replace(config, first_image=1)
    calls = [steer(backbone, PROMPTS[:1], each, sampler=SAMPLER)[0] for each in (config, behind, config)]
    assert torch.equal(calls[0], calls[2])
    torch.testing.assert_close(torch.cat(calls[:2]), two, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["best of 4", "smc", "beam"])
def test_no_noise_of_steering_is_that_of_training_or_drawn_twice(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[str, int, int]] = []

    def watched(op: str, ids: Tensor, steps: Tensor) -> None:
        drawn.extend((op, *pair) for pair in zip(ids.tolist(), steps.tolist(), strict=True))

    noise, step, resample = ops.normal_noise, ops.gaussian_step, ops.systematic_resample

    def normal_noise(shape: Any, steps: Tensor, key: NoiseKey) -> Tensor:
        watched("noise", key.sample_ids, steps)
        return noise(shape, steps, key)

    def gaussian_step(sample: Tensor, *rest: Any, noise: NoiseKey, **named: Any) -> Any:
        watched("step", noise.sample_ids, rest[2])
        return step(sample, *rest, noise=noise, **named)

    def systematic_resample(weights: Tensor, steps: Tensor, key: NoiseKey) -> Tensor:
        watched("resample", key.sample_ids, steps)
        return resample(weights, steps, key)

    for function in (normal_noise, gaussian_step, systematic_resample):
        monkeypatch.setattr(ops, function.__name__, function)
    config = METHODS[name][0]
    if name == "smc":
        config = replace(config, ess_threshold=1.0)
    steer(backbone_with(LatentMean()), PROMPTS[:2], config, sampler=SAMPLER)
    assert len(drawn) > 16
    counters = [(sample_id, at) for _, sample_id, at in drawn]
    assert len(set(counters)) == len(counters)
    assert min(sample_id for sample_id, _ in counters) >= max(FirstSampleId) == FirstSampleId.STEERING


def test_best_of_n_by_reward_needs_no_critic_and_counts_reward_calls() -> None:
    backbone = backbone_with(None)
    config = SteeringConfig(method="best_of_n", selection="reward")
    images, stats = steer(backbone, PROMPTS, config, sampler=SAMPLER, rewards=brightness, gold=brightness)
    _, single = steer(backbone, PROMPTS, plain(), sampler=SAMPLER, rewards=brightness)
    assert stats.reward_calls == 4 * len(PROMPTS)
    assert single.reward_calls == 0
    assert bool((stats.rewards["brightness"] >= single.rewards["brightness"]).all())
    torch.testing.assert_close(stats.rewards["brightness"], images.mean(dim=(1, 2, 3)))
    torch.testing.assert_close(stats.gold["brightness"], stats.rewards["brightness"])
    assert stats.values.shape == (0, len(PROMPTS))


def test_an_ensemble_takes_the_minimum_and_shares_the_forward() -> None:
    backbone = tiny_backbone("dit")
    critics = [real_critic(backbone, seed=seed) for seed in (1, 2)]
    backbone.critic = critics[0]
    alone = []
    for critic in critics:
        backbone.critic = critic
        alone.append(steer(backbone, PROMPTS, plain(), sampler=SAMPLER)[1].values[0])
    backbone.critic = critics[0]
    stats = steer(backbone, PROMPTS, plain(), sampler=SAMPLER, more_critics=critics[1:])[1]
    assert stats.evaluations.per_image == 8
    torch.testing.assert_close(stats.values[0], torch.minimum(*alone))


def test_critics_of_other_statistics_are_compared_in_the_units_of_the_first() -> None:
    perfect, other = LatentMean(mean=21.0, std=1.0), LatentMean(mean=22.0, std=0.5)
    alone = steer(backbone_with(perfect), PROMPTS, plain(), sampler=SAMPLER)[1].values
    both = steer(backbone_with(perfect), PROMPTS, plain(), sampler=SAMPLER, more_critics=[other])[1].values
    # Float32 values near -21 and -44.
    torch.testing.assert_close(both, alone, rtol=0, atol=1e-5)
    pessimist = LatentMean(mean=20.0, std=0.5)
    pessimist.sign = 0.5
    low = steer(backbone_with(perfect), PROMPTS, plain(), sampler=SAMPLER, more_critics=[pessimist])[1].values
    torch.testing.assert_close(low, torch.minimum(alone, (alone + 21.0) / 2 - 21.0), rtol=0, atol=1e-5)


def test_heads_are_summed_by_weight_or_their_minimum_is_taken() -> None:
    backbone = tiny_backbone("dit")
    backbone.critic = real_critic(backbone, heads=2)

    def first_values(weights: list[float], **settings: object) -> Tensor:
        config = plain(**settings)
        weight = torch.tensor(weights)
        return steer(backbone, PROMPTS, config, sampler=SAMPLER, head_weights=weight)[1].values[0]

    first, second = first_values([1.0, 0.0]), first_values([0.0, 1.0])
    torch.testing.assert_close(first_values([1.0, 2.0]), first + 2 * second)
    minimum = first_values([1.0, 1.0], head_combination="minimum")
    torch.testing.assert_close(minimum, torch.minimum(first, second))
    # A head without weight is no candidate for the minimum.
    torch.testing.assert_close(first_values([1.0, 0.0], head_combination="minimum"), first)


@pytest.mark.parametrize(
    ("settings", "refused"),
    [
        (
            {"particles": 3},
            Refusal("particles=3", cause="Particles that cannot be halved.", remedy="must be a power of two"),
        ),
        (
            {"guidance_weight": -1.0},
            Refusal("guidance_weight=-1.0", cause="Guidance away from the value.", remedy="must be >= 0"),
        ),
        (
            {"guidance_weight": 0.1, "guidance_window": (0.9, 0.2)},
            Refusal(
                "guidance_window=(0.9, 0.2)",
                cause="A window of noise levels from high to low.",
                remedy="must satisfy 0 <= low < high <= 1",
            ),
        ),
        (
            {"method": "genetic"},
            Refusal(
                "unknown method 'genetic'",
                cause="A steering method that there is not.",
                remedy="known: best_of_n, pruning, smc, beam",
            ),
        ),
        (
            {"method": "smc", "temperature": 0.0},
            Refusal(
                "temperature=0 leaves smc no target exp(V / temperature)",
                cause="SMC at temperature 0.",
                remedy="use temperature > 0 or method='beam'",
            ),
        ),
        (
            {"prune_fractions": (0.5, 1.5)},
            Refusal(
                "prune_fractions[1]=1.5", cause="Pruning after the last step.", remedy="must lie in (0, 1)"
            ),
        ),
        (
            {"method": "best_of_n", "prune_fractions": (0.5,)},
            Refusal(
                "prune_fractions=(0.5,) would be ignored by method='best_of_n'",
                cause="An option of pruning for another method.",
                remedy="leave it out, or use 'pruning'",
            ),
        ),
        (
            {"method": "best_of_n", "temperature": 0.1},
            Refusal(
                "temperature=0.1 would be ignored by method='best_of_n'",
                cause="A temperature where nothing is weighted.",
                remedy="leave it out, or use 'smc' and 'beam'",
            ),
        ),
        (
            {"method": "beam", "ess_threshold": 0.9},
            Refusal(
                "ess_threshold=0.9 would be ignored by method='beam'",
                cause="A threshold of resampling for another method.",
                remedy="leave it out, or use 'smc'",
            ),
        ),
        (
            {"candidates": 2},
            Refusal(
                "candidates=2 would be ignored by method='pruning'",
                cause="Children per step for another method.",
                remedy="leave it out, or use 'beam'",
            ),
        ),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, object], refused: Refusal) -> None:
    with refused.raised():
        SteeringConfig(**settings)  # type: ignore[arg-type]


ODE = SamplerConfig(kind="ode", num_steps=8, noise_level=0.0)
UNUSABLE = {
    "no critic": (
        None,
        SteeringConfig(),
        SAMPLER,
        Refusal(
            "steering needs a critic",
            cause="A backbone without a critic.",
            remedy="load a backbone that was saved with one, pass load_backbone a critic_file",
        ),
    ),
    "no critic to guide": (
        None,
        plain(guidance_weight=0.1),
        SAMPLER,
        Refusal(
            "steering needs a critic",
            cause="Guidance without a critic.",
            remedy="or use method='best_of_n' with selection='reward'",
        ),
    ),
    "no reward": (
        LatentMean(),
        SteeringConfig(selection="reward"),
        SAMPLER,
        Refusal(
            "selection='reward' has no reward to select by",
            cause="Selection by a reward that nobody gave.",
            remedy="pass rewards, or use 'value'",
        ),
    ),
    "no noise": (
        LatentMean(),
        SteeringConfig(method="smc"),
        ODE,
        Refusal(
            "every step of the 'ode' sampler is deterministic, so smc would only copy",
            cause="Particles that are copied and never part again.",
            remedy="use noise_level > 0 (0.7 for 'flow_sde'), or method='pruning'",
        ),
    ),
    "no noise for children": (
        LatentMean(),
        SteeringConfig(method="beam"),
        ODE,
        Refusal(
            "so beam would only copy",
            cause="Children of a step that draws no noise.",
            remedy="use noise_level > 0 (0.7 for 'flow_sde'), or method='pruning'",
        ),
    ),
    "no noise to shift": (
        LatentMean(),
        plain(guidance_weight=0.1, guidance_form="mean_shift"),
        ODE,
        Refusal(
            "guidance_weight=0.1 would be ignored: no step's noise level lies within (0.2, 0.9)",
            cause="A window of guidance that no step falls into, or a form that needs noise.",
            remedy="the levels are [1.0, 0.875",
        ),
    ),
    "too few steps": (
        LatentMean(),
        SteeringConfig(),
        SamplerConfig(num_steps=1),
        Refusal(
            "prune_fractions=(0.5, 0.75) of 1 steps are the steps [0, 1]",
            cause="More prunings than steps.",
            remedy="they must differ and lie between",
        ),
    ),
}


@pytest.mark.parametrize(("critic", "config", "sampler", "refused"), UNUSABLE.values(), ids=UNUSABLE)
def test_what_a_sampler_or_critic_cannot_serve_is_refused_before_any_forward(
    critic: nn.Module | None, config: SteeringConfig, sampler: SamplerConfig, refused: Refusal
) -> None:
    backbone = backbone_with(critic)
    backbone.model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with refused.raised():
        steer(backbone, PROMPTS, config, sampler=sampler)


def test_a_reward_that_hangs_ends_steering_with_its_name() -> None:
    def asleep(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        time.sleep(60)
        return images.mean(dim=(1, 2, 3))

    asleep.time_limit_s = 0.1  # type: ignore[attr-defined]
    start = time.monotonic()
    with pytest.raises(RewardError, match=r"reward 'asleep' has not returned for 0\.1 s"):
        steer(backbone_with(LatentMean()), PROMPTS[:1], sampler=SAMPLER, gold=asleep)
    assert time.monotonic() - start < 30
