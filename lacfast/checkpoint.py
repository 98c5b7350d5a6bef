"""Checkpoints: a directory that appears whole or not at all, and is loaded in place or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lacfast.backbone import Backbone, build_critic
from lacfast.config import CriticConfig, from_json, to_json
from lacfast.critic.critic import Critic
from lacfast.rewards.heads import RewardHeads
from lacfast.runtime.files import needing_space, writing_to

CRITIC_WEIGHTS = "critic.safetensors"
CRITIC_DESCRIPTION = "lacfast_critic"
"""Key of the critic's settings in the metadata of its file."""
EARLIER_DESCRIPTION = "critic.json"
"""Where they were before they went into the file."""
TRAINER_STATE = "trainer.pt"


@contextmanager
def whole_directory(target: Path) -> Iterator[Path]:
    """A temporary directory beside `target` that takes its place when the block ends without an error.

    Raises:
        ValueError: when the parent cannot be written.
        OSError: when the disk is full; `target` is as before.
    """
    temporary = target.parent / f".{target.name}-{os.getpid()}"
    with writing_to(target):
        temporary.mkdir(parents=True)
    try:
        with needing_space(target):
            yield temporary
        replaced = temporary.with_name(temporary.name + "-replaced")
        if target.exists():
            os.replace(target, replaced)
        os.replace(temporary, target)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def save_backbone(backbone: Backbone, directory: Path) -> None:
    """Model, prompt encoder, codec and, where there is one, the critic: what load_backbone reads."""
    with whole_directory(directory) as target:
        write_backbone(backbone, target)


def write_backbone(backbone: Backbone, target: Path) -> None:
    backbone.save_pretrained(target)
    if backbone.critic is not None:
        critic = backbone.critic
        description = {
            "config": to_json(critic.config),
            "num_rewards": critic.num_rewards,
            "rewards": None if critic.rewards is None else critic.rewards.to_json(),
        }
        save_file(
            {name: tensor.contiguous() for name, tensor in critic.state_dict().items()},
            target / CRITIC_WEIGHTS,
            {CRITIC_DESCRIPTION: json.dumps(description)},
        )


def read_critic(backbone: Backbone, path: Path) -> Critic | None:
    """The critic of a file, or of a directory that holds one; None when the directory does not.

    A file suffices: its metadata say how to build the critic on any backbone of the same architecture.

    Raises:
        ValueError: for a file that is no critic's, or one of another architecture.
    """
    file = path / CRITIC_WEIGHTS if path.is_dir() else path
    if path.is_dir() and not file.exists():
        return None
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
        earlier = file.with_name(EARLIER_DESCRIPTION)
        if CRITIC_DESCRIPTION not in metadata and earlier.exists():
            metadata[CRITIC_DESCRIPTION] = earlier.read_text(encoding="utf-8")
        description = json.loads(metadata[CRITIC_DESCRIPTION])
    except (OSError, SafetensorError, KeyError) as error:
        raise ValueError(
            f"{file} holds no critic; pass the {CRITIC_WEIGHTS} that trainer.save() or save_backbone() wrote"
        ) from error
    config = from_json(CriticConfig, description["config"])
    critic = build_critic(backbone, description["num_rewards"], config)
    if critic is not None:
        load_in_place(critic.state_dict(), load_file(file), f"critic in {file}")
        # Earlier versions did not say what the heads predict.
        rewards = description.get("rewards")
        critic.rewards = None if rewards is None else RewardHeads.from_json(rewards)
    return critic


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
            tensor.copy_(saved[name])


def save_run(backbone: Backbone, state: dict[str, Any], directory: Path) -> None:
    """Backbone, critic and the trainer's own `state`, which torch.load(weights_only=True) can read."""
    with whole_directory(directory) as target:
        write_backbone(backbone, target)
        # A file of Python's: its error, which the writer of a path hides, says that the disk is full.
        with (target / TRAINER_STATE).open("wb") as file:
            torch.save(state, file)


def read_state(directory: Path) -> dict[str, Any]:
    """The `state` of save_run.

    Raises:
        ValueError: when the directory holds none.
    """
    if not (directory / TRAINER_STATE).exists():
        raise ValueError(f"{directory} holds no {TRAINER_STATE}; pass a directory that trainer.save() wrote")
    state: dict[str, Any] = torch.load(directory / TRAINER_STATE, weights_only=True)
    return state


def load_weights(backbone: Backbone, directory: Path) -> None:
    """Policy and critic in place from save_run.

    Raises:
        ValueError: when one does not fit; both are checked before either is changed.
    """
    policy, saved_policy = backbone.policy_state(), backbone.read_policy(directory)
    critic = {} if backbone.critic is None else backbone.critic.state_dict()
    has_critic = (directory / CRITIC_WEIGHTS).exists()
    saved_critic = load_file(directory / CRITIC_WEIGHTS) if has_critic else {}
    require_same_shapes(policy, saved_policy, f"model in {directory}")
    require_same_shapes(critic, saved_critic, f"critic in {directory}")
    load_in_place(policy, saved_policy, f"model in {directory}")
    load_in_place(critic, saved_critic, f"critic in {directory}")
