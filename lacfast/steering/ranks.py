"""Steering on several ranks: each makes its share of the images, and all of them are on the first."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from lacfast.backbone import Backbone
from lacfast.config import SteeringConfig
from lacfast.distributed import World
from lacfast.prompts import PromptSet
from lacfast.steering.cost import SteeringStats
from lacfast.steering.steer import steer


def steer_together(
    world: World, backbone: Backbone, prompts: PromptSet, config: SteeringConfig, **settings: Any
) -> tuple[Tensor, SteeringStats]:
    """What `steer` returns of all prompts on the first rank, on the CPU; another has its own images.

    An image's noise follows its number, so it is the same on every rank.

    Args:
        world: ranks, each with the whole model.
        backbone: see `steer`, as for all that follows.
        prompts: of all ranks, at least as many as these.
        config: method and strength.
        settings: keyword arguments of `steer`.
    """
    share = world.share(len(prompts))
    own = replace(config, first_image=config.first_image + share.first)
    images, stats = steer(backbone, prompts.of_share(share), own, **settings)
    parts = world.entries([stats.on_host()], "what steering cost and reached")
    return world.rows_on_first(images.cpu(), "the steered images"), SteeringStats.concatenate(parts)
