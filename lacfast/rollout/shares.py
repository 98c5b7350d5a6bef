"""What a run's settings ask of the number of its ranks, told before any work."""

from __future__ import annotations

from lacfast.config import TrainConfig
from lacfast.distributed import World, require_learners


def require_ranks(config: TrainConfig, world: World, *, pretrains: bool = False) -> World:
    """The ranks, if the run can be shared by them.

    Args:
        config: of the run.
        world: of all its ranks.
        pretrains: it begins with value pretraining.

    Raises:
        ValueError: for ranks without a trajectory or an image of their own, weights that cannot be divided
            over them, or no rank that learns.
    """
    require_learners(world, config.rollout_ranks)
    world.require_shards(config.shard)
    asked = [("batch_size", config.batch_size, world.size)]
    if config.eval_every:
        asked.append(("eval_samples", config.eval_samples, world.size - config.rollout_ranks))
    if pretrains and config.critic.trunk != "none":
        asked.append(("pretrain.held_out_samples", config.pretrain.held_out_samples, world.size))
    for setting, total, ranks in asked:
        World(size=ranks).able_to_share(total, setting)
    return world
