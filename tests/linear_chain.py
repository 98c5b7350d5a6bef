"""A linear-Gaussian denoising chain: values, floors and ceilings are known in closed form.

The model's output is linear in the state and shifted by the prompt, v = c x - u_p w, so with y = w.x

    y' = (a + b c) y - b u_p + std e,   e ~ N(0, 1)
    E[y_T | x_k, p] = gain_k y_k + push_k u_p;   Var(y_T | x_k, p) = noise_k
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lacfast import SamplerConfig, schedule
from lacfast.backbones.trunks import OwnForwardTrunk
from lacfast.config import CriticConfig
from lacfast.critic.critic import Critic
from lacfast.critic.trunk import Features
from lacfast.records import Conditioning, TransitionTable

SHAPE = (3, 2, 2)
PROMPTS = ("-1.5", "-0.5", "0.5", "1.5")
"""Each is the shift u of its own."""
DIRECTION = torch.full(SHAPE, 12**-0.5)
"""w, of length 1."""


def coordinate(latents: Tensor) -> Tensor:
    """y = w.x (B,) of latents (B, 3, 2, 2)."""
    return (latents * DIRECTION).flatten(1).sum(dim=1)


class LinearChain:
    """A backbone of the trainer's protocol whose latents are its images."""

    dtype = torch.float32
    latent_shape = SHAPE
    judged_frames = 0
    rescales_guidance = False

    def __init__(self, slope: float = 0.5) -> None:
        self.model = nn.Linear(1, 1, bias=False)
        nn.init.constant_(self.model.weight, slope)
        self.critic: Critic | None = None

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        shifts = torch.tensor([float(prompt) for prompt in prompts])
        return Conditioning({"encoder_hidden_states": shifts[:, None, None]})

    def predict(self, sample: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        shift = conditioning.tensors["encoder_hidden_states"][:, 0, 0]
        output: Tensor = self.model(sample[..., None])[..., 0]
        return output - shift[:, None, None, None] * DIRECTION

    def decode(self, latents: Tensor) -> Tensor:
        return latents

    def transition_table(self, config: SamplerConfig) -> TransitionTable:
        sigmas = schedule.uniform_sigmas(config.num_steps)
        return schedule.flow_table(config.kind, sigmas, config.noise_level, window=config.stochastic_window)

    def build_trunk(self, config: CriticConfig) -> ChainTrunk:
        return ChainTrunk()

    def requantize(self) -> None:
        """Nothing: it is not quantised."""

    def policy_parameters(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    def policy_state(self) -> dict[str, Tensor]:
        return dict(self.model.state_dict())


class ChainTrunk(OwnForwardTrunk):
    """The coordinate and the prompt's shift, beside constants that keep their size through a norm."""

    tap_dims = (4,)

    def forward(
        self, features: Features, sample: Tensor, timestep: Tensor, conditioning: Conditioning
    ) -> list[Tensor]:
        shift = conditioning.tensors["encoder_hidden_states"][:, 0, 0]
        constant = torch.full_like(shift, 3.0)
        return [torch.stack([coordinate(sample), shift, constant, -constant], dim=-1)[:, None]]


def moments(table: TransitionTable, slope: float = 0.5) -> tuple[Tensor, Tensor, Tensor]:
    """gain, push and noise, (T,) float64 each."""
    gains, pushes, noises = [1.0], [0.0], [0.0]
    for a, b, std in reversed(list(zip(table.a.tolist(), table.b.tolist(), table.std.tolist(), strict=True))):
        noises.append(noises[-1] + (gains[-1] * std) ** 2)
        pushes.append(pushes[-1] - gains[-1] * b)
        gains.append(gains[-1] * (a + b * slope))
    result = [torch.tensor(terms[:0:-1]).double() for terms in (gains, pushes, noises)]
    return result[0], result[1], result[2]


def linear_reward(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    return coordinate(images)


def quadratic_reward(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    return coordinate(images).square()
