"""The policy that makes trajectories, in the precision that it has for them."""

from __future__ import annotations

from collections.abc import Iterator

from lacfast.backbone import Backbone
from lacfast.config import TrainConfig
from lacfast.distributed import World
from lacfast.prompts import PromptSet
from lacfast.records import Rollout, TransitionTable
from lacfast.rollout.sampler import RolloutSampler
from lacfast.rollout.scored import sampled
from lacfast.runtime.graph import GraphRunner
from lacfast.runtime.memory import BatchSize


class Actor:
    """Samples trajectories to learn from, by the weights that the model has."""

    def __init__(
        self, backbone: Backbone, sampler: RolloutSampler, graphs: GraphRunner, config: TrainConfig
    ) -> None:
        """
        Args:
            backbone: whose weights are trained.
            sampler: of its own precision.
            graphs: captures the steps of another one.
            config: of the run, with the precision.
        """
        self.trained = backbone
        self.config = config
        self.backbone, self.sampler = backbone, sampler
        if config.rollout_precision != "model":
            self.backbone = backbone.quantized(config.rollout_precision)
            self.sampler = RolloutSampler(self.backbone, backbone.critic, graphs)
        self.part_size = BatchSize(config.rollout_batch_size, unit="sample", setting="rollout_batch_size")

    def parts(
        self,
        prompts: PromptSet,
        first_id: int,
        table: TransitionTable,
        *,
        world: World,
        keep_features: bool = True,
        valued: bool = True,
        version: int | None = None,
    ) -> Iterator[Rollout]:
        """Trajectories without rewards, part by part; sample ids count from `first_id`.

        `version` is Learner.version of the weights that the model has; see `sampled` for the rest.
        """
        self.backbone.requantize()
        return sampled(
            *(self.sampler, table, prompts),
            seed=self.config.seed,
            first_id=first_id,
            guidance_scale=self.config.sampler.guidance_scale,
            keep_features=keep_features,
            part_size=self.part_size,
            valued=valued,
            # A quantised policy's outputs are not those of the learner's weights, of no version.
            policy_version=version if self.backbone is self.trained else None,
            world=world,
        )
