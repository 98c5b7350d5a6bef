"""A saved model as evaluate and steer take it: where it lies, and what the settings of its run say of it."""

from __future__ import annotations

from pathlib import Path

import torch

from lacfast.config import AdvantageConfig, SamplerConfig, from_json
from lacfast.rewards.heads import RewardHeads
from lacfast.rewards.names import server
from lacfast.runs.directory import RunDirectory, settings_above
from lacfast.runtime.directories import recover

LEVELS = 3
"""How far above a saved model or critic the settings of its run may lie."""


def saved_model(source: str) -> str:
    """The directory to load for a run of `lacfast train` (its best checkpoint, else the last) or of the demo.

    Anything else stays what it is: a checkpoint, a pipeline's directory, a hub id.

    Raises:
        ValueError: for a run without a checkpoint.
    """
    path = Path(source)
    if (path / "checkpoints").is_dir():
        run = RunDirectory(path, keep_last=1)
        if not run.best.exists():
            recover(run.best)
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
    stored = settings_above(Path(saved), LEVELS)
    return None if stored is None else from_json(SamplerConfig, stored["train"]["sampler"])


def evaluation_sampler(saved: str) -> SamplerConfig | None:
    """The sampler of a saved model's evaluations in its run; None where no run.json above it tells."""
    stored = settings_above(Path(saved), LEVELS)
    if stored is None:
        return None
    own = stored["train"].get("eval_sampler")
    return from_json(SamplerConfig, stored["train"]["sampler"] if own is None else own)


def trained_heads(saved: str) -> RewardHeads | None:
    """What a critic predicts whose file does not say it; None where no run.json above it tells."""
    stored = settings_above(Path(saved), LEVELS)
    if stored is None or "rewards" not in stored:
        return None
    names, weights = zip(*stored["rewards"], strict=True)
    advantages = from_json(AdvantageConfig, stored["train"].get("advantages", {}))
    servers = [server(name) for name in names]
    # "package.module:callable" is called by its last part.
    called = [
        name.rpartition(":")[2] if found is None else found.name
        for name, found in zip(names, servers, strict=True)
    ]
    return RewardHeads.create(called, torch.tensor(weights), advantages)
