"""The trainer's iteration is the page's: trajectories, advantages, and the weights that it leaves."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import linear_chain
import pytest
import tiny_backbones
import torch
from torch import Tensor, nn

from lacfast import LatentActorCriticTrainer, PPOConfig, SamplerConfig, TrainConfig
from lacfast.backbone import Backbone
from lacfast.backbones.taps import Tap
from lacfast.backbones.trunks import SharedTrunk
from lacfast.config import CriticConfig, KLPenalty
from lacfast.critic.trunk import Trunk
from lacfast.records import Advantages, Conditioning, NoiseKey, Rollout
from lacfast.reference import iteration as page
from lacfast.rewards.reward import Reward

SEED, BATCH_SIZE = 3, 8
PASSES: dict[str, Any] = {"num_inner_epochs": 2, "num_minibatches": 2, "max_grad_norm": 0.05}
POLICY_RATE, HEAD_RATE, TRUNK_RATE = 1e-4, 1e-3, 3e-4
ADAMW: dict[str, Any] = {"betas": (0.9, 0.95), "weight_decay": 1e-4}


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


class DenoiserBackbone(linear_chain.LinearChain):
    """The trainer's protocol around a Denoiser; the critic reads its hidden layer as two tokens."""

    rescales_guidance = False

    def __init__(self) -> None:
        self.model = Denoiser()
        self.critic = None

    def predict(self, sample: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        output: Tensor = self.model(sample, timestep, conditioning.tensors["encoder_hidden_states"][:, 0])
        return output

    def encode_unconditional(self, count: int) -> Conditioning:
        return self.encode_prompts(["0"] * count)

    def build_trunk(self, config: CriticConfig) -> Trunk:
        def read(arguments: dict[str, Any], output: Tensor) -> dict[str, Tensor]:
            return {"hidden": output.float().view(-1, 2, 8)}

        return SharedTrunk({"hidden": (Tap("lower", read), 8)})

    def frozen_anchor(self, which: str = "start") -> DenoiserBackbone:
        return copy.deepcopy(self)


class RecordingTrainer(LatentActorCriticTrainer):
    """Keeps the advantages of its last iteration."""

    def advantages(self, rollout: Rollout) -> Advantages:
        self.learned = super().advantages(rollout)
        return self.learned

    def compared(self) -> dict[str, Tensor]:
        """What of the last iteration is compared with the page's."""
        assert self.last_rollout is not None
        return {
            "latents": self.last_rollout.latents,
            "model_outputs": self.last_rollout.model_outputs,
            "rewards": torch.stack(list(self.last_rollout.rewards.values()), dim=1),
            "advantages": self.learned.policy,
            "targets": self.learned.targets,
        }


class PageRun:
    """What lives between two iterations of the page, from copies of a trainer's models before its first."""

    def __init__(self, trainer: LatentActorCriticTrainer, rewards: dict[Reward, float]) -> None:
        self.table, self.rewards = trainer.table, rewards
        self.guidance_scale = trainer.config.sampler.guidance_scale
        self.backbone, self.anchor = (trainer.backbone.frozen_anchor() for _ in range(2))
        self.critic = copy.deepcopy(trainer.critic)
        self.seen: list[Tensor] = []
        weights = self.backbone.model.requires_grad_(True).parameters()
        groups = ((self.critic.head, HEAD_RATE), (self.critic.trunk, TRUNK_RATE))
        self.policy_optimizer = torch.optim.AdamW(
            weights, lr=POLICY_RATE, eps=trainer.config.ppo.adam_eps, **ADAMW
        )
        self.critic_optimizer = torch.optim.AdamW(
            [{"params": list(part.parameters()), "lr": rate} for part, rate in groups], **ADAMW
        )

    def policy_of(self, backbone: Backbone) -> page.Model:
        if self.guidance_scale == 1:
            return backbone.predict
        return page.guided(backbone.predict, backbone.encode_unconditional(1), self.guidance_scale)

    def critic_on(self, behaviour: Backbone) -> page.Model:
        """Values on the features of the policy that made the rollout, as the trainer keeps them."""

        def critic(sample: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
            with torch.no_grad(), self.critic.record(behaviour.model) as features:
                behaviour.predict(sample, timestep, conditioning)
            values: Tensor = self.critic(features, sample, timestep, conditioning)
            return values

        return critic

    def reward(self, latents: Tensor) -> Tensor:
        images = self.backbone.decode(latents)
        return torch.stack([function(images, [], []) for function in self.rewards], dim=1)

    def reward_statistics(self, rewards: Tensor) -> tuple[Tensor, Tensor]:
        old = moments(self.seen or [rewards])
        self.seen.append(rewards)
        new = moments(self.seen)
        self.critic.rescale(*old, *new)
        return new

    def train_iteration(
        self, iteration: int, conditioning: Conditioning, **options: Any
    ) -> dict[str, Tensor]:
        """One iteration of the page, and what of it is compared with the trainer's."""
        first_id = iteration * BATCH_SIZE
        noise = NoiseKey.create(SEED, range(first_id, first_id + BATCH_SIZE))
        policy, shape = self.policy_of(self.backbone), self.backbone.latent_shape
        latents, model_outputs = page.rollout(policy, self.table, conditioning, noise, shape)
        rewards, learned = page.train_iteration(
            policy,
            self.critic_on(self.backbone.frozen_anchor()),
            self.reward,
            self.reward_statistics,
            self.table,
            conditioning,
            noise,
            latent_shape=shape,
            weights=torch.tensor(list(self.rewards.values())),
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


def moments(rewards: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    seen = torch.cat(list(rewards)).double()
    return seen.mean(dim=0).float(), seen.std(dim=0, correction=0).float()


def assert_weights_near(actual: nn.Module, expected: nn.Module, learning_rate: float) -> None:
    """Within a twentieth of what an optimizer step moves a weight, and a few roundings of the weight."""
    others = dict(expected.named_parameters())
    for name, weight in actual.named_parameters():
        rounding = 4 * torch.finfo(weight.dtype).eps
        torch.testing.assert_close(weight, others[name], rtol=rounding, atol=5e-2 * learning_rate)


def as_settings(options: dict[str, Any]) -> dict[str, Any]:
    """The page's options as PPOConfig has them."""
    kept = {name: value for name, value in options.items() if name != "kl_weight"}
    return kept | ({"kl": KLPenalty(options["kl_weight"])} if "kl_weight" in options else {})


def assert_same_training(
    backbone: Backbone,
    rewards: dict[Reward, float],
    prompts: Sequence[str],
    backend_name: str,
    guidance_scale: float = 1.0,
    adam_eps: float = 1e-15,
    **options: Any,
) -> list[dict[str, Any]]:
    """Two iterations of the trainer and of the page; returns the trainer's metrics."""
    config = TrainConfig(
        seed=SEED,
        batch_size=BATCH_SIZE,
        sampler=SamplerConfig(num_steps=4, guidance_scale=guidance_scale),
        critic=CriticConfig(hidden_dim=16, head_dim=8, num_heads=2),
        ppo=PPOConfig(adam_eps=adam_eps, **PASSES, **as_settings(options)),
    )
    trainer = RecordingTrainer(backbone, rewards, list(prompts), config)
    run = PageRun(trainer, rewards)
    metrics = []
    # The second iteration starts from moments, statistics and a distance to the anchor.
    for iteration in range(2):
        metrics.append(trainer.train_iteration())
        actual = trainer.compared()
        assert trainer.last_rollout is not None
        expected = run.train_iteration(iteration, trainer.last_rollout.conditioning, **options)
        if backend_name == "reference" and iteration == 0:
            assert torch.equal(actual["latents"], expected["latents"])
        for name, tensor in expected.items():
            # All are near 1; where rewards hardly vary, their deviation magnifies the latents' roundings.
            torch.testing.assert_close(
                actual[name], tensor, rtol=0, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
            )
        assert_weights_near(trainer.backbone.model, run.backbone.model, POLICY_RATE)
        assert_weights_near(trainer.critic.head, run.critic.head, HEAD_RATE)
        assert_weights_near(trainer.critic.trunk, run.critic.trunk, TRUNK_RATE)
    return metrics


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
@pytest.mark.parametrize(
    "options", [{}, {"gae_lambda": 0.9}, {"kl_weight": 30.0}], ids=["paper", "lambda", "kl"]
)
def test_the_trainer_does_what_the_page_does(
    options: dict[str, float], guidance_scale: float, backend_name: str
) -> None:
    rewards: dict[Reward, float] = {linear_chain.linear_reward: 1.0, linear_chain.quadratic_reward: 0.5}
    history = assert_same_training(
        DenoiserBackbone(), rewards, linear_chain.PROMPTS, backend_name, guidance_scale, **options
    )
    for metrics in history:
        assert metrics["first_max_abs_log_ratio"] == 0
        # Both clips hold, of the ratio and of the gradient, so that they are compared too.
        assert metrics["clip_fraction_high"].nansum() > 0
        assert metrics["policy_grad_norm"] > PASSES["max_grad_norm"]
        assert metrics["critic_grad_norm"] > PASSES["max_grad_norm"]


def test_so_it_does_with_a_transformer_and_a_branch_of_it_as_critic(backend_name: str) -> None:
    backbone = tiny_backbones.tiny_backbone("dit")
    rewards: dict[Reward, float] = {tiny_backbones.brightness: 1.0}
    # Far above a gradient's rounding in float32, whose sign AdamW would turn into a step of full size.
    assert_same_training(backbone, rewards, tiny_backbones.PROMPTS, backend_name, adam_eps=1e-7)
