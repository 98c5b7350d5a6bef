"""What a run would cost and hold, before it starts: its model without weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from lacfast.backbone import build_critic
from lacfast.backbones import adapt_pretrained
from lacfast.backbones.blueprint import load_blueprint
from lacfast.backbones.latent import LatentBackbone
from lacfast.backbones.storage import read_description
from lacfast.config import TrainConfig
from lacfast.critic.critic import Critic
from lacfast.distributed import World
from lacfast.records import Conditioning, TransitionTable
from lacfast.rewards.names import require_known
from lacfast.rewards.registry import declared_heads
from lacfast.rollout.shares import require_ranks
from lacfast.runs.capacity import GPU_BYTES, MemoryPlan
from lacfast.runs.config import RunConfig
from lacfast.runs.costs import Costs, count
from lacfast.runs.devices import torch_dtype
from lacfast.runs.embedded import TINY_MODELS
from lacfast.runs.memory import memory_plan
from lacfast.runs.scaling import Scaling, scaling
from lacfast.runs.shards import Shards
from lacfast.tasks.pretraining import pretrain


def model_arguments(config: RunConfig) -> dict[str, Any]:
    """What load_backbone and load_blueprint are told of a run's model.

    Raises:
        ValueError: for a LoRA that was trained on a base in int8, on one that was not rounded.
    """
    trained_on = read_description(Path(config.model)).get("base_precision", "model")
    if (trained_on, config.base_precision) == ("int8", "model"):
        raise ValueError(
            f"{config.model} was trained on a base in int8, and base_precision='model' is of other weights; "
            "pass base_precision='int8'"
        )
    return {
        "dtype": torch_dtype(config.dtype),
        "lora": config.lora_from or config.lora,
        "settings": config.pipeline,
        "base_precision": config.base_precision,
    }


@dataclass(frozen=True)
class Plan:
    """An iteration's costs and the run's memory."""

    costs: Costs
    shards: Shards
    """What a rank has in parts."""
    config: TrainConfig
    num_steps: int
    follow: Callable[[], MemoryPlan]
    """Follows the allocations of the run's steps, which takes seconds for a large model."""

    @cached_property
    def memory(self) -> MemoryPlan:
        """The run's memory, followed when it is first asked for."""
        return self.follow()

    def on(self, ranks: int) -> Scaling:
        """The iteration on so many ranks; microbatches are those that 80 GB hold where none are given.

        Raises:
            ValueError: for ranks that config.shard does not divide.
        """
        World(size=ranks).require_shards(self.config.shard)
        microbatch = self.config.ppo.microbatch_size or 1
        if self.shards.count > 1 and not self.config.ppo.microbatch_size:
            # Sharded weights are gathered for each.
            update = next(phase for phase in self.memory.phases if phase.setting == "ppo.microbatch_size")
            microbatch = max(update.fitting(GPU_BYTES), 1)
        return scaling(
            *(self.costs, self.config, ranks),
            shards=self.shards,
            microbatch=microbatch,
            num_steps=self.num_steps,
        )


def plan(config: RunConfig, *, ranks: int = 1) -> Plan:
    """What `config` would cost and hold; of a pipeline only the configs are read.

    Args:
        config: of the run.
        ranks: processes that share a rollout.

    Raises:
        ValueError: when they cannot be read, for an unknown reward, a batch of fewer than the ranks, or no
            rank that learns.
    """
    model = _Model.of(config, ranks)
    backbone, _, table, _ = model.parts
    costs = count(*model.parts, config.train)
    follow = partial(model.memory, config, "", True, ranks)
    return Plan(costs, Shards.of(backbone, config.train.shard), config.train, table.num_steps, follow)


def planned_memory(config: RunConfig, *, device: str, pretrains: bool, ranks: int) -> MemoryPlan:
    """The memory of `plan` alone: what a run asks before it starts, where nobody waits for its costs."""
    return _Model.of(config, ranks).memory(config, device, pretrains, ranks)


@dataclass(frozen=True)
class _Model:
    """What is planned with."""

    parts: tuple[LatentBackbone, Critic | None, TransitionTable, Conditioning]
    beside_bytes: int
    """Bytes of decoder and text encoders."""
    encoder_bytes: int
    """Bytes of text encoders that are aside but while they encode."""

    @staticmethod
    def of(config: RunConfig, ranks: int) -> _Model:
        require_ranks(config.train, World(size=ranks), pretrains=config.value_pretraining)
        require_known([*(name for name, _ in config.rewards), *config.evaluation_rewards])
        if config.model in TINY_MODELS:
            # The weights do not matter, so one step of pretraining does.
            task, name = TINY_MODELS[config.model]
            backbone = adapt_pretrained(pretrain(name, task, steps=1), lora=config.lora)
            conditioning, beside, aside = backbone.encode_unconditional(1), 0, 0
        else:
            blueprint = load_blueprint(config.model, **model_arguments(config))
            backbone, conditioning = blueprint.backbone, blueprint.conditioning()
            encoders = blueprint.text_encoder_bytes
            kept, aside = (encoders, 0) if config.keep_text_encoders else (0, encoders)
            beside = blueprint.decoder_bytes + kept
        heads = [head for name, _ in config.rewards for head in declared_heads(name)]
        critic = build_critic(backbone, len(heads), config.train.critic)
        table = backbone.transition_table(config.train.sampler.at(0, seed=config.train.seed))
        return _Model((backbone, critic, table, conditioning), beside, aside)

    def memory(self, config: RunConfig, device: str, pretrains: bool, ranks: int) -> MemoryPlan:
        """`device` empty: config.device, or else a GPU, but for models that are made on the spot."""
        natural = "cpu" if config.model in TINY_MODELS else "cuda"
        return memory_plan(
            *self.parts,
            config.train,
            beside_bytes=self.beside_bytes,
            encoder_bytes=self.encoder_bytes,
            pretrains=pretrains and config.value_pretraining,
            on_cpu=torch.device(device or config.device or natural).type == "cpu",
            ranks=ranks,
        )
