"""The values of a rollout, how much they explain, and the units that they are in."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lacfast import reference
from lacfast.critic.critic import Critic
from lacfast.critic.states import gathered
from lacfast.records import Rollout
from lacfast.rewards.heads import stack_rewards
from lacfast.rewards.normalizer import RewardNormalizer
from lacfast.runtime.host_memory import Staging
from lacfast.transfer import to_device, to_like

STATES_AT_ONCE = 32
"""States that rollout_values takes together: larger products than a step's, less memory than an update's."""


def rollout_values(critic: Critic, rollout: Rollout) -> Tensor:
    """Values (T, B, M) float32 of all states of a rollout, on the features kept from it, where it lies.

    Whole steps are valued together as long as they have at most STATES_AT_ONCE states. A rollout on the host
    is brought to the critic's device by that many states.
    """
    if rollout.latents.device != critic.reward_mean.device:
        return _values_of_host(critic, rollout)
    return _values(critic, rollout)


@torch.no_grad()
def _values(critic: Critic, rollout: Rollout) -> Tensor:
    timesteps, batch = to_device(rollout.table.timesteps, rollout.latents.device), rollout.batch_size
    steps_at_once = max(STATES_AT_ONCE // batch, 1)
    values = []
    for first in range(0, rollout.table.num_steps, steps_at_once):
        part = timesteps[first : first + steps_at_once]
        steps = slice(first, first + len(part))
        rows = torch.arange(batch, device=part.device).repeat(len(part))
        values.append(
            critic(
                {name: tensor[steps].flatten(0, 1) for name, tensor in rollout.features.items()},
                rollout.latents[steps].flatten(0, 1),
                part,
                rollout.conditioning.select(rows),
            ).float()
        )
    stacked = torch.cat(values)
    return stacked.view(-1, batch, stacked.shape[-1])


@torch.no_grad()
def _values_of_host(critic: Critic, rollout: Rollout) -> Tensor:
    batch, device = rollout.batch_size, critic.reward_mean.device
    staging, timesteps = Staging(device), to_device(rollout.table.timesteps, device)
    values = []
    for states in torch.split(torch.arange(rollout.num_steps * batch), STATES_AT_ONCE):
        found = gathered(rollout, states // batch, states % batch, staging)
        timestep = timesteps[found.steps]
        values.append(critic(found.features, found.sample, timestep, found.conditioning).float())
    stacked = torch.cat(values)
    return stacked.view(-1, batch, stacked.shape[-1]).to(rollout.latents.device)


def rollout_variance(rollout: Rollout, normalizer: RewardNormalizer) -> Tensor:
    """Explained variance (T, M) of a rollout by the values that were sampled with it."""
    values = rollout.values
    returns = normalizer.standardized(rollout).expand_as(values)
    return reference.explained_variance(values.transpose(0, 1), returns.transpose(0, 1))


def value_targets(rewards: Tensor, normalizer: RewardNormalizer, target_clip: float) -> Tensor:
    """(B, M) standardised Monte-Carlo returns of rewards (B, M), the same for every step of a trajectory."""
    return normalizer.standardize(rewards).clamp(-target_clip, target_clip)


def update_statistics(critic: Critic, normalizer: RewardNormalizer, rollout: Rollout) -> Rollout:
    """Take the rollout's rewards into the running statistics; raw predictions stay what they are.

    The critic and the rollout's values are rescaled alike; a critic that another run has taught brings its
    units along. Returns the rollout with values in the new units.

    Raises:
        ValueError: for rewards that the critic's loss cannot express; nothing is changed then.
    """
    rewards = stack_rewards(rollout)
    critic.value_loss.require_representable(normalizer.combined(rewards))
    old = _units(critic, normalizer)
    normalizer.update(rewards)
    new = normalizer.mean, normalizer.std
    critic.reward_mean.copy_(to_like(normalizer.mean, critic.reward_mean))
    critic.reward_std.copy_(to_like(normalizer.std, critic.reward_std))
    # Before the first reward a squared error predicts nothing in raw units: V = 0 means "the mean".
    old_mean, old_std = (
        to_like(statistic, rollout.values) for statistic in old or critic.value_loss.units(*new)
    )
    new_mean, new_std = (to_like(statistic, rollout.values) for statistic in new)
    # A rollout on the host has its values there.
    device, units = critic.reward_mean.device, (old_mean, old_std, new_mean, new_std)
    critic.rescale(*(to_device(each, device) for each in units))
    return replace(rollout, values=(rollout.values * old_std + old_mean - new_mean) / new_std)


def _units(critic: Critic, normalizer: RewardNormalizer) -> tuple[Tensor, Tensor] | None:
    """Mean and std (M,) that the critic predicts in; None for a new one."""
    if normalizer.count > 0:
        return normalizer.mean, normalizer.std
    return (critic.reward_mean.clone(), critic.reward_std.clone()) if critic.has_units else None
