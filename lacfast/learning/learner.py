"""The learner: what moves the weights of actor and critic, and the state that this takes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lacfast.backbone import Backbone
from lacfast.config import TrainConfig
from lacfast.critic.critic import Critic
from lacfast.learning.adaptive_kl import AdaptiveKL
from lacfast.learning.averaging import WeightAverage
from lacfast.learning.kl_anchor import ReferenceStep
from lacfast.learning.optimizers import (
    critic_optimizer,
    missing_moments,
    policy_optimizer,
    policy_schedule,
    take_back,
)
from lacfast.learning.pairs import Pairs, all_pairs, minibatches, policy_batch
from lacfast.learning.replay import Experience, ValueReplay
from lacfast.learning.runner import EAGER, GraphedUpdate, UpdateRunner
from lacfast.learning.step_tables import StepTables, step_tables
from lacfast.learning.totals import CriticTotals, PolicyTotals, UpdateRecords
from lacfast.learning.update import (
    MEASURED,
    critic_step,
    policy_gradient,
    policy_step,
    probe_critic,
    recorded_critic_step,
)
from lacfast.records import Advantages, Rollout, TransitionTable
from lacfast.runtime.graph import GraphRunner
from lacfast.runtime.memory import MicrobatchSize


@dataclass(frozen=True)
class _Workspace:
    """What lives on the device as long as transition tables have the same shape."""

    table: TransitionTable
    tables: StepTables
    policy: PolicyTotals
    critic: CriticTotals
    runner: UpdateRunner


class Learner:
    """PPO on the actor and regression on the critic, over one rollout at a time."""

    def __init__(self, backbone: Backbone, config: TrainConfig, graphs: GraphRunner | None = None) -> None:
        """
        Args:
            backbone: its model and its critic are trained in place.
            config: of the run.
            graphs: captures the steps. None: they run eagerly.
        """
        self.backbone = backbone
        self.config = config
        self.reference = backbone.frozen_reference() if config.ppo.kl_weight > 0 else None
        self.reference_step = None
        if self.reference is not None:
            runner = GraphRunner() if graphs is None else graphs
            self.reference_step = ReferenceStep(self.reference, runner, config.sampler.guidance_scale)
        parameters = backbone.policy_parameters()
        self.policy_optimizer = policy_optimizer(parameters, config.ppo)
        self.progress = 0.0
        """Share of the run that is behind, for PPOConfig.final_learning_rate."""
        self.policy_schedule = policy_schedule(self.policy_optimizer, config.ppo, lambda: self.progress)
        self.critic_optimizer = critic_optimizer(backbone.critic, config.ppo)
        self.replay = ValueReplay(config.ppo.critic_rollouts)
        self.average = WeightAverage(backbone.policy_state(), config.ema_decay) if config.ema_decay else None
        self.policy_microbatch = MicrobatchSize(config.ppo.microbatch_size)
        self.critic_microbatch = MicrobatchSize(config.ppo.microbatch_size)
        target = config.ppo.kl_target
        self.adaptive_kl = None if target is None else AdaptiveKL(config.ppo.kl_weight, target)
        self.failed = torch.zeros((), device=parameters[0].device)
        self.version = 0
        """Changes with the weights of the policy."""
        self._graphs = graphs if graphs is not None and graphs.captures else None
        self._workspace: _Workspace | None = None
        if config.gradient_checkpointing:
            backbone.enable_gradient_checkpointing()

    @property
    def critic(self) -> Critic | None:
        return self.backbone.critic

    def reset_critic_optimizer(self) -> None:
        """Forget the critic's moments and rates: joint training starts as if none had been."""
        self._release()
        self.critic_optimizer = critic_optimizer(self.critic, self.config.ppo)

    def learn(self, rollout: Rollout, advantages: Advantages, iteration: int) -> dict[str, Any]:
        """All passes over a rollout, in an order that depends on seed and iteration; returns their metrics.

        The host reads from the device once, at the end; with a kl_limit also after each step of the policy.

        Raises:
            FloatingPointError: for a gradient that is not finite. Neither the optimizer step that it was for
                nor a later one has changed anything.
        """
        records = UpdateRecords()
        workspace = self._workspace_for(rollout)
        self._find_microbatches(rollout, advantages, workspace.tables)
        references = self._reference_outputs(rollout, advantages, workspace.tables)
        experience = None if self.critic is None else Experience.of(rollout, advantages.targets, self.critic)
        self.failed.zero_()
        is_stopped = False
        try:
            for epoch in range(self.config.ppo.num_inner_epochs):
                seed = (self.config.seed * 1_000_003 + iteration) * 97 + epoch
                generator = torch.Generator().manual_seed(seed)
                if not is_stopped:
                    is_stopped = self._update_policy(
                        rollout, advantages, workspace, references, generator, records
                    )
                if experience is not None:
                    self._update_critic(experience, rollout.values, workspace, generator, records)
            records.read()
        except FloatingPointError:
            take_back(self.policy_schedule, records.policy_steps - len(records.policy))
            raise
        if experience is not None:
            self.replay.add(experience)
        if self.average is not None:
            self.average.update()
        metrics = records.metrics() | ({"stopped_by_kl_limit": True} if is_stopped else {})
        if self.adaptive_kl is not None:
            metrics["kl_weight"] = self.adaptive_kl.weight
            self.adaptive_kl.update(float(metrics["kl_ref"].nanmean()))
        return metrics

    def _update_policy(
        self,
        rollout: Rollout,
        advantages: Advantages,
        workspace: _Workspace,
        references: Tensor | None,
        generator: torch.Generator,
        records: UpdateRecords,
    ) -> bool:
        """One pass of the policy; returns whether the KL limit ended it."""
        ppo = self.config.ppo
        if self.adaptive_kl is not None:
            ppo = replace(ppo, kl_weight=self.adaptive_kl.weight)
        pairs = all_pairs(advantages.steps, rollout.batch_size)
        for minibatch in minibatches(pairs, ppo.num_minibatches, generator, fraction=ppo.timestep_fraction):
            if records.policy and records.policy[-1].mean_kl_old > ppo.kl_limit:
                return True

            is_first = self._is_first(rollout)

            def step(size: int, minibatch: Pairs = minibatch, is_first: bool = is_first) -> Tensor:
                self._clear_recorded(workspace)
                return policy_step(
                    self.backbone,
                    self.reference,
                    self.policy_optimizer,
                    rollout,
                    advantages,
                    minibatch,
                    ppo,
                    self.config.sampler.guidance_scale,
                    tables=workspace.tables,
                    totals=workspace.policy,
                    failed=self.failed,
                    microbatch_size=size,
                    reference_outputs=references,
                    is_first=is_first,
                    critic_totals=workspace.critic if self._records_features else None,
                    # A graph would freeze a weight that adapts.
                    runner=workspace.runner if self.adaptive_kl is None else EAGER,
                )

            numbers = self.policy_microbatch.run(step, len(minibatch))
            self.version += 1
            self.policy_schedule.step()
            records.add("policy", numbers, len(minibatch), measured=MEASURED if is_first else math.inf)
            self._step_recorded(workspace, records, len(minibatch))
            if ppo.kl_limit < math.inf:
                records.read()
        return False

    def _update_critic(
        self,
        today: Experience,
        old_values: Tensor,
        workspace: _Workspace,
        generator: torch.Generator,
        records: UpdateRecords,
    ) -> None:
        """One pass of the critic: as many states as a rollout has, of the last rollouts."""
        ppo, critic, optimizer = self.config.ppo, self.critic, self.critic_optimizer
        if critic is None or optimizer is None or self._records_features:
            return
        count = ppo.critic_minibatches or ppo.num_minibatches
        # The same arguments for every rollout, so that a graph fits all.
        bounds = old_values if ppo.critic_rollouts == 1 else None
        for experience, minibatch in self.replay.minibatches(today, count, generator):

            def step(size: int, experience: Experience = experience, minibatch: Pairs = minibatch) -> Tensor:
                return critic_step(
                    critic,
                    optimizer,
                    experience,
                    experience.targets_for(critic),
                    minibatch,
                    ppo,
                    tables=workspace.tables,
                    totals=workspace.critic,
                    failed=self.failed,
                    microbatch_size=size,
                    old_values=bounds,
                    runner=workspace.runner,
                )

            numbers = self.critic_microbatch.run(step, len(minibatch))
            records.add("critic", numbers, len(minibatch))

    def _is_first(self, rollout: Rollout) -> bool:
        """Whether the unconditional half of `rollout` is known: the weights are those that made it."""
        ppo = self.config.ppo
        is_detached = rollout.uncond_conditioning is not None and ppo.cfg_grad == "cond"
        return is_detached and ppo.reuse_uncond and rollout.policy_version == self.version

    @property
    def _records_features(self) -> bool:
        """Whether the critic learns on features of the actor's training forward."""
        return self.critic is not None and not self.config.critic.keep_features

    def _clear_recorded(self, workspace: _Workspace) -> None:
        if self._records_features and self.critic_optimizer is not None:
            self.critic_optimizer.zero_grad(set_to_none=not workspace.runner.keeps_gradients)
            workspace.critic.zero_()

    def _step_recorded(self, workspace: _Workspace, records: UpdateRecords, pairs: int) -> None:
        if self._records_features and self.critic_optimizer is not None:
            numbers = recorded_critic_step(
                *(self.critic_optimizer, self.config.ppo, workspace.critic, self.failed, workspace.runner)
            )
            records.add("critic", numbers, pairs)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the context the model has its averaged weights."""
        if self.average is None:
            yield
            return
        # What is sampled within is not of the weights that learn.
        self.version += 1
        try:
            with self.average.applied():
                yield
        finally:
            self.version += 1

    def _workspace_for(self, rollout: Rollout) -> _Workspace:
        """Made once; another transition table, as of a window that moves, is copied to where the last was.

        Not for the same table again: a copy of host numbers waits for the device.
        """
        workspace = self._workspace
        is_same = workspace is not None and workspace.table is rollout.table
        tables = None if is_same else step_tables(rollout.table, self.config.ppo, rollout.latents)
        if workspace is not None and (tables is None or workspace.tables.takes(tables)):
            if tables is not None:
                workspace.tables.copy_(tables)
                self._workspace = workspace = replace(workspace, table=rollout.table)
            if isinstance(workspace.runner, GraphedUpdate):
                workspace.runner.check_addresses()
            return workspace
        self._release()
        assert tables is not None
        policy, critic = PolicyTotals.create(tables), CriticTotals.create(tables)
        runner = EAGER
        if self._graphs is not None:
            sums = [*policy.tensors, *critic.tensors, self.failed]
            runner = GraphedUpdate(self._graphs, self._parameters, sums, self.backbone.forward_signature)
        self._workspace = _Workspace(rollout.table, tables, policy, critic, runner)
        return self._workspace

    def _release(self) -> None:
        """Free captured graphs: what they read is about to be replaced."""
        if self._workspace is not None and isinstance(self._workspace.runner, GraphedUpdate):
            self._workspace.runner.release()

    def _parameters(self) -> dict[str, Tensor]:
        """All weights and buffers that an update reads, by a name for messages."""
        modules = {"model": self.backbone.model}
        if self.critic is not None:
            modules["critic"] = self.critic
        if self.reference is not None:
            modules["reference"] = self.reference.model
        return {
            f"{owner}.{name}": tensor
            for owner, module in modules.items()
            for tensors in (module.named_parameters(), module.named_buffers())
            for name, tensor in tensors
        }

    def _find_microbatches(self, rollout: Rollout, advantages: Advantages, tables: StepTables) -> None:
        """At the first rollout, when it, the weights and nothing else of size is in memory."""
        device = rollout.latents.device
        pairs = all_pairs(advantages.steps, rollout.batch_size)
        reserved = missing_moments(self.policy_optimizer)
        if self.critic_optimizer is not None:
            reserved += missing_moments(self.critic_optimizer)
            reserved += (self.config.ppo.critic_rollouts - 1) * _state_bytes(rollout)

        def probe_policy(count: int) -> None:
            batch = policy_batch(
                rollout, advantages, tables.timesteps, pairs.select(slice(count)), share=tables.one
            )
            guidance_scale = self.config.sampler.guidance_scale
            policy_gradient(
                *(self.backbone, self.reference, batch, tables, self.config.ppo, guidance_scale),
                PolicyTotals.create(tables),
                critic_totals=CriticTotals.create(tables) if self._records_features else None,
            )
            for optimizer in (self.policy_optimizer, self.critic_optimizer):
                if optimizer is not None:
                    optimizer.zero_grad(set_to_none=True)

        self.policy_microbatch.find(probe_policy, device, reserved=reserved)
        critic = self.critic
        if critic is not None and not self._records_features:
            self.critic_microbatch.find(
                lambda count: probe_critic(critic, rollout, advantages.targets, tables, count),
                device,
                reserved=reserved,
            )

    def _reference_outputs(
        self, rollout: Rollout, advantages: Advantages, tables: StepTables
    ) -> Tensor | None:
        """Kept where that saves forwards: several passes would compute each pair's more than once."""
        ppo = self.config.ppo
        if self.reference_step is None or ppo.num_inner_epochs * ppo.timestep_fraction <= 1:
            return None
        return self.reference_step.outputs(
            rollout, advantages.steps, tables.timesteps, batch_size=self.policy_microbatch.size
        )

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs besides the weights."""
        return {
            "kl_weight": None if self.adaptive_kl is None else self.adaptive_kl.weight,
            "average": None if self.average is None else self.average.weights,
            "policy_optimizer": self.policy_optimizer.state_dict(),
            "policy_schedule": self.policy_schedule.state_dict(),
            "critic_optimizer": None if self.critic_optimizer is None else self.critic_optimizer.state_dict(),
            "replay": self.replay.state_dict(),
            "microbatch_sizes": (self.policy_microbatch.size, self.critic_microbatch.size),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`; the weights are loaded before."""
        # torch makes new moments, not at the addresses of the old.
        self._release()
        self.version += 1
        self.policy_optimizer.load_state_dict(state["policy_optimizer"])
        self.policy_schedule.load_state_dict(state["policy_schedule"])
        if self.adaptive_kl is not None and state["kl_weight"] is not None:
            self.adaptive_kl.weight = state["kl_weight"]
        if self.critic_optimizer is not None:
            self.critic_optimizer.load_state_dict(state["critic_optimizer"])
        # Runs that were saved before rollouts were kept have none.
        self.replay.load_state_dict(state.get("replay", []), self.failed.device)
        # What was found by the free memory is kept: another size would round sums in another order.
        if not self.config.ppo.microbatch_size:
            self.policy_microbatch.size, self.critic_microbatch.size = state["microbatch_sizes"]
        if self.average is not None:
            self.average.load(state["average"] or self.backbone.policy_state())


def _state_bytes(rollout: Rollout) -> int:
    """What the replay will keep of a rollout like this one."""
    return sum(tensor.nbytes for tensor in (rollout.latents, *rollout.features.values()))
