"""The policy's update: its objective on (sample, step) pairs of a rollout, with the KL to the anchor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.optim import Optimizer

from lacfast import ops
from lacfast.backbone import Backbone
from lacfast.config import ForwardProcess, TrainConfig
from lacfast.critic.critic import Critic
from lacfast.critic.trunk import Features
from lacfast.distributed import ALONE, World
from lacfast.learning.batches import MEASURED, PolicyBatch, PolicySource
from lacfast.learning.forward_loss import forward_loss
from lacfast.learning.gradient_guard import GradientGuard
from lacfast.learning.hold import HeldSteps
from lacfast.learning.kl_anchor import KLAnchor
from lacfast.learning.old_policy import OldPolicy
from lacfast.learning.pairs import Pairs, minibatches, states_of
from lacfast.learning.readers import Reader
from lacfast.learning.runner import EAGER, UpdateRunner
from lacfast.learning.totals import PolicyTotals, UpdateRecords
from lacfast.learning.update import Update
from lacfast.policy import apply_guidance, guided_output, policy_output
from lacfast.records import PPOStats, Rollout
from lacfast.runtime.profiling import span


class PolicyUpdate(Update[PolicyBatch, PolicyTotals]):
    """Optimizer steps of the policy on a rollout."""

    def __init__(
        self,
        backbone: Backbone,
        optimizer: Optimizer,
        config: TrainConfig,
        guard: GradientGuard,
        runner: UpdateRunner = EAGER,
        *,
        anchor: KLAnchor | None = None,
        hold: HeldSteps | None = None,
        old: OldPolicy | None = None,
        reader: Reader,
        world: World = ALONE,
    ) -> None:
        """
        Args:
            backbone: with the policy, which is trained in place.
            optimizer: see Update, as for guard and runner.
            config: of the run.
            guard: of its steps.
            runner: of a step's parts.
            anchor: that the KL is measured from. None: no KL.
            hold: of the deterministic steps. None: they move freely.
            old: whose outputs a rollout without a critic comes without. None: it has them.
            reader: the critic's part in the forward.
            world: see Update.
        """
        penalty = config.ppo.kl
        # A graph would freeze a weight that adapts, and has no room for the pairs of a hold.
        is_graphed = hold is None and (penalty is None or penalty.target is None)
        runner = runner if is_graphed else EAGER
        # A critic may learn on the features of the policy's own forwards.
        modules = (backbone.model, reader.critic)
        super().__init__(PolicyTotals, optimizer, config.ppo, guard, runner, world, modules=modules)
        self.backbone = backbone
        self.objective = config.objective
        self.guidance_scale = config.sampler.guidance_scale
        self.anchor = anchor
        self.hold = hold
        self.old = old
        self._even = config.shard > 1
        self._held: tuple[PolicySource, Pairs] | None = None
        self.reader = reader
        self.kl_weight = 0.0 if penalty is None else penalty.weight
        self.version = 0
        """Changes with the weights of the policy."""

    def completed(self, source: PolicySource) -> PolicySource:
        """`source` with the outputs of anchor and old policy, where several passes would repeat them."""
        if not self.config.repeats:
            return source
        self._fill_old_outputs(source, [source.pairs])
        if self.anchor is None:
            return source
        outputs = partial(self.anchor.outputs, source.rollout, source.advantages.steps, source.timesteps)
        anchored = self.microbatch.run(
            lambda size: outputs(batch_size=size), source.rollout.batch_size, release=self.anchor.release
        )
        return replace(source, anchor_outputs=anchored)

    def minibatches(self, source: PolicySource, generator: torch.Generator) -> list[Pairs]:
        """The pairs of a pass, minibatch by minibatch, at which the old policy's outputs are known."""
        ppo = self.config
        drawn = minibatches(
            *(source.pairs, ppo.num_minibatches, generator),
            fraction=ppo.timestep_fraction,
            share=source.rollout.share,
            draw=ppo.minibatch_draw,
            even=self._even,
        )
        found = list(drawn)
        if not ppo.repeats:
            self._fill_old_outputs(source, found)
        return found

    def _fill_old_outputs(self, source: PolicySource, pairs: Sequence[Pairs]) -> None:
        """Write the old policy's outputs at `pairs` into the rollout, which lacks them where no critic needed
        its forward at every state."""
        if self.old is None:
            return
        with self.old.applied(), span("update/old_outputs"):
            for part in pairs:
                self.microbatch.run(partial(self._fill, source, part), len(part))

    @torch.no_grad()
    def _fill(self, source: PolicySource, pairs: Pairs, size: int) -> None:
        rollout, uncond = source.rollout, source.rollout.uncond_conditioning
        for part in pairs.split(size):
            states = states_of(rollout, source.timesteps, part)
            without = None if uncond is None else uncond.select(part.rows)
            output, _ = guided_output(self.backbone, states, without, self.guidance_scale, "cond")
            rollout.model_outputs[part.steps, part.rows] = output.to(rollout.model_outputs.dtype)

    def learn(
        self, source: PolicySource, minibatch: Pairs, records: UpdateRecords, held: Pairs | None = None
    ) -> None:
        """One optimizer step on `minibatch`, pairs of `source`, with those that are `held` besides."""
        self._held = None if held is None else (source, held)
        is_known = self._knows(source.rollout)
        numbers = self.step(replace(source, is_known=is_known), minibatch)
        self.version += 1
        # They are of the step's first microbatch, which may have fewer.
        measured = self.world.size * min(MEASURED, self.microbatch_pairs(minibatch, self.microbatch.size))
        records.add_policy(numbers, self.guard, measured=measured if is_known else math.inf)
        self.reader.finish(records, minibatch.total)

    def _knows(self, rollout: Rollout) -> bool:
        """Whether the unconditional half of `rollout` is known: the weights are those that made it, and the
        guided output tells it."""
        is_detached = rollout.uncond_conditioning is not None and self.config.cfg_grad == "cond"
        tells = not self.backbone.rescales_guidance and rollout.forward_steps is None
        return is_detached and tells and rollout.policy_version == self.version

    def begin(self) -> None:
        super().begin()
        self.reader.begin()
        if self.hold is not None and self._held is not None:
            source, pairs = self._held
            self.hold.gradient(source, pairs, self.microbatch.size, self.totals.hold_distance)

    def gradient(self, batch: PolicyBatch) -> None:
        output, features = self._output(batch)
        anchor_output = batch.anchor_output
        if self.anchor is not None and anchor_output is None:
            anchor_output = self.anchor.output(batch.states, batch.uncond_conditioning)
        loss, stats = self._loss(output, batch, anchor_output)
        loss = self.reader.joined(loss, batch, features) * batch.share
        loss.backward()  # type: ignore[no-untyped-call]
        self.totals.add(loss.detach(), stats)
        self.reader.learn(batch, features)

    def _loss(
        self, output: Tensor, batch: PolicyBatch, anchor_output: Tensor | None
    ) -> tuple[Tensor, PPOStats]:
        config, tables, objective = self.config, self.tables, self.objective
        if isinstance(objective, ForwardProcess):
            return forward_loss(
                *(objective, output, batch, tables),
                advantage_clip=config.advantage_clip,
                anchor_output=anchor_output,
                kl_weight=self.kl_weight,
            )
        return ops.ppo_loss(
            output,
            batch.old_model_output,
            batch.advantages,
            tables.coefficients,
            batch.steps,
            noise=batch.noise,
            **vars(config.clip),
            dual_clip=config.dual_clip,
            ratio=config.ratio,
            step_weights=tables.weights,
            mask=batch.mask,
            anchor_output=anchor_output,
            kl_weight=self.kl_weight,
            kl_gains=None if anchor_output is None else tables.kl_gains,
        )

    def _output(self, batch: PolicyBatch) -> tuple[Tensor, Features]:
        """The policy's output (P, ...) after guidance, and what the critic reads of its forward."""
        critic, detach = self.reader.critic, self.reader.is_detached
        if batch.uncond_rows is not None:
            return known_output(self.backbone, batch, self.guidance_scale, critic=critic, detach=detach)
        return guided_output(
            *(self.backbone, batch.states, batch.uncond_conditioning),
            *(self.guidance_scale, self.config.cfg_grad),
            critic=critic,
            detach=detach,
        )


def known_output(
    backbone: Backbone, batch: PolicyBatch, guidance_scale: float, *, critic: Critic | None, detach: bool
) -> tuple[Tensor, Features]:
    """Output like guided_output's, by the weights that made the rollout: its unconditional half need not run.

        v = v_old + scale (v_cond - stop(v_cond))

    The value is the rollout's and the gradient is that of the conditional half. The first `uncond_rows` pairs
    run in full all the same, so that the mismatch of the forwards stays measured.
    """
    states, rows = batch.states, slice(batch.uncond_rows)
    forward = policy_output(
        *(backbone, states.sample, states.timestep, states.conditioning, None), critic=critic, detach=detach
    )
    cond = forward.output
    known = apply_guidance(cond, cond.detach(), guidance_scale, base=batch.old_model_output)
    if batch.uncond_rows and batch.uncond_conditioning is not None:
        with torch.no_grad():
            uncond = backbone.predict(
                states.sample[rows], states.timestep[rows], batch.uncond_conditioning.select(rows)
            )
        measured = apply_guidance(cond[rows], uncond, guidance_scale)
        known = torch.cat([measured, known[len(measured) :]])
    return known.contiguous(), forward.features
