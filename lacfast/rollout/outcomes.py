"""What a rollout of several ranks came to, on every rank: all that statistics and advantages are made of."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from lacfast.distributed import World
from lacfast.records import Advantages, Rollout


def outcomes(rollout: Rollout, world: World) -> Rollout:
    """The prompts, values and rewards of all ranks' trajectories, without their states and metadata.

    Every rank computes the same statistics of the same rows, so they do not depend on the number of ranks.
    Latents, outputs and features have no elements, (T + 1, B, 0) and the like. A world of one has the rollout
    itself.

    Raises:
        ValueError: for a rollout that does not know which rows of the batch of all ranks it has.
    """
    if world.size == 1:
        return rollout
    if rollout.share is None:
        raise ValueError(
            f"a rollout of {rollout.batch_size} trajectories has no share of the batch that {world.size} "
            "ranks have together; take what trainer.rollout or trainer.collect returns, or set "
            f"share=trainer.world.share(total), whose count must be {rollout.batch_size}"
        )
    if rollout.share.count != rollout.batch_size:
        raise ValueError(
            f"a rollout of {rollout.batch_size} trajectories has a share of {rollout.share.count}; set "
            "share=trainer.world.share(total) for the batch of all ranks"
        )
    prompts = world.entries(rollout.prompts, "the prompts of the rollout")

    def stateless(tensor: Tensor) -> Tensor:
        return tensor.new_empty((len(tensor), len(prompts), 0))

    return replace(
        rollout,
        latents=stateless(rollout.latents),
        model_outputs=stateless(rollout.model_outputs),
        log_probs=world.rows(rollout.log_probs, "the log-probabilities of the rollout", dim=1),
        values=world.rows(rollout.values, "the values of the rollout", dim=1),
        features={},
        prompts=prompts,
        metadata=[],
        rewards={name: world.rows(scores, f"the reward {name}") for name, scores in rollout.rewards.items()},
        share=None,
    )


def own_rows(rollout: Rollout, whole: Rollout, advantages: Advantages) -> tuple[Rollout, Advantages]:
    """This rank's rollout with its values in the units of `whole`, and its rows of the advantages.

    `whole` and `advantages` are of all ranks, see `outcomes`.
    """
    rows = slice(None) if rollout.share is None else rollout.share.rows
    return replace(rollout, values=whole.values[:, rows]), advantages.of_rows(rows)
