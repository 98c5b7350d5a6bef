"""The hold: the steps that no ratio reaches stay where the anchor has them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat

import torch
from torch import Tensor

from lacfast.backbone import Backbone
from lacfast.config import PPOConfig, TrainConfig
from lacfast.learning.batches import PolicySource
from lacfast.learning.kl_anchor import KLAnchor
from lacfast.learning.pairs import Pairs, all_pairs, minibatches, states_of
from lacfast.policy import guided_output
from lacfast.records import Rollout
from lacfast.transfer import to_device


def held_steps(rollout: Rollout) -> Tensor:
    """The deterministic steps (K,) int64 of a rollout: no ratio and no KL reaches them."""
    return to_device((rollout.table.std == 0).nonzero().flatten(), rollout.latents.device)


def held_minibatches(
    rollout: Rollout, config: PPOConfig, generator: torch.Generator
) -> Iterator[Pairs | None]:
    """The pairs that are held in each optimizer step of a pass; None where there is no hold."""
    if config.hold is None:
        return repeat(None, config.num_minibatches)
    return minibatches(
        all_pairs(held_steps(rollout), rollout.batch_size),
        config.num_minibatches,
        generator,
        fraction=config.hold.share,
        share=rollout.share,
    )


class HeldSteps:
    """Adds the gradient of the hold to an optimizer step's."""

    def __init__(self, backbone: Backbone, anchor: KLAnchor, config: TrainConfig) -> None:
        """
        Args:
            backbone: with the policy that is held.
            anchor: that it is held to.
            config: of a run with a hold.
        """
        assert config.ppo.hold is not None
        self.backbone = backbone
        self.anchor = anchor
        self.weight = config.ppo.hold.weight
        self.guidance = config.sampler.guidance_scale, config.ppo.cfg_grad

    def gradient(self, source: PolicySource, pairs: Pairs, limit: int, distance: Tensor) -> None:
        """Add that of weight mean( (v - v_anchor)^2 ) over `pairs`, at most `limit` at a time, and this
        rank's part of the mean itself to `distance` ().
        """
        for part in pairs.split(limit):
            states = states_of(source.rollout, source.timesteps, part)
            uncond = source.rollout.uncond_conditioning
            uncond = None if uncond is None else uncond.select(part.rows)
            kept = self.anchor.output(states, uncond)
            output, _ = guided_output(self.backbone, states, uncond, *self.guidance)
            square = (output - kept).square().mean() * (len(part) / pairs.total)
            (self.weight * square).backward()  # type: ignore[no-untyped-call]
            distance.add_(square.detach())
