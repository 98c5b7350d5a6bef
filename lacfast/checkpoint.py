"""Checkpoints: a directory that appears whole or not at all, and is loaded in place or not at all.

What lies in the directory of a trainer's checkpoint:

    lacfast-manifest.json   format, and the checksum of every other file
    lacfast.json            how the model was made: base, LoRA, settings
    the policy              a LoRA, or the model, as load_backbone and plain diffusers read it
    critic.safetensors      the critic, its settings in the metadata
    trainer.pt              what else lives between iterations, see below
    shards/                 of a run with sharded weights their moments and averages, by torch's DCP

trainer.pt is a dictionary of plain values and tensors:

    iteration, images       counts; prompts and noise are functions of the seed and them
    evaluated               the iteration that was last evaluated
    config                  TrainConfig, of which a run that goes on may change some
    rewards, weights        names, and the weights of their advantages
    advantages              reward statistics, multipliers, buffers per prompt
    early_stopping          the best score and its age
    learner                 moments of both optimizers, the rate's step, KL weight, average, kept rollouts
    confidence              what value pretraining measured
    value_pretraining       how far it is; while it is under way the scores of its rollouts, the best critic
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lacfast.backbone import Backbone, build_critic
from lacfast.config import CriticConfig, from_json, to_json
from lacfast.critic.critic import Critic
from lacfast.distributed import ALONE, World
from lacfast.distributed.shard_files import with_shards, without_shards, write_shards
from lacfast.distributed.sharding import copy_, whole_on_first
from lacfast.rewards.heads import RewardHeads, require_rewards
from lacfast.runtime.directories import DamagedError, recover, require_whole, whole_directory
from lacfast.runtime.files import write_json

CRITIC_WEIGHTS = "critic.safetensors"
CRITIC_DESCRIPTION = "lacfast_critic"
"""Key of the critic's settings in the metadata of its file."""
EARLIER_DESCRIPTION = "critic.json"
"""Where they were before they went into the file."""
TRAINER_STATE = "trainer.pt"
MODEL_CARD = "README.md"
"""Written by what writes the policy; the notes are added to it."""
SHARDS = "shards"


Notes = Mapping[str, Any]
"""Name of a file that lies beside what is saved -> its JSON."""


def save_backbone(
    backbone: Backbone, directory: Path, notes: Notes | None = None, world: World = ALONE
) -> None:
    """Model, prompt encoder, codec and, where there is one, the critic: what load_backbone reads.

    Written by the first of the `world`'s ranks; all call it.

    Raises:
        ValueError: when that would delete something in `directory` that no save has written.
    """
    weights = _WholeWeights.of(backbone, world)
    if world.is_first:
        with whole_directory(directory) as target:
            weights.write(backbone, target)
            _write_notes(target, notes)


def _write_notes(target: Path, notes: Notes | None) -> None:
    for name, value in (notes or {}).items():
        write_json(target / name, value)
        card = target / MODEL_CARD
        if card.exists():
            with card.open("a", encoding="utf-8") as opened:
                opened.write(f"\n`{name}`\n\n```json\n{json.dumps(value, indent=2)}\n```\n")


class _WholeWeights(NamedTuple):
    """What is written of a backbone, on the first rank."""

    policy: dict[str, Tensor]
    critic: dict[str, Tensor]

    @staticmethod
    def of(backbone: Backbone, world: World) -> _WholeWeights:
        """The weights of today; all ranks call it."""
        critic = {} if backbone.critic is None else backbone.critic.state_dict()
        what = "the weights of the checkpoint"
        return _WholeWeights(
            whole_on_first(backbone.saved_weights(), world, what), whole_on_first(critic, world, what)
        )

    def write(self, backbone: Backbone, target: Path) -> None:
        backbone.save_pretrained(target, self.policy)
        if backbone.critic is not None:
            critic = backbone.critic
            description = {
                "config": to_json(critic.config),
                "num_rewards": critic.num_rewards,
                "rewards": None if critic.rewards is None else critic.rewards.to_json(),
            }
            save_file(
                {name: tensor.contiguous() for name, tensor in self.critic.items()},
                target / CRITIC_WEIGHTS,
                {CRITIC_DESCRIPTION: json.dumps(description)},
            )


def require_critic(path: Path, rewards: Sequence[str] = ()) -> None:
    """Raise ValueError unless a critic lies in this file, or in this directory, and is of these rewards.

    `rewards`: names in the order of its heads; none asks for no rewards. Earlier files do not say theirs.
    """
    found = _described_critic(path)
    if found is None:
        raise ValueError(f"{path} holds no {CRITIC_WEIGHTS}; pass a checkpoint or the file itself")
    if rewards:
        require_rewards(_heads(found[1]), rewards, f"the critic of {path}")


def give_critic(backbone: Backbone, path: Path) -> None:
    """Give a backbone the critic of a file, or of a directory that holds one.

    Raises:
        ValueError: as `read_critic`, and for a directory that holds none.
    """
    require_critic(path)
    backbone.critic = read_critic(backbone, path)


def read_critic(backbone: Backbone, path: Path) -> Critic | None:
    """The critic of a file, or of a directory that holds one; None when the directory does not.

    A file suffices: its metadata say how to build the critic on any backbone of the same architecture.

    Raises:
        ValueError: for a file that is no critic's, or one of another architecture.
    """
    found = _described_critic(path)
    if found is None:
        return None
    file, description = found
    config = from_json(CriticConfig, description["config"])
    critic = build_critic(backbone, description["num_rewards"], config)
    if critic is not None:
        load_in_place(critic.state_dict(), load_file(file), f"critic in {file}")
        critic.rewards = _heads(description)
    return critic


def _heads(description: dict[str, Any]) -> RewardHeads | None:
    """What the heads of a described critic predict; earlier versions did not say."""
    rewards = description.get("rewards")
    return None if rewards is None else RewardHeads.from_json(rewards)


def _described_critic(path: Path) -> tuple[Path, dict[str, Any]] | None:
    """The file of a critic and what it says of it; None for a directory without one."""
    file = path / CRITIC_WEIGHTS if path.is_dir() else path
    if path.is_dir() and not file.exists():
        return None
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
        earlier = file.with_name(EARLIER_DESCRIPTION)
        if CRITIC_DESCRIPTION not in metadata and earlier.exists():
            metadata[CRITIC_DESCRIPTION] = earlier.read_text(encoding="utf-8")
        return file, json.loads(metadata[CRITIC_DESCRIPTION])
    except (OSError, SafetensorError, KeyError) as error:
        raise ValueError(
            f"{file} holds no critic; pass the {CRITIC_WEIGHTS} that trainer.save() or save_backbone() wrote"
        ) from error


def require_same_shapes(own: Mapping[str, Tensor], saved: Mapping[str, Tensor], what: str) -> None:
    """
    Raises:
        ValueError: naming the first tensor that is missing, unknown or of another shape.
    """
    for name in [*own, *saved]:
        found = tuple(saved[name].shape) if name in saved else "nothing"
        wanted = tuple(own[name].shape) if name in own else "nothing"
        if found != wanted:
            raise ValueError(
                f"the {what} does not fit: {name} is {found} there and {wanted} here; "
                "build the model and the critic with the configuration of the checkpoint"
            )


def load_in_place(own: Mapping[str, Tensor], saved: Mapping[str, Tensor], what: str) -> None:
    """Copy weights into the tensors that exist, so that their addresses stay what a captured graph knows."""
    require_same_shapes(own, saved, what)
    with torch.no_grad():
        for name, tensor in own.items():
            copy_(tensor, saved[name])


def save_run(
    backbone: Backbone,
    state: dict[str, Any],
    directory: Path,
    notes: Notes | None = None,
    world: World = ALONE,
) -> None:
    """Backbone, critic and the trainer's own `state`, which torch.load(weights_only=True) can read.

    All ranks of the `world` call it; the first writes, and of what is sharded each its part.

    Raises:
        ValueError: when that would delete something in `directory` that no save has written.
    """
    weights = _WholeWeights.of(backbone, world)
    plain, shards = without_shards(state)
    if not (shards or world.is_first):
        return
    with _directory_of_all(directory, world) if shards else whole_directory(directory) as target:
        if shards:
            write_shards(shards, target / SHARDS, world)
        if world.is_first:
            weights.write(backbone, target)
            # A file of Python's: its error, which the writer of a path hides, says that the disk is full.
            with (target / TRAINER_STATE).open("wb") as file:
                torch.save(plain, file)
            _write_notes(target, notes)


@contextmanager
def _directory_of_all(directory: Path, world: World) -> Iterator[Path]:
    """A whole_directory of the first rank in which all of them write."""
    with whole_directory(directory) if world.is_first else nullcontext(directory) as made:
        yield Path(world.of_first(str(made), "the directory of the checkpoint"))
        world.wait("the end of the checkpoint")


def read_state(directory: Path) -> dict[str, Any]:
    """The `state` of save_run, of a directory that is compared with its checksums; what is sharded as
    SavedShards.

    Raises:
        ValueError: when the directory holds none, is damaged, or is of a later version's format.
    """
    recover(directory)
    require_whole(directory)
    if not (directory / TRAINER_STATE).exists():
        raise ValueError(f"{directory} holds no {TRAINER_STATE}; pass a directory that trainer.save() wrote")
    try:
        # Its parts are moved to where their owners are, which may be another device than it was saved on.
        state: dict[str, Any] = torch.load(directory / TRAINER_STATE, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise DamagedError(
            f"{directory} is damaged: {TRAINER_STATE} cannot be read; go on from the checkpoint before it"
        ) from error
    found: dict[str, Any] = with_shards(state, directory / SHARDS)
    return found


def load_weights(backbone: Backbone, directory: Path) -> None:
    """Policy and critic in place from save_run.

    Raises:
        ValueError: when one does not fit; both are checked before either is changed.
    """
    policy, critic = backbone.policy_state(), {}
    if backbone.critic is not None:
        critic = backbone.critic.state_dict()
    has_critic = (directory / CRITIC_WEIGHTS).exists()
    try:
        saved_policy = backbone.read_policy(directory)
        saved_critic = load_file(directory / CRITIC_WEIGHTS) if has_critic else {}
    except (OSError, SafetensorError) as error:
        raise DamagedError(
            f"{directory} is damaged: its weights cannot be read ({error}); go on from the checkpoint before "
            "it"
        ) from error
    require_same_shapes(policy, saved_policy, f"model in {directory}")
    require_same_shapes(critic, saved_critic, f"critic in {directory}")
    load_in_place(policy, saved_policy, f"model in {directory}")
    load_in_place(critic, saved_critic, f"critic in {directory}")
