"""Objectives on the forward process learn from clean latents noised anew, against an old policy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import Refusal
from tiny_backbones import FAMILIES, PROMPTS, SMALLEST, brightness, tiny_backbone, tiny_config
from tiny_pipelines import backbone_of, tiny_pipeline
from tolerances import assert_same_step, assert_same_sum
from torch import Tensor

from lacfast import LatentActorCriticTrainer, reference
from lacfast.config import (
    AWM,
    GRPO,
    NFT,
    AdvantageConfig,
    CriticConfig,
    GraphConfig,
    KLPenalty,
    LoRAConfig,
    PPOConfig,
    SamplerConfig,
    TrainConfig,
    ValuePretrainingConfig,
)
from lacfast.learning.learner import Learner
from lacfast.policy import States, guided_output
from lacfast.records import Rollout
from lacfast.rewards.heads import stack_rewards
from lacfast.rollout.renoising import FIRST_STEP
from lacfast.runs.costs import count
from lacfast.runtime.graph import GraphRunner
from lacfast.schedule import forward_rows
from lacfast.tasks.models import TINY

ODE = SamplerConfig(kind="ode", noise_level=0.0, num_steps=4)
# Adam makes a step of rounding errors where a gradient is 0, unless its epsilon is above them.
PPO = PPOConfig(num_minibatches=2, microbatch_size=8, adam_eps=1e-4, policy_learning_rate=1e-3)
GROUPS: dict[str, Any] = {"advantages": AdvantageConfig(estimator=GRPO()), "samples_per_prompt": 4}
CRITICLESS: dict[str, Any] = {"critic": CriticConfig(trunk="none"), **GROUPS}
GUIDED = replace(ODE, guidance_scale=2.0)
# An old policy that lags behind from the first iteration on.
LAGGING = {"old_decay": 0.9, "old_decay_rate": 0.3}
OBJECTIVES = [NFT(0.5, **LAGGING), AWM(steps=(1, 4), **LAGGING)]
by_name = pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: objective.name)


def trainer_for(objective: Any = OBJECTIVES[0], **changes: Any) -> LatentActorCriticTrainer:
    size = changes.pop("size", SMALLEST)
    backbone = tiny_backbone(changes.pop("family", "dit"), lora=changes.pop("lora", None), size=size)
    config = tiny_config(**{"sampler": ODE, "ppo": PPO, "objective": objective} | changes)
    return LatentActorCriticTrainer(backbone, brightness, PROMPTS, config)


def weights(trainer: LatentActorCriticTrainer) -> dict[str, Tensor]:
    found = {f"model.{name}": each for name, each in trainer.backbone.policy_state().items()}
    if trainer.critic is not None:
        found |= {f"critic.{name}": each for name, each in trainer.critic.state_dict().items()}
    return {name: tensor.clone() for name, tensor in found.items()}


def next_rollout(trainer: LatentActorCriticTrainer) -> Rollout:
    rollout = trainer.next_rollout()
    assert rollout is not None
    return rollout


@by_name
@pytest.mark.parametrize(
    ("family", "changes"),
    [*((family, {}) for family in FAMILIES), ("dit", GROUPS | {"lora": LoRAConfig(rank=2)})],
    ids=[*(f"critic-{family}" for family in FAMILIES), "groups, lora-dit"],
)
def test_two_iterations_train_every_backbone(family: Any, objective: Any, changes: dict[str, Any]) -> None:
    trainer = trainer_for(objective, family=family, **changes)
    before = weights(trainer)
    first, second = trainer.train_iteration(), trainer.train_iteration()
    after = weights(trainer)
    assert any(not torch.equal(before[name], after[name]) for name in before if name.startswith("model."))
    assert all(bool(tensor.isfinite().all()) for tensor in after.values() if tensor.is_floating_point())
    assert float(first["distance_old"].nanmean()) > 0
    trained = [not bool(each) for each in second["distance_old"].isnan()]
    assert trained == [step in objective.forward_steps(4) for step in range(4)]
    assert "log_ratio" not in second


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: objective.name)
def test_a_model_of_epsilon_trains_under_guidance_by_ddim(objective: Any) -> None:
    sampler = SamplerConfig(kind="ddim", noise_level=0.0, num_steps=4, guidance_scale=3.0)
    config = tiny_config(sampler=sampler, ppo=PPO, objective=objective, batch_size=4)
    backbone = backbone_of(tiny_pipeline("sd15"), lora=LoRAConfig(rank=2))
    trainer = LatentActorCriticTrainer(backbone, brightness, ["a cat", "a dog"], config)
    before = weights(trainer)
    assert trainer.train_iteration()["policy_grad_norm"] > 0
    assert any(not torch.equal(before[name], each) for name, each in weights(trainer).items())


@by_name
def test_states_are_the_clean_latents_noised_anew_and_outputs_the_old_policy_s(objective: Any) -> None:
    trainer = trainer_for(objective)
    trainer.train_iteration()
    rollout = next_rollout(trainer)
    assert rollout.forward_steps == objective.forward_steps(4)
    rows = forward_rows(rollout.table).float()
    timesteps = rollout.table.timesteps
    with trainer.learner.old_weights(), torch.no_grad():
        for step in range(4):
            steps = torch.full((8,), step)
            eps = reference.normal_noise(
                tuple(rollout.clean_latents.shape), steps + FIRST_STEP, rollout.noise
            )
            states, _ = reference.noised(rollout.clean_latents, eps, rows, steps)
            torch.testing.assert_close(rollout.latents[step], states, rtol=0, atol=1e-4)
            given = States(rollout.latents[step], timesteps[steps], rollout.conditioning)
            output, _ = guided_output(trainer.backbone, given, None, 1.0, "cond")
            torch.testing.assert_close(rollout.model_outputs[step], output, rtol=0, atol=1e-5)
    live, _ = guided_output(trainer.backbone, given, None, 1.0, "cond")
    assert not torch.allclose(live, output, atol=1e-5)


@by_name
@pytest.mark.parametrize(("passes", "fraction"), [(1, 0.5), (2, 0.75)])
def test_without_a_critic_the_old_policy_sees_the_trained_pairs_alone(
    objective: Any, passes: int, fraction: float
) -> None:
    ppo = replace(PPO, num_inner_epochs=passes, timestep_fraction=fraction)
    trainer = trainer_for(objective, ppo=ppo, sampler=GUIDED, **CRITICLESS)
    trainer.train_iteration()
    rollout = next_rollout(trainer)
    timesteps = rollout.table.timesteps
    with trainer.learner.old_weights(), torch.no_grad():
        given = [
            States(rollout.latents[step], timesteps[step].expand(8), rollout.conditioning)
            for step in range(4)
        ]
        expected = torch.stack(
            [
                guided_output(trainer.backbone, states, rollout.uncond_conditioning, 2.0, "cond")[0]
                for states in given
            ]
        )
    assert bool(rollout.model_outputs.isnan().all())
    trainer.update(rollout)
    seen = ~rollout.model_outputs.flatten(2).isnan().any(dim=2)
    trained = list(objective.forward_steps(4))
    pairs = 8 * len(trained)
    assert int(seen.sum()) == int(seen[trained].sum()) == (pairs if passes > 1 else pairs * fraction)
    torch.testing.assert_close(rollout.model_outputs[seen], expected[seen], rtol=0, atol=1e-5)


@by_name
@pytest.mark.parametrize("changes", [{}, CRITICLESS], ids=["critic", "groups"])
def test_costs_count_the_states_that_forwards_see(objective: Any, changes: dict[str, Any]) -> None:
    trainer = trainer_for(objective, ppo=replace(PPO, timestep_fraction=0.5), **changes)
    backbone, seen = trainer.backbone, [0]

    def count_rows(module: Any, inputs: Any, output: tuple[Tensor]) -> None:
        seen[0] += len(output[0])

    trainer.train_iteration()
    with backbone.model.register_forward_hook(count_rows):
        trainer.train_iteration()
    prompt = backbone.encode_prompts(PROMPTS[:1])
    costs = count(backbone, trainer.critic, trainer.table, prompt, trainer.config)
    assert seen[0] == costs.sampling_forwards + costs.update_pairs


def test_the_new_noise_is_not_that_which_made_the_images() -> None:
    trainer = trainer_for(sampler=SamplerConfig(num_steps=4))
    rollout = next_rollout(trainer)
    steps = torch.zeros(8, dtype=torch.int64)
    shape = tuple(rollout.clean_latents.shape)
    chain = reference.normal_noise(shape, steps, rollout.noise)
    start = reference.normal_noise(shape, steps - 1, rollout.noise)
    # At the first level the state is the new noise alone.
    for used in (chain, start):
        correlation = torch.corrcoef(torch.stack([rollout.latents[0].flatten(), used.flatten()]))[0, 1]
        assert abs(float(correlation)) < 0.1


@by_name
def test_who_samples_is_the_objective_s(objective: Any) -> None:
    trainer = trainer_for(objective)
    trainer.train_iteration()
    found = next_rollout(trainer).clean_latents
    plain = LatentActorCriticTrainer(
        trainer.backbone, brightness, PROMPTS, replace(trainer.config, objective=NFT(0.5), seed=0)
    )
    plain.iteration = 1
    by_policy = next_rollout(plain).clean_latents
    assert torch.equal(found, by_policy) != objective.samples_old


def test_advantages_are_of_the_noised_states_and_the_critic_learns_on_them() -> None:
    trainer = trainer_for(NFT(), ppo=replace(PPO, value_learning_rate=1e-2, num_minibatches=2))
    for _ in range(2):
        trainer.train_iteration()
    rollout, critic = next_rollout(trainer), trainer.critic
    assert critic is not None
    values = torch.stack(
        [
            critic(
                {name: kept[step] for name, kept in rollout.features.items()},
                rollout.latents[step],
                rollout.table.timesteps[step].expand(8),
                rollout.conditioning,
            ).detach()
            for step in range(4)
        ]
    )
    torch.testing.assert_close(rollout.values, values, rtol=0, atol=1e-5)
    assert float(values.std(dim=0).mean()) > 0
    trainer.normalizer.update(stack_rewards(rollout))
    advantages = trainer.advantages(rollout)
    assert advantages.steps.tolist() == [0, 1, 2, 3]
    raw = trainer.normalizer.standardize(stack_rewards(rollout)).float() - rollout.values
    torch.testing.assert_close(advantages.raw, raw, rtol=0, atol=1e-5)


@by_name
def test_parts_of_a_rollout_and_microbatches_change_sums_alone(objective: Any) -> None:
    whole = trainer_for(objective)
    split = trainer_for(objective, rollout_batch_size=3, ppo=replace(PPO, microbatch_size=3))
    before = weights(whole)
    for _ in range(2):
        expected, found = whole.train_iteration(), split.train_iteration()
        assert_same_sum(found["policy_loss"], expected["policy_loss"], unit=10)
    assert_same_step(weights(split), weights(whole), before)


@by_name
def test_a_run_goes_on_bit_for_bit_with_its_old_policy(objective: Any, tmp_path: Path) -> None:
    trainer, resumed = trainer_for(objective), trainer_for(objective)
    for _ in range(2):
        trainer.train_iteration()
    trainer.save(tmp_path / "run")
    resumed.load(tmp_path / "run")
    old, again = trainer.learner.old, resumed.learner.old
    assert old is not None
    assert again is not None
    assert again.optimizer_steps == old.optimizer_steps == 4
    assert all(torch.equal(old.weights[name], again.weights[name]) for name in old.weights)
    live = trainer.backbone.policy_state()
    assert any(not torch.equal(old.weights[name], live[name]) for name in live)
    expected, found = trainer.train_iteration(), resumed.train_iteration()
    assert found["policy_loss"] == expected["policy_loss"]
    after, same = weights(trainer), weights(resumed)
    assert all(torch.equal(after[name], same[name]) for name in after)


def test_the_old_policy_follows_by_its_schedule() -> None:
    objective = NFT(old_decay=0.5, old_decay_rate=0.2, old_hold=3)
    assert [objective.decay(steps) for steps in (0, 3, 4, 5, 100)] == pytest.approx([0, 0, 0.2, 0.4, 0.5])
    trainer = trainer_for(objective)
    old = trainer.learner.old
    assert old is not None
    name = next(iter(old.weights))
    trainer.train_iteration()
    live = trainer.backbone.policy_state()[name]
    assert torch.equal(old.weights[name], live)
    kept = old.weights[name].clone()
    trainer.train_iteration()
    expected = 0.2 * kept + 0.8 * trainer.backbone.policy_state()[name]
    torch.testing.assert_close(old.weights[name], expected)


@by_name
def test_replays_learn_what_eager_steps_learn(objective: Any) -> None:
    graphs = GraphRunner(GraphConfig(mode="fake", strict=True, warmup_steps=1))
    graphed, eager = trainer_for(objective), trainer_for(objective)
    graphed.learner = Learner(graphed.backbone, graphed.config, graphs)
    before = weights(eager)
    for _ in range(2):
        expected, found = eager.train_iteration(), graphed.train_iteration()
        assert_same_sum(found["policy_loss"], expected["policy_loss"], unit=10)
    assert_same_step(weights(graphed), weights(eager), before)
    assert graphs.statistics.fallbacks == 0
    assert graphs.statistics.replays > 0


def test_a_rollout_on_graphs_is_noised_anew_like_an_eager_one() -> None:
    fake = GraphConfig(mode="fake", strict=True, warmup_steps=1)
    graphed, eager = trainer_for(graph=fake), trainer_for()
    found, expected = next_rollout(graphed), next_rollout(eager)
    torch.testing.assert_close(found.latents, expected.latents, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.model_outputs, expected.model_outputs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("objective", "least"),
    # Beside a small step a distance of weight 1 from the policy of the same iteration leaves little.
    [(NFT(), 0.001), (AWM(old_weight=0.0), 0.01)],
    ids=["nft", "awm"],
)
def test_an_easy_reward_rises(objective: Any, least: float) -> None:
    ppo = replace(PPO, adam_eps=1e-15, advantage_clip=5.0, microbatch_size=64)
    trainer = trainer_for(objective, size=TINY, batch_size=32, ppo=ppo, **GROUPS)
    before = trainer.evaluate(samples=32).means()["brightness"]
    for _ in range(3):
        trainer.train_iteration()
    assert trainer.evaluate(samples=32).means()["brightness"] > before + least


def test_the_distance_from_the_anchor_holds_the_policy() -> None:
    kl = KLPenalty(1e3, "velocity")
    free, held = trainer_for(), trainer_for(ppo=replace(PPO, kl=kl))
    for _ in range(2):
        loose, tight = free.train_iteration(), held.train_iteration()
    assert float(loose["kl_ref"].nanmean()) == 0
    assert float(tight["kl_ref"].nanmean()) > 0
    moved = [float((each - start).norm()) for trainer in (free, held) for each, start in [_first(trainer)]]
    assert moved[1] < moved[0]


def _first(trainer: LatentActorCriticTrainer) -> tuple[Tensor, Tensor]:
    """The outputs of the policy and of the model as it was, on the same states."""
    rollout = next_rollout(trainer_for())
    given = States(rollout.latents[1], rollout.table.timesteps[1].expand(8), rollout.conditioning)
    with torch.no_grad():
        return tuple(  # type: ignore[return-value]
            guided_output(backbone, given, None, 1.0, "cond")[0]
            for backbone in (trainer.backbone, tiny_backbone("dit"))
        )


def test_values_are_pretrained_on_noised_states_of_an_ode() -> None:
    pretrain = ValuePretrainingConfig(iterations=2, held_out_samples=8)
    trainer = trainer_for(pretrain=pretrain)
    result = trainer.pretrain_critic()
    assert len(result.history) == 2
    assert trainer.train_iteration()["images"] > 16


def test_the_critic_may_learn_on_the_policy_s_own_forward() -> None:
    critic = CriticConfig(hidden_dim=16, head_dim=8, num_heads=2, keep_features=False)
    trainer = trainer_for(critic=critic)
    metrics = trainer.train_iteration()
    assert metrics["value_loss"] > 0
    assert not next_rollout(trainer).features


def test_a_chain_is_not_learned_from_on_the_forward_process() -> None:
    trainer = trainer_for()
    chain = trainer.sampler.sample(
        *(trainer.table, PROMPTS, [{}] * len(PROMPTS), next_rollout(trainer).noise)
    ).with_rewards({"brightness": torch.rand(8)})
    with Refusal(
        "the rollout is a chain, which objective=nft",
        cause="A rollout of a sampler, or of a trainer with another objective, was given to `update`.",
        remedy="take what trainer.rollout, trainer.collect or trainer.next_rollout of the same",
    ).raised():
        trainer.update(chain)


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        (
            {"objective": NFT(steps=(0, 11))},
            Refusal(
                "trains steps that a sampler of 10 does not have",
                cause="objective.steps reaches beyond sampler.num_steps.",
                remedy="use steps within (0, 10)",
            ),
        ),
        (
            {"ppo": PPOConfig(advantage_clip=float("inf"))},
            Refusal(
                "weighs by advantage / advantage_clip, and ppo.advantage_clip is inf",
                cause="A loss on the forward process without a bound of the advantages.",
                remedy="DiffusionNFT and AWM have 5",
            ),
        ),
        (
            {"ppo": PPOConfig(kl=KLPenalty(0.1))},
            Refusal(
                "measures transitions, and objective=nft has none",
                cause="A KL between transitions beside a loss on the forward process.",
                remedy="use kind='velocity'",
            ),
        ),
        (
            {"shard": 2},
            Refusal(
                "shard=2 is for rollouts by other weights or ranks than those that learn",
                cause="A loss on the forward process with rollouts of other weights or ranks, or shards.",
                remedy="use shard=1 or objective=PPO()",
            ),
        ),
        (
            {"staleness": 1},
            Refusal(
                "staleness=1 is for rollouts by other weights",
                cause="A loss on the forward process with rollouts that are updates behind.",
                remedy="use staleness=0 or objective=PPO()",
            ),
        ),
        (
            {"pretrain": ValuePretrainingConfig(completions=2)},
            Refusal(
                "pretrain.completions=2 go on along a chain",
                cause="Bounds of the explained variance beside a loss on the forward process.",
                remedy="use completions=0",
            ),
        ),
        (
            {"ppo": PPOConfig(gae_lambda=0.9)},
            Refusal(
                "ppo.gae_lambda=0.9 would be ignored: objective=nft has no ratio and no chain",
                cause="An option of PPO's ratio, or of credit along a chain, that nothing would read.",
                remedy="or use objective=PPO()",
            ),
        ),
    ],
    ids=["steps", "clip", "kl", "shard", "staleness", "completions", "lambda"],
)
def test_what_the_forward_process_does_not_have_is_refused(changes: dict[str, Any], refusal: Refusal) -> None:
    with refusal.raised():
        TrainConfig(**{"objective": NFT(), **changes})


def test_steps_are_a_range() -> None:
    with Refusal(
        "steps=(3, 3) must be (start, stop)",
        cause="An objective whose trained steps are none.",
        remedy="with 0 <= start < stop",
    ).raised():
        NFT(steps=(3, 3))


def test_a_checkpoint_of_another_objective_is_refused(tmp_path: Path) -> None:
    trainer_for().save(tmp_path / "run")
    with pytest.raises(ValueError, match=r"objective\.choice was 'nft' and is 'awm' now"):
        trainer_for(OBJECTIVES[1]).load(tmp_path / "run")
