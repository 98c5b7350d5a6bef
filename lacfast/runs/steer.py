"""lacfast steer: a saved model with its critic, prompts in, images and a JSON of statistics out."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lacfast.backbones import load_backbone
from lacfast.config import SamplerConfig, to_json
from lacfast.distributed import World
from lacfast.prompts import HUB, PromptSet, path_and_column
from lacfast.report.pictures import contact_sheet, save_sample
from lacfast.rewards.frames import JUDGED_FRAMES, judged_frames
from lacfast.rewards.registry import RewardSet
from lacfast.runs.config import SteeringRun
from lacfast.runs.devices import torch_device, torch_dtype
from lacfast.runs.directory import STEERED, require_own
from lacfast.runs.embedded import PROMPT_SOURCES, prompts_of
from lacfast.runs.saved import saved_model, trained_heads, trained_sampler
from lacfast.runs.terminal import phase_log
from lacfast.runtime.files import require_writable, write_json
from lacfast.steering import SteeringStats
from lacfast.steering.ranks import steer_together

PROMPT_FILES = (".txt", ".jsonl", ".parquet")


def prompts_to_steer(prompts: Sequence[str], count: int) -> PromptSet:
    """The prompts of one source as `lacfast train` takes it, or the texts themselves.

    Args:
        prompts: a source or texts.
        count: how many, repeated as often as it takes; 0: each once.

    Raises:
        ValueError: for no prompt, or a file that does not exist.
    """
    first = prompts[0] if prompts else ""
    path, _ = path_and_column(first)
    # Path.exists raises for a text that is longer than a name may be.
    is_file = path.suffix in PROMPT_FILES or (first and os.path.exists(path))
    is_source = first in PROMPT_SOURCES or first.startswith(HUB) or is_file
    if is_source and len(prompts) > 1:
        raise ValueError(f"--prompts takes one source or texts, not {first!r} and {len(prompts) - 1} more")
    found = prompts_of(first) if is_source else PromptSet.create(list(prompts))
    return found.cycle(count) if count else found


def steer_model(settings: SteeringRun) -> SteeringStats:
    """Make, write and score steered images of a saved model.

    With several ranks each makes its share of the images, and the first one shows and writes.

    Raises:
        ValueError: for settings that cannot work, before the model is loaded where that can be told.
    """
    device, prompts = torch_device(settings.device), prompts_to_steer(settings.prompts, settings.samples)
    world = World.current().able_to_share(len(prompts))
    rewards, gold = (
        RewardSet.create(names) if names else None for names in (settings.rewards, settings.gold)
    )
    for judge in (rewards, gold):
        if judge is not None:
            judge.check()
    if settings.settings.selection == "reward" and rewards is None:
        raise ValueError("--selection reward has no reward to select by; name it with --rewards")
    for scorer in (rewards, gold):
        if scorer is not None:
            scorer.require_prompts(prompts)
    model, sampler = saved_model(settings.source), settings.sampler
    if sampler == SamplerConfig():
        sampler = trained_sampler(settings.critic or model) or sampler
    require_own(settings.out, STEERED)
    require_writable(settings.out / "images")
    log = phase_log(world)
    with log.phase("loading", f"Load {model}"):
        backbone = load_backbone(
            model,
            critic_file=settings.critic or None,
            device=device,
            dtype=torch_dtype(settings.dtype),
        )
    if backbone.critic is not None and backbone.critic.rewards is None:
        backbone.critic.rewards = trained_heads(settings.critic or model)
    weights = torch.tensor(settings.head_weights) if settings.head_weights else None
    with log.phase("steering", f"Steer {len(prompts):,} images"):
        images, stats = steer_together(
            world,
            backbone,
            prompts,
            settings.settings,
            sampler=sampler,
            rewards=rewards,
            gold=gold,
            head_weights=weights,
        )
    told = {"model": model, "critic": settings.critic, "sampler": to_json(sampler)}
    told["steering"] = to_json(settings.settings)
    if world.is_first:
        _write(settings.out, images, prompts, stats, told)
    return stats


def _write(
    out: Path, images: Tensor, prompts: PromptSet, stats: SteeringStats, settings: dict[str, Any]
) -> None:
    """images/00000.png or, of videos, .webp, samples.png, and statistics.json with a row per image."""
    contact_sheet(judged_frames(images, JUDGED_FRAMES)).save(out / "samples.png")
    rows = []
    for index, text in enumerate(prompts.texts):
        name = str(save_sample(images[index], out / f"images/{index:05d}").relative_to(out))
        values = stats.values[:, index].tolist()
        scores = {reward: float(score[index]) for reward, score in (stats.rewards | stats.gold).items()}
        rows.append({"file": name, "prompt": text, "values": values, "scores": scores})
    write_json(out / "statistics.json", settings | summary(stats) | {"images": rows})


def summary(stats: SteeringStats) -> dict[str, Any]:
    """The numbers of a whole call: NFE, V of the last noisy state, rewards, gold."""
    evaluations = stats.evaluations
    return {
        "forwards": evaluations.forwards,
        "backwards": evaluations.backwards,
        "evaluations_per_image": evaluations.per_image,
        "reward_calls": stats.reward_calls,
        "gradient_gain": None if math.isnan(stats.gradient_gain) else stats.gradient_gain,
        "value": float(stats.values[-1].mean()) if len(stats.values) else None,
        "rewards": {name: float(score.mean()) for name, score in stats.rewards.items()},
        "gold": {name: float(score.mean()) for name, score in stats.gold.items()},
    }
