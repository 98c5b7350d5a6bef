"""Where the tilted law is known, particles reach it, weights telescope, and guidance helps without bias."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from gaussian_backbone import ClosedFormCritic, GaussianBackbone, LinearChain
from tolerances import assert_same_sum
from torch import Tensor

from lacfast.config import SamplerConfig, SteeringConfig
from lacfast.steering import ParticleStats, SteeringStats, steer

SAMPLER = SamplerConfig(num_steps=8, noise_level=0.7)
DIRECTION = torch.tensor([0.8, 0.6], dtype=torch.float64)
TAU = 0.5
SMC = SteeringConfig(
    method="smc", particles=32, temperature=TAU, selection="reward", annealing=0.0, batch_size=1 << 16
)


def linear_reward(images: Tensor, prompts: list[str], metadata: list[dict[str, object]]) -> Tensor:
    return images.flatten(1).double() @ DIRECTION


class Recorder:
    """The linear reward, which remembers what it gave."""

    name = "linear"

    def __init__(self) -> None:
        self.scores: list[Tensor] = []

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, object]]) -> Tensor:
        self.scores.append(linear_reward(images, prompts, metadata).float())
        return self.scores[-1]


def gaussian(bias: float = 0.0) -> tuple[GaussianBackbone, LinearChain]:
    """With the exact value function, or one that is wrong by a wave of height `bias`."""
    backbone = GaussianBackbone()
    table = backbone.transition_table(SAMPLER)
    chain = LinearChain(backbone, table)

    def value(sample: Tensor, step: int) -> Tensor:
        exact = (chain.expected_end(sample, step) @ DIRECTION).float()
        return exact + bias * torch.sin(3 * sample.flatten(1)[:, 0])

    backbone.critic = ClosedFormCritic(value, table)
    return backbone, chain


def run(config: SteeringConfig, images: int, bias: float = 0.0) -> tuple[Tensor, SteeringStats]:
    backbone, _ = gaussian(bias)
    drawn, stats = steer(backbone, [""] * images, config, sampler=SAMPLER, rewards=linear_reward)
    return drawn.flatten(1).double(), stats


def particle_stats(stats: SteeringStats) -> ParticleStats:
    assert stats.particles is not None
    return stats.particles


def assert_mean_within_3_standard_errors(samples: Tensor, expected: Tensor | float) -> None:
    error = samples.std(dim=0) / math.sqrt(len(samples))
    deviation = (samples.mean(dim=0) - expected).abs() / error
    assert float(deviation.max()) < 3, f"{deviation} standard errors"


def test_the_chain_samples_the_law_that_the_recursion_says() -> None:
    _, chain = gaussian()
    drawn, _ = run(SteeringConfig(method="best_of_n", particles=1), 4000)
    assert_mean_within_3_standard_errors(drawn, chain.mean)
    assert_mean_within_3_standard_errors((drawn - chain.mean) ** 2, chain.variance)


CASES = {
    "exact value": (SMC, 0.0),
    "wrong value": (SMC, 0.3),
    "annealed": (replace(SMC, annealing=1.0), 0.3),
    "guided by the optimal drift": (
        replace(SMC, guidance_weight=1 / TAU, guidance_form="mean_shift", guidance_window=(0.0, 1.0)),
        0.0,
    ),
    "guided by a wrong value": (replace(SMC, guidance_weight=0.2, guidance_form="relative"), 0.3),
}


@pytest.mark.parametrize(("config", "bias"), CASES.values(), ids=CASES)
def test_particles_follow_the_tilted_law_within_3_standard_errors(
    config: SteeringConfig, bias: float
) -> None:
    """Of 256 particles, for the bias of self-normalised weights falls with their number."""
    _, chain = gaussian()
    drawn, stats = run(replace(config, particles=256), 600, bias)
    tilted_mean = chain.mean + chain.variance * DIRECTION / TAU
    assert_mean_within_3_standard_errors(drawn, tilted_mean)
    assert_mean_within_3_standard_errors((drawn - tilted_mean) ** 2, chain.variance)
    log_evidence = float(DIRECTION @ chain.mean / TAU + chain.variance * DIRECTION @ DIRECTION / (2 * TAU**2))
    assert_mean_within_3_standard_errors((particle_stats(stats).log_evidence - log_evidence).exp(), 1.0)


def test_guidance_by_the_optimal_drift_keeps_particles_effective() -> None:
    plain = particle_stats(run(replace(SMC, ess_threshold=0.0), 50)[1])
    guided_config = replace(
        SMC,
        ess_threshold=0.0,
        guidance_weight=1 / TAU,
        guidance_form="mean_shift",
        guidance_window=(0.0, 1.0),
    )
    guided = particle_stats(run(guided_config, 50)[1])
    sizes = [float(stats.effective_sample_sizes[-1].mean()) for stats in (plain, guided)]
    assert sizes[1] > 1.5 * sizes[0], sizes


@pytest.mark.parametrize("annealing", [0.0, 1.0, 2.0])
def test_weights_telescope_to_the_tilt_whatever_the_value_says(annealing: float) -> None:
    backbone, _ = gaussian(bias=0.5)
    reward = Recorder()
    config = replace(SMC, ess_threshold=0.0, annealing=annealing)
    _, stats = steer(backbone, [""] * 20, config, sampler=SAMPLER, rewards=reward)
    expected = reward.scores[0].double().view(20, SMC.particles) / TAU
    torch.testing.assert_close(particle_stats(stats).log_weights, expected, rtol=0, atol=1e-12)


def test_resampling_moves_weight_to_the_evidence_and_nothing_else() -> None:
    plain = particle_stats(run(replace(SMC, ess_threshold=0.0), 400, bias=0.3)[1])
    resampled = particle_stats(run(SMC, 400, bias=0.3)[1])
    assert bool(resampled.resampled.any())
    assert not bool(plain.resampled.any())
    # The last steps draw no noise, so copies would stay copies.
    assert not bool(resampled.resampled[SAMPLER.num_steps - 1 :].any())
    difference = plain.log_evidence.exp() - resampled.log_evidence.exp()
    assert_mean_within_3_standard_errors(difference, 0.0)


def test_the_tilt_moves_the_right_share_to_a_mixtures_better_mode() -> None:
    backbone = GaussianBackbone(means=((-1.5, 0.0), (1.5, 0.0)), spread=0.3)
    table = backbone.transition_table(SAMPLER)
    backbone.critic = ClosedFormCritic(lambda sample, step: 0.5 * sample.flatten(1)[:, 0], table)
    plain_config = SteeringConfig(method="best_of_n", particles=1, batch_size=1 << 16)
    plain = steer(backbone, [""] * 40_000, plain_config, sampler=SAMPLER)[0].flatten(1).double()
    weights = (plain @ DIRECTION / TAU).exp()
    right = (plain[:, 0] > 0).double()
    expected = float((weights * right).sum() / weights.sum())
    error_of_expected = float(((weights * (right - expected)).square().sum().sqrt()) / weights.sum())
    assert 0.85 < expected < 0.999
    drawn = steer(backbone, [""] * 800, replace(SMC, particles=64), sampler=SAMPLER, rewards=linear_reward)[0]
    share = float((drawn.flatten(1)[:, 0] > 0).double().mean())
    error = math.hypot(math.sqrt(expected * (1 - expected) / 800), error_of_expected)
    assert abs(share - expected) < 3 * error


def test_ancestors_and_images_depend_on_the_seed_alone() -> None:
    config = replace(SMC, particles=8)
    first, stats = run(config, 30, bias=0.3)
    again, again_stats = run(replace(config, batch_size=24), 30, bias=0.3)
    other, other_stats = run(replace(config, seed=1), 30, bias=0.3)
    assert_same_sum(first, again, unit=first.abs().max())
    assert torch.equal(particle_stats(stats).resampled, particle_stats(again_stats).resampled)
    assert not torch.equal(first, other)
    assert not torch.equal(particle_stats(stats).log_weights, particle_stats(other_stats).log_weights)


def test_guidance_tilts_a_gaussian_as_far_as_its_weight_says() -> None:
    """The mean shift w std^2 grad V with the exact linear V moves E[x_T] by w times a known sum."""
    backbone, chain = gaussian()
    table = backbone.transition_table(SAMPLER)
    suffix = [float(chain.factors[step:].prod()) for step in range(table.num_steps + 1)]
    window = (0.0, 1.0)
    shift = sum(
        suffix[step + 1] * float(table.std[step]) ** 2 * suffix[step]
        for step in table.trainable_steps
        if float(table.sigmas[step]) < window[1]
    )
    settings = {
        "method": "best_of_n",
        "particles": 1,
        "guidance_form": "mean_shift",
        "guidance_window": window,
    }
    plain, _ = run(SteeringConfig(method="best_of_n", particles=1), 100)
    for weight in (0.5, 2.0):
        guided, _ = run(SteeringConfig(guidance_weight=weight, **settings), 100)
        torch.testing.assert_close(guided, plain + weight * shift * DIRECTION, rtol=1e-4, atol=1e-4)


def test_beam_of_one_candidate_is_plain_sampling_and_more_raise_the_reward() -> None:
    plain, _ = run(SteeringConfig(method="best_of_n", particles=1), 200)
    single, _ = run(SteeringConfig(method="beam", particles=1, candidates=1), 200)
    torch.testing.assert_close(single, plain, rtol=0, atol=0)
    beams = [SteeringConfig(method="beam", particles=1, temperature=tau) for tau in (100.0, 0.5, 0.0)]
    means = [float(run(beam, 200)[1].rewards["linear_reward"].mean()) for beam in beams]
    assert means[0] < means[1] < means[2]
    assert means[2] > float((plain @ DIRECTION).mean()) + 0.5
