"""The learner's steps are PPO's, wait for the device once, and leave weights where they are."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from refusals import Refusal
from tiny_backbones import PROMPTS, brightness, tiny_backbone, tiny_config
from tolerances import assert_same_step
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lacfast import LatentActorCriticTrainer, reference
from lacfast.config import CriticConfig, KLPenalty, PPOConfig, Ratio, SamplerConfig
from lacfast.learning import totals
from lacfast.learning.batches import PolicySource
from lacfast.learning.pairs import all_pairs, all_states, minibatches
from lacfast.learning.totals import PolicyRecord, ppo_metrics
from lacfast.records import Advantages, Rollout

GUIDED = SamplerConfig(num_steps=4, guidance_scale=2.5)


def trainer_for(**changes: Any) -> LatentActorCriticTrainer:
    return LatentActorCriticTrainer(tiny_backbone("dit"), brightness, PROMPTS, tiny_config(**changes))


def rollout_of(trainer: LatentActorCriticTrainer) -> tuple[Rollout, Advantages]:
    rollout = trainer.collect(trainer.prompts, 0)
    assert rollout is not None
    trainer.normalizer.update(torch.stack(list(rollout.rewards.values()), dim=1))
    return rollout, trainer.advantages(rollout)


def plain_policy_pass(
    trainer: LatentActorCriticTrainer, rollout: Rollout, advantages: Advantages, generator: torch.Generator
) -> None:
    """PPO's pass over the pairs as one would write it first: a pair at a time, eager maths, plain AdamW."""
    ppo, table, backbone = trainer.config.ppo, rollout.table, trainer.backbone
    scale = trainer.config.sampler.guidance_scale
    frozen = copy.deepcopy(backbone.model)
    parameters = backbone.policy_parameters()
    optimizer = torch.optim.AdamW(
        parameters,
        lr=ppo.policy_learning_rate,
        betas=ppo.betas,
        eps=ppo.adam_eps,
        weight_decay=ppo.weight_decay,
        foreach=False,
    )
    pairs = all_pairs(advantages.steps, rollout.batch_size)
    for minibatch in minibatches(pairs, ppo.num_minibatches, generator):
        optimizer.zero_grad()
        for step, row, position in zip(minibatch.steps, minibatch.rows, minibatch.position, strict=True):
            one = row[None]
            state = rollout.latents[step, one], table.timesteps[step][None]
            prompt = rollout.conditioning.select(one)

            def output(model: Any, state: Any = state, prompt: Any = prompt, one: Any = one) -> Tensor:
                cond = backbone.predict_with(model, *state, prompt)
                if rollout.uncond_conditioning is None:
                    return cond
                uncond = backbone.predict_with(
                    model, *state, rollout.uncond_conditioning.select(one)
                ).detach()
                return uncond + scale * (cond - uncond)

            model_output = output(backbone.model)
            noise = reference.normal_noise(tuple(model_output.shape), step[None], rollout.noise.select(one))
            difference = float(table.b[step]) * (model_output - rollout.model_outputs[step, one])
            std = float(table.std[step])
            log_ratio = (noise * difference / std - difference**2 / (2 * std**2)).mean()
            advantage = advantages.policy[position, row]
            ratio = log_ratio.exp()
            assert isinstance(ppo.clip, Ratio)
            clip = float(ppo.clip.clip_range)  # type: ignore[arg-type]
            gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
            away = float(table.b[step]) * (model_output - output(frozen).detach())
            kl_weight = 0.0 if ppo.kl is None else ppo.kl.weight
            loss = -gain + kl_weight * (away**2).mean() / (2 * std**2)
            (loss / len(minibatch)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, ppo.max_grad_norm)
        optimizer.step()


def plain_critic_pass(
    trainer: LatentActorCriticTrainer, rollout: Rollout, advantages: Advantages, generator: torch.Generator
) -> None:
    ppo, critic = trainer.config.ppo, trainer.critic
    assert critic is not None
    groups = [
        {"params": list(critic.head.parameters()), "lr": ppo.value_learning_rate},
        {"params": list(critic.trunk.parameters()), "lr": ppo.trunk_learning_rate},
    ]
    optimizer = torch.optim.AdamW(groups, betas=ppo.betas, weight_decay=ppo.weight_decay, foreach=False)
    for minibatch in minibatches(all_states(rollout), ppo.num_minibatches, generator):
        optimizer.zero_grad()
        features = {
            name: tensor[minibatch.steps, minibatch.rows] for name, tensor in rollout.features.items()
        }
        values = critic(
            features,
            rollout.latents[minibatch.steps, minibatch.rows],
            rollout.table.timesteps[minibatch.steps],
            rollout.conditioning.select(minibatch.rows),
        )
        (values - advantages.targets[minibatch.rows]).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(critic.parameters(), ppo.max_grad_norm)
        optimizer.step()


def named_critic(trainer: LatentActorCriticTrainer) -> dict[str, Tensor]:
    assert trainer.critic is not None
    return {f"critic.{name}": tensor.clone() for name, tensor in trainer.critic.state_dict().items()}


@pytest.mark.isa
@pytest.mark.parametrize(
    ("sampler", "kl", "epochs"),
    [(SamplerConfig(num_steps=4), None, 1), (GUIDED, KLPenalty(0.1), 1), (GUIDED, KLPenalty(0.1), 2)],
    ids=["plain", "guided, KL", "guided, KL, two epochs"],
)
def test_learning_equals_a_plain_loop_over_single_pairs(
    sampler: SamplerConfig, kl: KLPenalty | None, epochs: int
) -> None:
    ppo = PPOConfig(
        clip=Ratio(1e-3),
        num_minibatches=2,
        microbatch_size=8,
        kl=kl,
        num_inner_epochs=epochs,
        # AdamW divides by the gradient's size, so rounding of a gradient near 0 would be a step of full size.
        adam_eps=1e-4,
        policy_learning_rate=1e-3,
    )
    ours, plain = (trainer_for(ppo=ppo, sampler=sampler) for _ in range(2))
    rollout, advantages = rollout_of(ours)
    before = copy.deepcopy(ours.backbone.model.state_dict())
    critic_before = named_critic(ours)
    metrics = ours.learner.learn(rollout, advantages, 0)
    assert metrics["first_max_abs_log_ratio"] < 1e-6
    if epochs == 1:
        generator = torch.Generator().manual_seed(ours.config.seed * 1_000_003 * 97)
        plain_policy_pass(plain, rollout, advantages, generator)
        plain_critic_pass(plain, rollout, advantages, generator)
        assert_same_step(named_critic(ours), named_critic(plain), critic_before)
    else:
        # Outputs of the anchor that are kept for two epochs are those of each microbatch.
        plain.learner.policy_update.completed = lambda source: source  # type: ignore[method-assign]
        plain.learner.learn(rollout, advantages, 0)
    learned, expected = (each.backbone.model.state_dict() for each in (ours, plain))
    assert_same_step(learned, expected, before)


class NoHostSync(TorchDispatchMode):
    """Refuses every operation whose result the host must wait for."""

    REFUSED = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero", "aten::item")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func._schema.name not in self.REFUSED, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("ppo", "reads"),
    [
        (
            PPOConfig(
                clip=Ratio(1e-3), num_minibatches=2, microbatch_size=5, kl=KLPenalty(0.1), warmup_steps=2
            ),
            1,
        ),
        (PPOConfig(clip=Ratio(1e-3), num_minibatches=3, microbatch_size=8, kl_limit=1.0), 4),
    ],
    ids=["once", "once per policy step with a KL limit, and once for the critic"],
)
@pytest.mark.parametrize("trunk", ["branch", "joint"])
def test_the_host_waits_only_where_it_reads_the_records(
    ppo: PPOConfig, reads: int, trunk: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_for(ppo=ppo, sampler=GUIDED, critic=CriticConfig(trunk=trunk, hidden_dim=16))
    rollout, advantages = rollout_of(trainer)
    seen = []
    read = totals.UpdateRecords.read

    def counted(self: Any, *args: Any) -> Tensor:
        seen.append(len(self._pending))
        with torch.utils._python_dispatch._disable_current_modes():
            return read(self, *args)

    monkeypatch.setattr(totals.UpdateRecords, "read", counted)
    # Statistics of the records are host tensors.
    monkeypatch.setattr(totals.UpdateRecords, "metrics", lambda self: {})
    with NoHostSync():
        trainer.learner.learn(rollout, advantages, 0)
    assert len(seen) == reads


def test_a_bad_gradient_that_raises_turns_off_its_step_and_all_later_ones() -> None:
    ppo = PPOConfig(clip=Ratio(1e-3), num_minibatches=3, microbatch_size=8, warmup_steps=5)
    trainer, shorter = (trainer_for(ppo=ppo, on_bad_gradient="raise") for _ in range(2))
    rollout, advantages = rollout_of(trainer)
    # One pair of the second minibatch is poisoned.
    parts = list(
        minibatches(all_pairs(advantages.steps, rollout.batch_size), 3, torch.Generator().manual_seed(0))
    )
    outputs = rollout.model_outputs.clone()
    outputs[parts[1].steps[0], parts[1].rows[0]] = torch.nan
    with Refusal(
        "the gradient norm of the policy is nan; no optimizer step was taken",
        cause="A gradient that is not finite.",
        remedy="Lower the learning rate or the clip range, and check the rewards",
        error=FloatingPointError,
    ).raised():
        trainer.learner.learn(replace(rollout, model_outputs=outputs), advantages, 0)
    before = copy.deepcopy(shorter.backbone.model.state_dict())
    critic_before = copy.deepcopy(shorter.critic).state_dict()  # type: ignore[union-attr]
    # The same first step alone.
    shorter.learner.failed.zero_()
    first_step_alone(shorter, rollout, advantages)
    learned, expected = (each.backbone.model.state_dict() for each in (trainer, shorter))
    assert_same_step(learned, expected, before)
    for state in trainer.learner.policy_update.optimizer.state.values():
        assert float(state["step"]) == 1
    assert trainer.learner.policy_schedule.last_epoch == 1
    rate = trainer.learner.policy_update.optimizer.param_groups[0]["lr"]
    assert rate == pytest.approx(ppo.policy_learning_rate * 2 / 6)
    assert trainer.critic is not None
    assert all(torch.equal(trainer.critic.state_dict()[name], critic_before[name]) for name in critic_before)
    # The learner goes on as if those steps had not been asked for.
    assert trainer.learner.learn(rollout, advantages, 1)["policy_grad_norm"] > 0


def first_step_alone(trainer: LatentActorCriticTrainer, rollout: Rollout, advantages: Advantages) -> None:
    learner, generator = trainer.learner, torch.Generator().manual_seed(0)
    source = PolicySource(rollout, advantages, learner._prepare(rollout).timesteps)
    learner.policy_update.step(source, next(iter(minibatches(source.pairs, 3, generator))))


def test_weights_and_moments_stay_where_they_are(tmp_path: Any) -> None:
    """A graph that was captured before reads them at the same addresses."""
    trainer = trainer_for(ema_decay=0.5)
    trainer.train_iteration()
    parts = [*trainer.backbone.model.parameters(), *trainer.critic.parameters()]  # type: ignore[union-attr]
    before = [part.data_ptr() for part in parts]
    trainer.train_iteration()
    with trainer.averaged():
        assert [part.data_ptr() for part in parts] == before
    trainer.save(tmp_path / "run")
    trainer.load(tmp_path / "run")
    trainer.train_iteration()
    assert [part.data_ptr() for part in parts] == before


def test_metrics_are_over_all_optimizer_steps() -> None:
    def record(loss: float, norm: float, largest: float, count: float, kl: float) -> PolicyRecord:
        sums = torch.zeros(3, 6, dtype=torch.float64)
        sums[1] = torch.tensor([count, 0.0, kl * count, 0.0, count / 2, 0.0])
        scalars = torch.tensor([loss, norm, largest, 3.0, 0.0]).double()
        return PolicyRecord.read(torch.cat([scalars, sums.flatten()]))

    result = ppo_metrics([record(1.0, 2.0, 0.0, 6, 0.1), record(4.0, 4.0, 0.5, 3, 0.4)])
    assert result["policy_loss"] == pytest.approx(2.0)
    assert result["policy_grad_norm"] == pytest.approx(3.0)
    assert result["mean_kl_old"] == pytest.approx(0.2)
    assert result["last_kl_old"] == pytest.approx(0.4)
    assert (result["first_max_abs_log_ratio"], result["max_abs_log_ratio"]) == (0.0, 0.5)
    assert (result["first_mean_abs_log_ratio"], result["first_kl_old"]) == (0.5, pytest.approx(0.1))
    assert result["kl_old"].tolist()[1] == pytest.approx(0.2)
    assert result["kl_old"].isnan().tolist() == [True, False, True]
    assert float(result["clip_fraction_high"][1]) == pytest.approx(0.5)


def test_a_kl_limit_ends_the_policy_s_steps_and_not_the_critic_s() -> None:
    ppo = PPOConfig(clip=Ratio(1e-2), num_minibatches=4, microbatch_size=8, policy_learning_rate=1e-2)
    free, limited = trainer_for(ppo=ppo), trainer_for(ppo=replace(ppo, kl_limit=1e-9))
    rollout, advantages = rollout_of(free)
    assert "stopped_by_kl_limit" not in free.learner.learn(rollout, advantages, 0)
    result = limited.learner.learn(rollout, advantages, 0)
    assert result["stopped_by_kl_limit"]
    # The first step's KL is 0, the second's is not.
    assert result["last_kl_old"] > 1e-9
    steps = [float(state["step"]) for state in limited.learner.policy_update.optimizer.state.values()]
    assert set(steps) == {2.0}
    assert limited.learner.critic_update is not None
    critic_steps = limited.learner.critic_update.optimizer.state.values()
    assert {float(state["step"]) for state in critic_steps} == {4.0}
