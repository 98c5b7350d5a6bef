"""What a run logs: one JSON object per line, and the per-step diagnostics that go into it."""

from __future__ import annotations

import importlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lacfast.distributed.world import Traffic
from lacfast.records import Advantages, Evaluation, Rollout
from lacfast.rewards.normalizer import RewardNormalizer
from lacfast.runtime.files import needing_space, writing_to
from lacfast.runtime.graph import GraphRunner
from lacfast.runtime.profiling import span
from lacfast.transfer import to_like


class MetricsLog:
    """Appends to a JSONL file, line by line so that a killed run keeps what it logged."""

    def __init__(self, path: Path | None, trackers: Sequence[Tracker] = ()) -> None:
        """`path` None keeps no file; `trackers` get the numbers besides.

        Raises:
            ValueError: when the file cannot be written.
        """
        self.trackers = tuple(trackers)
        self.pretrained = 0
        """Iterations of value pretraining, after which trackers count those of training: steps rise."""
        self._path = path
        if path is not None:
            with writing_to(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                _drop_cut_line(path)

    def write(self, phase: str, iteration: int, **values: Any) -> None:
        """Log an entry.

        Raises:
            OSError: when the disk is full.
        """
        step = iteration if phase == "value_pretraining" else self.pretrained + iteration
        for tracker in self.trackers:
            tracker.numbers(step, curve_points(phase, values))
        if self._path is not None:
            entry = {"phase": phase, "iteration": iteration, **values}
            with needing_space(self._path), self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry, default=_plain) + "\n")

    def picture(self, iteration: int, name: str, image: Image.Image) -> None:
        """Show an iteration's picture where there are services."""
        for tracker in self.trackers:
            tracker.picture(self.pretrained + iteration, name, image)

    def close(self) -> None:
        for tracker in self.trackers:
            tracker.close()


def _drop_cut_line(path: Path) -> None:
    """A kill may cut the last line; the next one would be joined to it, and both be lost."""
    with path.open("a+b") as file:
        file.seek(0)
        written = file.read()
        whole = written.rfind(b"\n") + 1
        if whole < len(written):
            file.truncate(whole)


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    raise TypeError(f"cannot log a {type(value).__name__}")


def rollout_metrics(
    rollout: Rollout, advantages: Advantages, normalizer: RewardNormalizer, variance: Tensor | None
) -> dict[str, Any]:
    """Rewards per head; values and explained variance per denoising step (T,), advantages too where trained.

    Row k is step k whichever steps an iteration trains: those of a window that moves, NaN elsewhere.
    `variance` (T, M) is the rollout's explained variance, None without a critic.
    """
    steps, num_steps = advantages.steps, rollout.table.num_steps
    metrics: dict[str, Any] = {
        f"reward/{name}": float(rewards.mean()) for name, rewards in rollout.rewards.items()
    } | {f"reward_std/{name}": float(rewards.std()) for name, rewards in rollout.rewards.items()}
    metrics |= advantages.metrics
    metrics["advantage_mean"] = _at_steps(advantages.raw.mean(dim=(1, 2)), steps, num_steps)
    metrics["advantage_std"] = _at_steps(advantages.raw.std(dim=(1, 2)), steps, num_steps)
    heads = advantages.raw.shape[-1]
    if heads > 1:
        metrics["advantage_correlation"] = torch.corrcoef(advantages.raw.flatten(0, 1).T)
    if variance is None:
        return metrics
    values = rollout.values
    returns = normalizer.standardized(rollout).expand_as(values)
    metrics["value_mean"] = values.mean(dim=(1, 2))
    metrics["value_std"] = values.std(dim=1).mean(dim=-1)
    metrics["explained_variance"] = variance.mean(dim=-1)
    metrics["value_slope"] = _slope(returns, values).mean(dim=-1)
    raw_errors = (returns - values)[steps] * to_like(normalizer.std, values)
    metrics["value_loss_raw"] = raw_errors.square().mean()
    if heads > 1:
        names = list(rollout.rewards) if normalizer.heads is None else normalizer.heads.names
        losses = (values[steps] - advantages.targets).square().mean(dim=(0, 1))
        for head, name in enumerate(names):
            metrics[f"value_loss/{name}"] = losses[head]
            metrics[f"explained_variance/{name}"] = variance[:, head]
            deviations = advantages.raw[..., head].std(dim=1)
            metrics[f"advantage_std/{name}"] = _at_steps(deviations, steps, num_steps)
    return metrics


def on_host(metrics: dict[str, Any]) -> dict[str, Any]:
    """Metrics whose tensors are on the host, read from the device all at once; a tensor () is a number."""
    tensors = {name: value for name, value in metrics.items() if isinstance(value, Tensor)}
    there = [value for value in tensors.values() if value.device.type != "cpu"]
    if there:
        with span("sync"):
            flat = torch.cat([value.double().flatten() for value in there]).cpu()
        parts = iter(torch.split(flat, [value.numel() for value in there]))
        tensors = {
            name: value if value.device.type == "cpu" else next(parts).view(value.shape).to(value.dtype)
            for name, value in tensors.items()
        }
    return metrics | {name: value if value.ndim else value.item() for name, value in tensors.items()}


def _at_steps(trained: Tensor, steps: Tensor, num_steps: int) -> Tensor:
    """(T,) of the numbers (K,) of the trained steps (K,), NaN at the others."""
    return trained.new_full((num_steps,), math.nan).index_copy(0, steps, trained)


def _slope(returns: Tensor, values: Tensor) -> Tensor:
    """Regression slope (K, M) of returns (K, B, M) on values: 1 is calibrated, below 1 overconfident."""
    centred = values - values.mean(dim=1, keepdim=True)
    return (centred * returns).sum(dim=1) / centred.square().sum(dim=1).clamp(min=1e-12)


def evaluation_metrics(evaluation: Evaluation) -> dict[str, Any]:
    """Means and their standard errors, explained variance per step, calibration per head, and diversity."""
    errors = evaluation.standard_errors()
    return {
        "explained_variance": evaluation.explained_variance.mean(dim=-1),
        "diversity": diversity(evaluation.images, evaluation.prompts),
        **evaluation.means(),
        **{f"standard_error/{name}": error for name, error in errors.items()},
        **{f"calibration/{name}": bins for name, bins in evaluation.calibration.items()},
    }


def diversity(images: Tensor, prompts: Sequence[str]) -> float:
    """Mean root mean square distance of two images (B, ...) of one prompt; NaN where none has two."""
    rows: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(row)
    flat = images.flatten(1)
    distances = [
        torch.nn.functional.pdist(flat[members]) / flat.shape[1] ** 0.5
        for members in rows.values()
        if len(members) > 1
    ]
    return float(torch.cat(distances).mean()) if distances else math.nan


def graph_metrics(runner: GraphRunner) -> dict[str, Any]:
    """Totals of a run, {} without graphs: one that goes on rising means that something captures again."""
    found = runner.statistics
    totals = {
        "graph_captures": found.captures,
        "graph_fallbacks": found.fallbacks,
        "graph_bytes": found.graph_bytes,
    }
    return totals if runner.captures else {}


def compiled_graphs() -> int:
    """Graphs that torch.compile has made in this process so far, whoever asked; still after warm-up."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


class IterationMeter:
    """What an iteration takes, beside what it learns: seconds, bytes to other ranks, graphs."""

    def __init__(self, graphs: GraphRunner, traffic: Traffic, *, compiles: bool) -> None:
        """Made where the iteration begins; `compiles`: count what torch.compile makes."""
        self._graphs = graphs
        self._traffic = traffic
        self._compiled = compiled_graphs() if compiles else None
        self._sent = traffic.num_bytes
        self._start = self._scored = time.perf_counter()

    def end_rollout(self) -> None:
        """Note that the rollout has its rewards."""
        self._scored = time.perf_counter()

    def metrics(self) -> dict[str, Any]:
        """Seconds of rollout and update, bytes that this rank has sent, graphs and recompilations."""
        found = graph_metrics(self._graphs) | self._traffic.metrics(self._sent)
        if self._compiled is not None:
            found["recompiles"] = compiled_graphs() - self._compiled
        seconds = {
            "seconds_rollout": self._scored - self._start,
            "seconds_update": time.perf_counter() - self._scored,
        }
        return found | seconds


class Tracker(Protocol):
    """One service that plots runs. Steps never fall, also where a run goes on from a checkpoint."""

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Curves' next points, by name."""

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        """A grid of samples."""

    def close(self) -> None:
        """Flush what is pending."""


class TensorBoardTracker:
    """Event files in a directory, for `tensorboard --logdir`."""

    def __init__(self, directory: Path) -> None:
        """
        Raises:
            ValueError: when TensorBoard is not installed.
        """
        _require("tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self._open = partial(SummaryWriter, str(directory))
        self._writer: Any = None

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        writer = self._writer_from(step)
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        pixels = np.asarray(image.convert("RGB"))
        self._writer_from(step).add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _writer_from(self, step: int) -> Any:
        if self._writer is None:
            # What a run that was killed had logged of this step and later ones, is no longer shown.
            self._writer = self._open(purge_step=step)
        return self._writer


class WandbTracker:
    """A run of Weights & Biases; offline when its own settings say so."""

    def __init__(
        self, project: str, directory: Path, config: Mapping[str, Any], *, run_id: str | None = None
    ) -> None:
        """
        Args:
            project: of the run.
            directory: for the service's own files.
            config: is shown beside the run.
            run_id: goes on with the run of that id where there is one. None: a new run.

        Raises:
            ValueError: when wandb is not installed.
        """
        self._wandb = _require("wandb")
        self._run: Any = self._wandb.init(
            project=project, dir=str(directory), config=dict(config), id=run_id, resume="allow"
        )

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        self._run.log({name: self._wandb.Image(image)}, step=step)

    def close(self) -> None:
        self._run.finish()


def curve_points(phase: str, values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of one log line, "phase/name"; a vector over the steps: "phase/name/03"."""
    points: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Tensor) and value.ndim == 1:
            points |= {f"{phase}/{name}/{step:02d}": number for step, number in enumerate(value.tolist())}
        elif isinstance(value, bool | int | float) and name != "iteration":
            points[f"{phase}/{name}"] = float(value)
    return points


def _require(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(f"{package} is not installed: pip install 'lacfast[{package}]'") from error
