"""lacfast steer: a saved model with its critic, prompts in, images and a JSON of statistics out."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lacfast.backbones import load_backbone
from lacfast.config import SamplerConfig, SteeringConfig, from_json, to_json
from lacfast.prompts import PromptSet
from lacfast.report.pictures import grid, to_image
from lacfast.rewards.registry import RewardSet
from lacfast.runs.directory import RunDirectory
from lacfast.runs.train import PROMPT_SOURCES, SAMPLE_IMAGES, prompts_of
from lacfast.steering import SteeringStats, steer

PROMPT_FILES = (".txt", ".jsonl", ".parquet")


def saved_model(source: str) -> str:
    """The directory to load for a run of `lacfast train` (its best checkpoint, else the last) or of the demo.

    Anything else stays what it is: a checkpoint, a pipeline's directory, a hub id.

    Raises:
        ValueError: for a run without a checkpoint.
    """
    path = Path(source)
    if (path / "checkpoints").is_dir():
        run = RunDirectory(path, keep_last=1)
        if run.best.is_dir():
            return str(run.best)
        checkpoints = run.checkpoints()
        if not checkpoints:
            raise ValueError(f"the run {source} has no checkpoint yet; train it, or pass a saved model")
        return str(checkpoints[-1])
    trained = path / "trained"
    return str(trained) if trained.is_dir() else source


def trained_sampler(saved: str) -> SamplerConfig | None:
    """The sampler that a saved model or critic was trained with; None where no run.json above it tells."""
    path = Path(saved).absolute()
    for directory in (path, *path.parents[:3]):
        settings = directory / "run.json"
        if settings.is_file():
            stored = json.loads(settings.read_text(encoding="utf-8"))
            return from_json(SamplerConfig, stored["train"]["sampler"])
    return None


def prompts_to_steer(prompts: Sequence[str], count: int) -> PromptSet:
    """The prompts of one source as `lacfast train` takes it, or the texts themselves.

    Args:
        prompts: a source or texts.
        count: how many, repeated as often as it takes; 0: each once.

    Raises:
        ValueError: for no prompt, or a file that does not exist.
    """
    first = prompts[0] if prompts else ""
    is_source = first in PROMPT_SOURCES or (first and Path(first).exists()) or first.endswith(PROMPT_FILES)
    if is_source and len(prompts) > 1:
        raise ValueError(f"--prompts takes one source or texts, not {first!r} and {len(prompts) - 1} more")
    found = prompts_of(first) if is_source else PromptSet.create(list(prompts))
    return found.cycle(count) if count else found


def steer_model(
    source: str,
    *,
    prompts: Sequence[str],
    config: SteeringConfig,
    sampler: SamplerConfig,
    critic: str,
    rewards: Sequence[str],
    gold: Sequence[str],
    samples: int,
    device: str,
    dtype: str,
    out: Path,
) -> SteeringStats:
    """Steered images of a saved model; arguments as those of `lacfast steer`.

    Raises:
        ValueError: for settings that cannot work, before the model is loaded where that can be told.
    """
    chosen = prompts_to_steer(prompts, samples)
    scorer, gold_scorer = (RewardSet.create(list(names)) if names else None for names in (rewards, gold))
    if config.selection == "reward" and scorer is None:
        raise ValueError("--selection reward has no reward to select by; name it with --rewards")
    model = saved_model(source)
    if sampler == SamplerConfig():
        sampler = trained_sampler(critic or model) or sampler
    try:
        (out / "images").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        remedy = "choose a directory that you may write to"
        raise ValueError(f"cannot write to --out {out}: {error.strerror}; {remedy}") from error
    backbone = load_backbone(
        model,
        critic_file=critic or None,
        device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
        dtype=None if dtype == "float32" else getattr(torch, dtype),
    )
    images, stats = steer(
        backbone,
        chosen,
        config,
        sampler=sampler,
        rewards=scorer,
        gold=gold_scorer,
    )
    settings = {"model": model, "critic": critic, "sampler": to_json(sampler), "steering": to_json(config)}
    _write(out, images.cpu(), chosen, stats, settings)
    return stats


def _write(
    out: Path, images: Tensor, prompts: PromptSet, stats: SteeringStats, settings: dict[str, Any]
) -> None:
    """images/00000.png and so on, samples.png, and statistics.json with a row per image."""
    scale = max(1, 96 // images.shape[-1])
    grid(images[:SAMPLE_IMAGES], scale=scale).save(out / "samples.png")
    rows = []
    for index, text in enumerate(prompts.texts):
        name = f"images/{index:05d}.png"
        to_image(images[index]).save(out / name)
        values = stats.values[:, index].tolist()
        scores = {reward: float(score[index]) for reward, score in (stats.rewards | stats.gold).items()}
        rows.append({"file": name, "prompt": text, "values": values, "scores": scores})
    statistics = settings | summary(stats) | {"images": rows}
    (out / "statistics.json").write_text(json.dumps(statistics, indent=2) + "\n", encoding="utf-8")


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
