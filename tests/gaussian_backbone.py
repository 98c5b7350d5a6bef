"""A diffusion model in closed form: exact velocities of Gaussian mixtures, so that tilted laws are known."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from lacfast import schedule
from lacfast.backbones.taps import record_taps
from lacfast.config import SamplerConfig
from lacfast.critic.trunk import Features, Trunk
from lacfast.records import Conditioning, TransitionTable

SHAPE = (2, 1, 1)


class MixtureVelocity(nn.Module):
    """E[noise - data | x_s] for data from equally likely Gaussians N(mean_j, spread^2)."""

    def __init__(self, means: Sequence[tuple[float, float]], spread: float) -> None:
        super().__init__()
        self.means = nn.Parameter(torch.tensor(means).view(-1, *SHAPE))
        self.spread = spread

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        s = (timestep / 1000).view(-1, 1, 1, 1, 1)
        x = sample[:, None]
        variance = s**2 + ((1 - s) * self.spread) ** 2
        distance = x - (1 - s) * self.means
        share = (-(distance**2).sum(dim=(2, 3, 4), keepdim=True) / (2 * variance)).softmax(dim=1)
        noise = s * distance / variance
        data = self.means + (1 - s) * self.spread**2 * distance / variance
        velocity: Tensor = (share * (noise - data)).sum(dim=1)
        return velocity


class GaussianBackbone:
    """The protocol's part that steering needs; images are the latents themselves."""

    dtype = torch.float32
    latent_shape = SHAPE
    judged_frames = 0

    def __init__(self, means: Sequence[tuple[float, float]] = ((1.0, -0.5),), spread: float = 0.7) -> None:
        self.model = MixtureVelocity(means, spread)
        self.critic: nn.Module | None = None

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        return Conditioning({"none": torch.zeros(len(prompts), 1)})

    def encode_unconditional(self, count: int) -> Conditioning:
        return Conditioning({"none": torch.zeros(count, 1)})

    def predict(self, sample: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        return self.model(sample, timestep)  # type: ignore[no-any-return]

    def decode(self, latents: Tensor) -> Tensor:
        return latents

    def transition_table(self, config: SamplerConfig) -> TransitionTable:
        sigmas = schedule.uniform_sigmas(config.num_steps)
        window = None if config.kind == "ode" else config.stochastic_window
        return schedule.flow_table(config.kind, sigmas, config.noise_level, window=window)


class LinearChain:
    """The law of the sampled x_T for one Gaussian: every step is linear, x' = A_k x + c_k + std_k eps."""

    def __init__(self, backbone: GaussianBackbone, table: TransitionTable) -> None:
        (mean,) = backbone.model.means.detach().double()
        spread, s = backbone.model.spread, table.sigmas[:-1]
        variance = s**2 + ((1 - s) * spread) ** 2
        slope = (s - (1 - s) * spread**2) / variance
        self.factors = table.a + table.b * slope
        offsets = -table.b * (1 + slope * (1 - s))
        self.offsets = offsets[:, None] * mean.flatten()
        self.mean, self.variance = torch.zeros(2).double(), 1.0
        for factor, offset, std in zip(self.factors, self.offsets, table.std, strict=True):
            self.mean = factor * self.mean + offset
            self.variance = float(factor**2 * self.variance + std**2)

    def expected_end(self, sample: Tensor, step: int) -> Tensor:
        """E[x_T | x_k] (B, 2)."""
        expected = sample.flatten(1).double()
        for factor, offset in zip(self.factors[step:], self.offsets[step:], strict=True):
            expected = factor * expected + offset
        return expected


class ClosedFormCritic(nn.Module):
    """A critic that is a function of (latents, step); its rewards have mean 0 and deviation 1."""

    num_rewards = 1

    def __init__(self, value: object, table: TransitionTable) -> None:
        super().__init__()
        self.value = value
        self.timesteps = table.timesteps.tolist()
        self.trunk = Trunk()
        self.reward_mean, self.reward_std = torch.zeros(1).double(), torch.ones(1).double()
        self.rewards = None

    def record(self, model: nn.Module, *, detach: bool = True) -> AbstractContextManager[Features]:
        return record_taps(model, [], detach=detach)

    def forward(
        self, features: Features, sample: Tensor, timestep: Tensor, conditioning: Conditioning
    ) -> Tensor:
        return self.value(sample, self.timesteps.index(float(timestep[0])))[:, None]  # type: ignore[operator]
