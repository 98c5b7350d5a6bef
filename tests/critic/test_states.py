"""States that lie on the host come to the critic as those beside it do."""

from __future__ import annotations

import torch
from tiny_backbones import PROMPTS, brightness, tiny_backbone, tiny_config

from lacfast import LatentActorCriticTrainer
from lacfast.critic.states import gathered
from lacfast.critic.values import _values_of_host, rollout_values
from lacfast.learning.batches import CriticSource, GatheredSource
from lacfast.learning.pairs import Shuffled, all_states
from lacfast.policy import States
from lacfast.prompts import PromptSet
from lacfast.records import Rollout
from lacfast.runtime.host_memory import Staging


def trained() -> tuple[LatentActorCriticTrainer, Rollout]:
    made = LatentActorCriticTrainer(tiny_backbone("dit"), brightness, PROMPTS, tiny_config())
    made.train(1)
    return made, made.rollout(PromptSet.create(PROMPTS).cycle(6), 100)


def test_a_gathered_minibatch_gives_the_microbatches_of_its_rollout() -> None:
    _, rollout = trained()
    timesteps, targets = rollout.table.timesteps, torch.randn(6, 1)
    source = CriticSource(rollout, targets, timesteps)
    minibatch = Shuffled(all_states(rollout), torch.Generator().manual_seed(0)).between(0, 10)
    found = gathered(rollout, minibatch.steps, minibatch.rows, Staging(torch.device("cpu")))
    states = States(found.sample, timesteps[found.steps], found.conditioning)
    ahead = GatheredSource(states, found.features, targets[found.rows])
    share = torch.ones(())
    for own, theirs in zip(ahead.pairs.split(4), minibatch.split(4), strict=True):
        one, other = ahead.batch(own, share), source.batch(theirs, share)
        assert one.layout == other.layout
        assert torch.equal(one.states.sample, other.states.sample)
        assert torch.equal(one.states.timestep, other.states.timestep)
        assert torch.equal(one.targets, other.targets)
        for name, kept in other.features.items():
            assert torch.equal(one.features[name], kept)
        for name, given in other.states.conditioning.tensors.items():
            assert torch.equal(one.states.conditioning.tensors[name], given)


def test_a_rollout_on_the_host_has_the_values_of_one_beside_the_critic() -> None:
    made, rollout = trained()
    assert made.critic is not None
    expected = rollout_values(made.critic, rollout)
    assert expected.abs().max() > 0
    torch.testing.assert_close(_values_of_host(made.critic, rollout), expected, rtol=1e-5, atol=1e-6)
