"""An update on graphs is the eager one, whatever moves between its steps."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import Refusal
from tiny_backbones import PROMPTS, brightness, tiny_backbone, tiny_config
from tolerances import assert_same_step, assert_same_sum
from torch import Tensor, nn

from lacfast import LatentActorCriticTrainer
from lacfast.config import CriticConfig, GraphConfig, KLPenalty, PPOConfig, Ratio, SamplerConfig
from lacfast.learning.batches import PolicySource
from lacfast.learning.learner import Learner
from lacfast.learning.runner import EAGER, GradientMemory, GraphedUpdate
from lacfast.runtime.graph import GraphRunner

# Minibatches of 12, 12 and 8 states, and of 8 pairs each: tails are padded. The rate changes at every step.
PPO = PPOConfig(
    clip=Ratio(1e-3), num_minibatches=3, microbatch_size=5, warmup_steps=8, adam_eps=1e-4, kl=KLPenalty(0.1)
)
GUIDED = SamplerConfig(num_steps=4, guidance_scale=2.5)


def trainer_for(graphs: GraphRunner, ppo: PPOConfig = PPO, **changes: Any) -> LatentActorCriticTrainer:
    """A trainer whose update, and nothing else, runs on `graphs`."""
    config = tiny_config(ppo=ppo, sampler=GUIDED, **changes)
    trainer = LatentActorCriticTrainer(tiny_backbone("dit"), brightness, PROMPTS, config)
    trainer.learner = Learner(trainer.backbone, config, graphs)
    return trainer


def fake_graphs() -> GraphRunner:
    return GraphRunner(GraphConfig(mode="fake", strict=True, warmup_steps=1))


def weights(trainer: LatentActorCriticTrainer) -> dict[str, Tensor]:
    assert trainer.critic is not None
    modules = {"model": trainer.backbone.model, "critic": trainer.critic}
    return {
        f"{owner}.{name}": tensor.clone()
        for owner, module in modules.items()
        for name, tensor in module.state_dict().items()
    }


def assert_same_metrics(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert_same_sum(actual["policy_loss"], expected["policy_loss"], unit=1)
    assert_same_sum(
        actual["policy_grad_norm"], expected["policy_grad_norm"], unit=expected["policy_grad_norm"]
    )
    # Squares cancel nothing, but the critic's AdamW carries rounding from one iteration to the next.
    for name in ("value_loss", "critic_grad_norm"):
        assert actual[name] == pytest.approx(expected[name], rel=1e-4), name
    # The mean of log_ratio^2 / 2, whose log-ratios are what rounds.
    assert_same_sum((2 * actual["mean_kl_old"]) ** 0.5, (2 * expected["mean_kl_old"]) ** 0.5, unit=1)


@pytest.mark.isa
@pytest.mark.parametrize("trunk", ["branch", "joint"])
def test_replays_learn_what_eager_steps_learn(trunk: str, tmp_path: Path) -> None:
    graphs, critic = fake_graphs(), CriticConfig(trunk=trunk, hidden_dim=16, head_dim=8)
    graphed, eager = trainer_for(graphs, critic=critic), trainer_for(GraphRunner(), critic=critic)
    before = weights(eager)
    for _ in range(2):
        ours, theirs = graphed.train_iteration(), eager.train_iteration()
        assert_same_metrics(ours, theirs)
    assert_same_step(weights(graphed), weights(eager), before)
    # Gradient and optimizer of actor and critic, whatever the rate, the rollout and the size of a tail; and
    # the gradients of the first step on a rollout, whose first microbatch alone measures the mismatch.
    assert graphs.statistics.captures == 6
    assert graphs.statistics.fallbacks == 0
    assert graphs.statistics.replays > 12
    # A checkpoint brings moments of its own, so what was captured is let go.
    graphed.save(tmp_path / "run")
    graphed.load(tmp_path / "run")
    graphed.train_iteration()
    eager.train_iteration()
    assert_same_step(weights(graphed), weights(eager), before)
    # The first step of a single rollout is the warm-up of its gradients.
    assert graphs.statistics.captures == 6 + 4


def test_a_critic_s_replay_needs_no_graph_of_its_own() -> None:
    graphs = fake_graphs()
    ppo = replace(PPO, critic_rollouts=2, critic_minibatches=6)
    graphed, eager = trainer_for(graphs, ppo), trainer_for(GraphRunner(), ppo)
    before = weights(eager)
    for _ in range(2):
        graphed.train_iteration()
        eager.train_iteration()
    captures = graphs.statistics.captures
    for _ in range(2):
        graphed.train_iteration()
        eager.train_iteration()
    assert_same_step(weights(graphed), weights(eager), before)
    assert graphs.statistics.captures == captures == 6


def test_a_bad_gradient_turns_off_captured_steps_too() -> None:
    graphed = trainer_for(fake_graphs(), on_bad_gradient="raise")
    graphed.train_iteration()
    rollout = graphed.collect(graphed.prompts, 0)
    assert rollout is not None
    before = weights(graphed)
    rollout.model_outputs.fill_(torch.inf)
    advantages = graphed.advantages(rollout)
    with pytest.raises(FloatingPointError, match="no optimizer step was taken"):
        graphed.learner.learn(rollout, advantages, graphed.iteration)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(graphed).items())


def test_a_parameter_that_was_replaced_is_noticed_before_it_is_missed() -> None:
    graphed = trainer_for(fake_graphs())
    graphed.train_iteration()
    model = graphed.backbone.model
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    with Refusal(
        "is not where the graph of the policy's",
        cause="A weight was replaced, not filled, after a graph had captured its address.",
        remedy="Copy new values into the tensor that exists",
    ).raised():
        graphed.train_iteration()


@pytest.mark.isa
@pytest.mark.parametrize("taken", ["all", "the policy's"])
def test_gradients_that_were_taken_away_are_given_back(taken: str) -> None:
    # The policy's graph writes gradients of the critic, too.
    critic = CriticConfig(keep_features=False, hidden_dim=16, head_dim=8)
    graphs, ppo = fake_graphs(), replace(PPO, kl=None)
    graphed, eager = trainer_for(graphs, ppo, critic=critic), trainer_for(GraphRunner(), ppo, critic=critic)
    for _ in range(2):
        ours, theirs = graphed.train_iteration(), eager.train_iteration()
        assert_same_metrics(ours, theirs)
        for update in graphed.learner.updates[: 1 if taken == "the policy's" else None]:
            update.optimizer.zero_grad(set_to_none=True)
    assert graphs.statistics.fallbacks == 0


def test_gradients_and_moments_that_were_replaced_are_named() -> None:
    graphed = trainer_for(fake_graphs())
    graphed.train_iteration()
    gradient = graphed.backbone.policy_parameters()[0].grad
    assert gradient is not None
    kept, gradient.data = gradient.data, gradient.data.clone()
    with pytest.raises(
        ValueError, match=r"the gradient of model\.\S+ is not where the graph of the policy's"
    ):
        graphed.train_iteration()
    gradient.data = kept
    optimizer = graphed.learner.policy_update.optimizer
    # torch's own makes new moments; Learner.load_state_dict lets the graphs go first.
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with pytest.raises(ValueError, match=r"of the optimizer's parameter 0 is not where the graph of"):
        graphed.train_iteration()


def walked_modules(monkeypatch: pytest.MonkeyPatch, work: Callable[[], object]) -> int:
    """How many modules a piece of work walks over, whatever for."""
    visits: list[str] = []

    def counting(name: str) -> Callable[..., Any]:
        walk = getattr(nn.Module, name)
        return lambda *args, **kwargs: visits.append(name) or walk(*args, **kwargs)

    with monkeypatch.context() as patched:
        for name in ("named_modules", "named_children", "_named_members"):
            patched.setattr(nn.Module, name, counting(name))
        work()
    return len(visits)


def test_a_microbatch_walks_over_no_module(monkeypatch: pytest.MonkeyPatch) -> None:
    graphed = trainer_for(fake_graphs(), replace(PPO, kl=None, num_minibatches=1, microbatch_size=2))
    graphed.train_iteration()
    rollout = graphed.collect(graphed.prompts, graphed.iteration)
    assert rollout is not None
    update = graphed.learner.policy_update
    source = PolicySource(rollout, graphed.advantages(rollout), update.tables.timesteps)

    def steps(pairs: int) -> None:
        update.step(source, source.pairs.select(slice(pairs)))

    steps(8)
    few, many = (walked_modules(monkeypatch, lambda count=count: steps(count)) for count in (4, 12))
    assert few == many > 0


def test_without_graphs_nothing_is_padded() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        off = trainer_for(GraphRunner())
        off.train_iteration()
    assert all(parameter.grad is not None for parameter in off.backbone.policy_parameters()[:1])
    assert all(update.runner is EAGER for update in off.learner.updates)


def test_a_runner_that_was_released_takes_larger_microbatches_again() -> None:
    runner = GraphedUpdate("policy", fake_graphs(), dict, GradientMemory(dict), list, lambda: None)
    assert runner.size(4, 8) == 4
    # A tail is padded to the size that was captured.
    assert runner.size(16, 8) == 4
    runner.release()
    assert runner.size(16, 8) == 8
