"""What a run holds in memory, phase by phase: the allocations of its steps, followed without values."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lacfast.backbone import Backbone
from lacfast.config import ForwardProcess, TrainConfig
from lacfast.critic.critic import Critic
from lacfast.critic.states import state_bytes
from lacfast.critic.values import STATES_AT_ONCE
from lacfast.learning.batches import CriticSource, PolicySource
from lacfast.learning.critic_update import CriticUpdate
from lacfast.learning.gradient_guard import GradientGuard
from lacfast.learning.kl_anchor import KLAnchor
from lacfast.learning.optimizers import moment_bytes, parameters_of
from lacfast.learning.pairs import even_size
from lacfast.learning.policy_update import PolicyUpdate
from lacfast.learning.readers import reader_for
from lacfast.learning.step_tables import step_tables
from lacfast.learning.update import Update
from lacfast.learning.value_pretraining import host_room
from lacfast.records import Advantages, Conditioning, Rollout, TransitionTable
from lacfast.runs.capacity import MemoryPlan, Phase
from lacfast.runs.sampled import Sampled, Subject
from lacfast.runs.shards import Shards
from lacfast.runtime.graph import GraphRunner
from lacfast.runtime.host_memory import SLOTS

MOMENTS = 2
"""AdamW's of sharded weights, in the weights' dtype."""


def memory_plan(
    backbone: Backbone,
    critic: Critic | None,
    table: TransitionTable,
    conditioning: Conditioning,
    config: TrainConfig,
    *,
    beside_bytes: int = 0,
    encoder_bytes: int = 0,
    pretrains: bool = True,
    on_cpu: bool = False,
    overlaps: bool = True,
    ranks: int = 1,
) -> MemoryPlan:
    """Follow one step of each kind at its full size, and add up what lives beside it.

    Args:
        backbone: best on the meta device; without gradients, which it has none of afterwards.
        critic: of the backbone.
        table: the sampler.
        conditioning: (1, ...) of a prompt.
        config: what would be trained.
        beside_bytes: of decoder and text encoders.
        encoder_bytes: of text encoders that are on the device while they encode, and else aside.
        pretrains: with value pretraining.
        on_cpu: the run's device is the host.
        overlaps: on another device a part is decoded while the next is sampled, as CUDA does.
        ranks: processes that share a rollout, on one host.
    """
    shards = Shards.of(backbone, config.shard)
    subject = Subject(backbone, critic, conditioning, config, ranks, shards, overlaps and not on_cpu)
    if config.gradient_checkpointing:
        backbone.enable_gradient_checkpointing()
    anchor = backbone if config.ppo.anchor is None else backbone.frozen_anchor(config.ppo.anchor)
    standing = _Standing.of(subject, anchor, beside_bytes)
    learning = standing.weights + standing.training
    size = min(config.rollout_batch_size or subject.batch_size, subject.batch_size)
    keep = critic is not None and config.critic.keep_features
    part = Sampled.of(subject, table, config.sampler, size, features=keep)
    rollout = subject.batch_size * part.trajectory_bytes
    beside = rollout if size < subject.batch_size else 0
    held = (config.ppo.critic_rollouts - 1) * config.batch_size * _kept_bytes(part.rollout)
    # Weights of the iterations before, and the rollouts that are under way.
    held += config.staleness * standing.state
    held += (config.staleness + 1) * rollout * (config.rollout_ranks > 0)
    # Today's make room for those that act.
    aside = standing.state * (standing.old > 0 or (config.staleness > 0 and config.rollout_ranks == 0))
    phases = [
        *([Phase("loading", standing.loaded, 0, 1, "", 0)] if shards.modules else []),
        *([Phase("encoding prompts", learning + encoder_bytes, 0, 1, "", 0)] * (encoder_bytes > 0)),
        Phase(
            *("rollout", learning + beside + aside + shards.gathered, part.peak_bytes),
            *(size, "rollout_batch_size", held),
        ),
        *_update(subject, part.rollout, anchor, learning + rollout, held),
    ]
    kept = 0
    if critic is not None and pretrains:
        seen = part if keep else Sampled.of(subject, table, config.sampler, size, features=True)
        kept = _kept_bytes(seen.rollout)
        acting = standing.state * (standing.old > 0)
        phases += _pretraining(subject, seen, learning - standing.policy, acting)
    phases.append(_evaluation(subject, table, learning + rollout + standing.average + shards.gathered, held))
    for module in (backbone.model, *([] if critic is None else [critic])):
        module.zero_grad(set_to_none=True)
    if on_cpu:
        phases = [replace(phase, fixed=phase.fixed + phase.host, host=0) for phase in phases]
    prompt = sum(tensor.nbytes for tensor in conditioning.tensors.values())
    return MemoryPlan(standing.weights, standing.training, rollout, kept, tuple(phases), prompt)


@dataclass(frozen=True)
class _Standing:
    """Bytes that lie on the device for the whole run."""

    loaded: int
    """Weights before they are divided."""
    weights: int
    """Weights, those that are divided in parts, and a quantised copy."""
    policy: int
    """Gradients and moments of the policy."""
    critic: int
    """Gradients and moments of the critic."""
    average: int
    """The average of the policy's weights."""
    state: int
    """The policy's weights themselves."""
    old: int
    """The old policy's weights, of a loss on the forward process."""

    @property
    def training(self) -> int:
        """Bytes of all that training adds to the weights."""
        return self.policy + self.critic + self.average + self.old

    @staticmethod
    def of(subject: Subject, anchor: Backbone, beside_bytes: int) -> _Standing:
        """Arguments as `memory_plan`; the anchor may be the backbone itself."""
        backbone, critic, config, shards = subject.backbone, subject.critic, subject.config, subject.shards
        has_copy = anchor.model is not backbone.model
        loaded = _bytes(backbone.model) + (0 if critic is None else _bytes(critic)) + beside_bytes
        loaded += _bytes(anchor.model) if has_copy else 0
        weights = loaded - sum(
            shards.saved(divided.kept) for divided in shards.modules + [shards.model] * has_copy
        )
        if config.rollout_precision != "model":
            # A byte per weight of the quantised copy.
            weights += sum(parameter.numel() for parameter in backbone.model.parameters())
        learnt = [] if critic is None else [each for each in critic.parameters() if each.requires_grad]
        policy, head = (
            sum(parameter.nbytes for parameter in trained)
            + moment_bytes(trained, config.ppo.moments)
            - shards.saved(divided.gradient) * (1 + MOMENTS)
            for trained, divided in (
                (backbone.policy_parameters(), shards.model),
                (learnt, shards.critic),
            )
        )
        state = sum(tensor.nbytes for tensor in backbone.policy_state().values())
        average = state - shards.saved(shards.model.gradient) if config.ema_decay else 0
        old = state * isinstance(config.objective, ForwardProcess)
        return _Standing(loaded, weights, policy, head, average, state, old)


def _evaluation(subject: Subject, table: TransitionTable, fixed: int, host: int) -> Phase:
    """Images of held-out prompts, which lie on the host."""
    config = subject.config
    sampler = config.eval_sampler or config.sampler
    if config.eval_sampler is not None:
        table = subject.backbone.transition_table(sampler)
    count = min(config.eval_batch_size, config.eval_samples)
    shown = Sampled.of(subject, table, sampler, count, features=False)
    # Once more while they are joined.
    images = 2 * config.eval_samples * shown.kept_bytes // count
    return Phase("evaluation", fixed, shown.peak_bytes, count, "eval_batch_size", images + host)


def _update(subject: Subject, rollout: Rollout, anchor: Backbone, fixed: int, host: int) -> list[Phase]:
    """The policy's update, and the critic's where it is one of its own."""
    config, ppo, device = subject.config, subject.config.ppo, subject.device
    steps = len(rollout.trained_steps)
    guard = GradientGuard("plan", "skip", torch.zeros((), device=device))
    critic_update = None
    if subject.critic is not None:
        critic_update = CriticUpdate(subject.critic, _still(subject.critic), ppo, guard)
    policy = PolicyUpdate(
        *(subject.backbone, _still(subject.backbone.model), config, guard),
        anchor=None if ppo.kl is None else KLAnchor(anchor, GraphRunner(), config.sampler.guidance_scale),
        reader=reader_for(critic_update),
    )
    tables = step_tables(rollout.table, ppo, rollout.latents, forward=rollout.forward_steps is not None)
    heads = 0 if subject.critic is None else subject.critic.num_rewards
    advantages = Advantages(
        steps=torch.tensor(rollout.trained_steps, device=device),
        policy=rollout.latents.new_empty(steps, rollout.batch_size),
        targets=rollout.latents.new_empty(rollout.batch_size, heads),
        raw=rollout.latents.new_empty(steps, rollout.batch_size, heads),
    )
    for update in [policy] + ([] if critic_update is None else [critic_update]):
        update.prepare(tables)
    if ppo.kl is not None and ppo.repeats:
        fixed += steps * subject.batch_size * rollout.model_outputs[0, 0].nbytes
    minibatch = -(-int(ppo.timestep_fraction * steps * subject.batch_size) // ppo.num_minibatches)
    source = PolicySource(rollout, advantages, tables.timesteps)
    scatters, shards = config.shard_gradients, subject.shards
    at_work = shards.model.at_work(scatters=scatters)
    at_work += 0 if config.critic.keep_features else shards.critic.at_work(scatters=scatters)
    phases = [_microbatch("policy update", subject, policy, source, minibatch, fixed + at_work, host)]
    if critic_update is not None and config.critic.keep_features:
        states = CriticSource(rollout, advantages.targets, tables.timesteps)
        count = ppo.critic_minibatches or ppo.num_minibatches
        minibatch = -(-rollout.num_steps * subject.batch_size // count)
        if ppo.critic_rollouts > 1:
            staged = SLOTS * minibatch * state_bytes(rollout)
            fixed, host = fixed + staged, host + staged
        fixed += shards.critic.at_work(scatters=scatters)
        phases.append(_microbatch("critic update", subject, critic_update, states, minibatch, fixed, host))
    return phases


def _pretraining(subject: Subject, part: Sampled, fixed: int, aside: int) -> list[Phase]:
    """Rollouts of value pretraining, which lie on the host, and the critic's steps on them.

    `aside` are the policy's weights while an old policy acts.
    """
    config, settings, critic = subject.config, subject.config.pretrain, subject.critic
    assert critic is not None
    shards = subject.shards
    rollout, held_out = part.rollout, settings.held_out_samples
    state, valued = state_bytes(rollout), 0
    if held_out:
        # The best weights are kept.
        fixed += _bytes(critic) - shards.saved(shards.critic.kept)
        at_once = min(STATES_AT_ONCE, held_out * rollout.num_steps)
        valued = SLOTS * at_once * state + _valued(subject, rollout, at_once)
    made = host_room(config).trajectories * part.trajectory_bytes
    host = held_out * part.trajectory_bytes
    host += min(settings.kept_rollouts, settings.iterations) * config.batch_size * _kept_bytes(rollout)
    guard = GradientGuard("plan", "skip", torch.zeros((), device=subject.device))
    update = CriticUpdate(critic, _still(critic), config.ppo, guard)
    tables = step_tables(rollout.table, config.ppo, rollout.latents)
    update.prepare(tables)
    targets = rollout.latents.new_empty(rollout.batch_size, critic.num_rewards)
    minibatch = -(-min(settings.minibatch_size, config.batch_size * rollout.num_steps) // subject.ranks)
    staged = SLOTS * minibatch * state
    source = CriticSource(rollout, targets, tables.timesteps)
    name = "value pretraining"
    return [
        Phase(
            *(f"{name}, rollout", fixed + aside + shards.gathered, part.peak_bytes),
            *(rollout.batch_size, "rollout_batch_size", made),
        ),
        _microbatch(
            *(f"{name}, update", subject, update, source, minibatch),
            fixed + staged + shards.critic.at_work(scatters=config.shard_gradients),
            host + staged,
        ),
        Phase(f"{name}, held out", fixed + valued + shards.critic.gathered, 0, 1, "", host),
    ]


def _valued(subject: Subject, rollout: Rollout, count: int) -> int:
    """Bytes that the values of `count` states take beside these."""
    critic, rows = subject.critic, torch.arange(count, device=subject.device) % rollout.batch_size
    assert critic is not None
    features = {name: tensor[0, rows] for name, tensor in rollout.features.items()}
    sample, prompts = rollout.latents[0, rows], rollout.conditioning.select(rows)
    timestep = torch.zeros(len(rows), device=subject.device)
    with torch.no_grad():
        return subject.followed(lambda: critic(features, sample, timestep, prompts))[0]


def _microbatch(
    name: str, subject: Subject, update: Update[Any, Any], source: Any, minibatch: int, fixed: int, host: int
) -> Phase:
    """Forward and backward of a microbatch; where its size is found by the free memory, of one pair."""
    limit = subject.config.ppo.microbatch_size
    count = even_size(minibatch, limit) if limit else 1
    learned = parameters_of(update.optimizer)
    # A backward adds to gradients that are there, but for the first of an optimizer step, which makes them.
    is_alone = count >= minibatch and not subject.shards.modules
    for parameter in learned:
        parameter.grad = None if is_alone else torch.zeros_like(parameter)
    if is_alone:
        fixed -= sum(parameter.nbytes for parameter in learned)
    pairs = source.pairs
    rows = torch.arange(count, device=subject.device) % len(pairs)
    share = torch.ones_like(update.totals.loss)
    taken, _ = subject.followed(lambda: update.gradient(source.batch(pairs.select(rows), share)))
    return Phase(name, fixed, taken, count, "ppo.microbatch_size", host)


def _still(module: nn.Module) -> torch.optim.Optimizer:
    """An optimizer that takes no step, of what is trained."""
    return torch.optim.SGD([each for each in module.parameters() if each.requires_grad], lr=0.0)


def _kept_bytes(rollout: Rollout) -> int:
    """What a critic reads of a trajectory."""
    read = [rollout.latents, *rollout.features.values(), *rollout.conditioning.tensors.values()]
    return sum(tensor.nbytes for tensor in read) // rollout.batch_size


def _bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())
