"""The trainer's iteration is the page's: trajectories, advantages, and the weights that it leaves."""

from __future__ import annotations

import copy
from typing import Any

import linear_chain
import pytest
import torch
from torch import Tensor, nn

from lacfast import LatentActorCriticTrainer, PPOConfig, SamplerConfig, TrainConfig
from lacfast.backbones.taps import Tap
from lacfast.backbones.trunks import SharedTrunk
from lacfast.config import CriticConfig
from lacfast.critic.trunk import Trunk
from lacfast.records import Advantages, Conditioning, NoiseKey, Rollout
from lacfast.reference import iteration as page

SEED, BATCH_SIZE = 3, 8
REWARDS = {linear_chain.linear_reward: 1.0, linear_chain.quadratic_reward: 0.5}
PASSES: dict[str, Any] = {"num_inner_epochs": 2, "num_minibatches": 2, "max_grad_norm": 0.05}
ADAMW: dict[str, Any] = {"betas": (0.9, 0.95), "weight_decay": 1e-4}
RATES = {"model": 1e-4, "critic": 1e-3}
"""The learning rates of the paper: about how far an optimizer step moves every weight."""


class Denoiser(nn.Module):
    """A small net in float64, so that the batch that a sample is in does not show in its output."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.lower, self.upper = nn.Linear(14, 16), nn.Linear(16, 12)
        for parameter in self.double().parameters():
            nn.init.normal_(parameter, std=0.3, generator=generator)

    def forward(self, sample: Tensor, timestep: Tensor, shift: Tensor) -> Tensor:
        state = torch.cat([sample.flatten(1), timestep[:, None] / 1000, shift], dim=1)
        output: Tensor = self.upper(self.lower(state.double()).tanh())
        return output.view(sample.shape).to(sample.dtype)


def predict(model: nn.Module, sample: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
    output: Tensor = model(sample, timestep, conditioning.tensors["encoder_hidden_states"][:, 0])
    return output


class DenoiserBackbone(linear_chain.LinearChain):
    """The trainer's protocol around a Denoiser; the critic reads its hidden layer as two tokens."""

    def __init__(self) -> None:
        self.model = Denoiser()
        self.critic = None

    def predict(self, sample: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        return predict(self.model, sample, timestep, conditioning)

    def encode_unconditional(self, count: int) -> Conditioning:
        return self.encode_prompts(["0"] * count)

    def build_trunk(self, config: CriticConfig) -> Trunk:
        def read(arguments: dict[str, Any], output: Tensor) -> dict[str, Tensor]:
            return {"hidden": output.float().view(-1, 2, 8)}

        return SharedTrunk({"hidden": (Tap("lower", read), 8)})

    def frozen_reference(self) -> DenoiserBackbone:
        return copy.deepcopy(self)


class RecordingTrainer(LatentActorCriticTrainer):
    """Keeps the advantages of its last iteration."""

    def advantages(self, rollout: Rollout) -> Advantages:
        self.learned = super().advantages(rollout)
        return self.learned


class PageRun:
    """What lives between two iterations of the page: copies of a trainer's models before its first one."""

    def __init__(self, trainer: LatentActorCriticTrainer) -> None:
        self.table = trainer.table
        self.unconditional = trainer.backbone.encode_unconditional(1)
        self.guidance_scale = trainer.config.sampler.guidance_scale
        self.model, self.critic = copy.deepcopy((trainer.backbone.model, trainer.critic))
        self.anchor = copy.deepcopy(self.model)
        self.rewards: list[Tensor] = []
        self.policy_optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=RATES["model"], eps=1e-15, **ADAMW
        )
        self.critic_optimizer = torch.optim.AdamW(self.critic.parameters(), lr=RATES["critic"], **ADAMW)

    def policy_of(self, model: nn.Module) -> page.Model:
        def policy(sample: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
            return predict(model, sample, timestep, conditioning)

        if self.guidance_scale == 1:
            return policy
        return page.guided(policy, self.unconditional, self.guidance_scale)

    def critic_on(self, behaviour: nn.Module) -> page.Model:
        """Values on the features of the policy that made the rollout, which keeps them."""

        def critic(sample: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
            with torch.no_grad(), self.critic.record(behaviour) as features:
                predict(behaviour, sample, timestep, conditioning)
            values: Tensor = self.critic(features, sample, timestep, conditioning)
            return values

        return critic

    def reward(self, latents: Tensor) -> Tensor:
        return torch.stack([function(latents, [], []) for function in REWARDS], dim=1)

    def reward_statistics(self, rewards: Tensor) -> tuple[Tensor, Tensor]:
        old = moments(self.rewards or [rewards])
        self.rewards.append(rewards)
        new = moments(self.rewards)
        self.critic.rescale(*old, *new)
        return new

    def train_iteration(
        self, iteration: int, conditioning: Conditioning, **options: float
    ) -> dict[str, Tensor]:
        """One iteration; returns what the trainer's is compared with."""
        behaviour = copy.deepcopy(self.model)
        first_id = iteration * BATCH_SIZE
        noise = NoiseKey.create(SEED, range(first_id, first_id + BATCH_SIZE))
        policy, shape = self.policy_of(self.model), linear_chain.SHAPE
        latents, model_outputs = page.rollout(policy, self.table, conditioning, noise, shape)
        rewards, learned = page.train_iteration(
            policy,
            self.critic_on(behaviour),
            self.reward,
            self.reward_statistics,
            self.table,
            conditioning,
            noise,
            latent_shape=shape,
            weights=torch.tensor(list(REWARDS.values())),
            policy_optimizer=self.policy_optimizer,
            critic_optimizer=self.critic_optimizer,
            iteration=iteration,
            anchor=self.policy_of(self.anchor) if "kl_weight" in options else None,
            **PASSES,
            **options,
        )
        return {
            "latents": latents,
            "model_outputs": model_outputs,
            "rewards": rewards,
            "advantages": learned.advantages.T,
            "targets": learned.targets[:, -1],
        }


def moments(rewards: list[Tensor]) -> tuple[Tensor, Tensor]:
    seen = torch.cat(rewards).double()
    return seen.mean(dim=0).float(), seen.std(dim=0, correction=0).float()


def trained(trainer: RecordingTrainer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An iteration of the trainer: what the page's is compared with, and its metrics."""
    metrics = trainer.train_iteration()
    rollout, learned = trainer.last_rollout, trainer.learned
    assert rollout is not None
    return {
        "latents": rollout.latents,
        "model_outputs": rollout.model_outputs,
        "rewards": torch.stack(list(rollout.rewards.values()), dim=1),
        "advantages": learned.policy,
        "targets": learned.targets,
    }, metrics


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
@pytest.mark.parametrize(
    "options", [{}, {"gae_lambda": 0.9}, {"kl_weight": 30.0}], ids=["paper", "lambda", "kl"]
)
def test_the_trainer_does_what_the_page_does(
    options: dict[str, float], guidance_scale: float, backend_name: str
) -> None:
    trainer = RecordingTrainer(
        DenoiserBackbone(),
        REWARDS,
        list(linear_chain.PROMPTS),
        TrainConfig(
            seed=SEED,
            batch_size=BATCH_SIZE,
            sampler=SamplerConfig(num_steps=4, guidance_scale=guidance_scale),
            critic=CriticConfig(hidden_dim=16, head_dim=8, num_heads=2),
            ppo=PPOConfig(**PASSES, **options),
        ),
    )
    run = PageRun(trainer)
    # The second iteration starts from weights, moments, statistics and a distance to the anchor.
    for iteration in range(2):
        actual, metrics = trained(trainer)
        assert metrics["first_max_abs_log_ratio"] == 0
        assert metrics["clip_fraction_high"].nansum() > 0
        assert metrics["policy_grad_norm"] > PASSES["max_grad_norm"]
        assert trainer.last_rollout is not None
        expected = run.train_iteration(iteration, trainer.last_rollout.conditioning, **options)
        if backend_name == "reference" and iteration == 0:
            assert torch.equal(actual["latents"], expected["latents"])
        for name, tensor in expected.items():
            torch.testing.assert_close(
                actual[name], tensor, rtol=0, atol=5e-6, msg=lambda text, n=name: f"{n}: {text}"
            )
        for name, module in {"model": trainer.backbone.model, "critic": trainer.critic}.items():
            weights = dict(getattr(run, name).named_parameters())
            for key, weight in module.named_parameters():
                torch.testing.assert_close(weight, weights[key], rtol=0, atol=1e-3 * RATES[name])
