"""Climb: how far the reward rises along the expected gradient of every baseline, noise level by noise level.

A baseline that depends on the state leaves PPO's expected gradient as it is. Not so that of a loss on the
forward process: E[target | x] is the old policy's output only where samples are of the model's own
distribution, and a baseline V(x) weighs the difference. So less noise (module
gradient_noise) may mean less of what helps. Here the weights move by a small length along the gradient, a
mean over some thousand trajectories, and the reward on other prompts is judged with the same noise.

    python -m bench.learning.gradient_climb                     DiT, ten minutes
    python -m bench.learning.gradient_climb --smoke --out FILE  does it run

The measurement is kept in bench/results/learning/climb; docs/results.md has the table.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.learning import gradient_noise, page, units
from bench.learning.gradient_noise import FULL, LEARNING, MEASURED_IDS, SMOKE, Scale
from bench.learning.problems import Materials
from lacfast.learning.batches import PolicySource
from lacfast.learning.step_tables import step_tables
from lacfast.records import Advantages, Rollout
from lacfast.trainer import LatentActorCriticTrainer

LENGTH = 1.5e-3
"""Of a move, in units of the norm of all weights: small, and yet the reward moves by many standard errors."""
PAIRS = 64
"""Pairs of a forward and backward."""
JUDGED = 2_048
"""Images of a judgement."""
Gradient = list[Tensor]
"""One tensor per weight of the policy."""


@dataclass(frozen=True)
class Rise:
    """Change of the mean reward, on the same prompts with the same noise."""

    mean: float
    error: float
    """Standard error, from the spread of the differences over the images."""


def measure(trainer: LatentActorCriticTrainer, scale: Scale, judged: int) -> dict[str, Any]:
    """Rises along the gradient of every baseline, after value pretraining.

    Args:
        trainer: with a critic and a loss on the forward process, at its first weights.
        scale: of pretraining and of the rollout whose gradients are taken.
        judged: images of a judgement.

    Returns:
        "rise": baseline -> the trained steps one by one, and at last all together; "reward": before any move.
    """
    trainer.pretrain_critic()
    rollout = trainer.collect(gradient_noise.measured_prompts(trainer, scale), MEASURED_IDS)
    assert rollout is not None
    given = gradient_noise.advantages(trainer, rollout, scale)
    group, critic = f"{scale.group} of the prompt", gradient_noise.REFERENCE
    before = _rewards(trainer, judged)
    found: dict[str, list[Rise]] = {}
    gradients = {name: _gradients(trainer, rollout, given[name]) for name in (group, critic)}
    # The gradient is linear in the advantages: what the critic's value takes away from it.
    gradients["value"] = [_sum([one, other], (1, -1)) for one, other in zip(*gradients.values(), strict=True)]
    for name, of_steps in gradients.items():
        tried = [*of_steps, _sum(of_steps, (1,) * len(of_steps))]
        found[name] = [_rise(trainer, gradient, before, judged) for gradient in tried]
    return {
        "rise": {name: [asdict(rise) for rise in rises] for name, rises in found.items()},
        "reward": float(before.mean()),
        "trajectories": rollout.batch_size,
        "judged": judged,
    }


def _gradients(trainer: LatentActorCriticTrainer, rollout: Rollout, given: Tensor) -> list[Gradient]:
    """Of each trained step the gradient of the mean loss with advantages (K, B) `given`."""
    update = trainer.learner.policy_update
    tables = step_tables(rollout.table, trainer.config.ppo, rollout.latents, forward=True)
    update.prepare(tables)
    steps, none = torch.tensor(rollout.trained_steps), torch.zeros(rollout.batch_size, 1)
    source = PolicySource(
        rollout, Advantages(steps, given.contiguous(), none, given.unsqueeze(-1)), tables.timesteps
    )
    found = []
    for position in range(len(steps)):
        update.begin()
        for pairs in source.pairs.select(source.pairs.position == position).split(PAIRS):
            update.gradient(source.batch(pairs, torch.tensor(len(pairs) / rollout.batch_size)))
        found.append([_gradient_of(weight) for weight in trainer.backbone.policy_parameters()])
    update.begin()
    return found


def _gradient_of(weight: Tensor) -> Tensor:
    return torch.zeros_like(weight) if weight.grad is None else weight.grad.clone()


def _sum(gradients: Sequence[Gradient], signs: Sequence[int]) -> Gradient:
    return [
        torch.stack([sign * part for sign, part in zip(signs, parts, strict=True)]).sum(dim=0)
        for parts in zip(*gradients, strict=True)
    ]


def _rise(trainer: LatentActorCriticTrainer, gradient: Gradient, before: Tensor, judged: int) -> Rise:
    with moved(trainer.backbone.policy_parameters(), gradient):
        change = _rewards(trainer, judged) - before
    return Rise(float(change.mean()), float(change.std()) / len(change) ** 0.5)


@contextmanager
def moved(weights: Sequence[Tensor], gradient: Gradient) -> Iterator[None]:
    """Within the context the weights are moved by LENGTH of their norm against the gradient of a loss."""
    length = LENGTH * _norm(weights) / _norm(gradient)
    kept = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for weight, part in zip(weights, gradient, strict=True):
            weight.sub_(length * part)
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, own in zip(weights, kept, strict=True):
                weight.copy_(own)


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(tensor.detach().double().square().sum()) for tensor in tensors))


def _rewards(trainer: LatentActorCriticTrainer, judged: int) -> Tensor:
    """(judged,) reward on the held-out prompts of the trainer, of its weights as they are."""
    scores = trainer.evaluate(samples=judged).rewards
    return scores[trainer.rewards.names[0]].double()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problem", choices=gradient_noise.OF_ONE_REWARD, default="shapes")
    parser.add_argument("--backbone", choices=("dit", "unet"), default="dit")
    parser.add_argument("--materials", type=Path, default=Path("runs/learning"), help="base models")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--smoke", action="store_true", help="tiny rollouts: does it run")
    parser.add_argument("--out", type=Path, help="file without .json; default: climb/PROBLEM-BACKBONE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    scale, judged = (SMOKE, 8) if options.smoke else (replace(FULL, prompts=100), JUDGED)
    study = options.out or LEARNING / "climb" / f"{options.problem}-{options.backbone}"
    run(Materials(options.materials), options.problem, options.backbone, options.seeds, scale, judged, study)
    page.write(LEARNING)


def run(
    materials: Materials,
    problem: str,
    backbone: str,
    seeds: Sequence[int],
    scale: Scale,
    judged: int,
    study: Path,
) -> None:
    """Measure what the study does not hold yet."""
    settings = {"problem": problem, "backbone": backbone, "scale": asdict(scale), "length": LENGTH}
    units.require_settings(study, settings | {"judged": judged})
    for seed in seeds:

        def work(seed: int = seed) -> dict[str, Any]:
            trainer = gradient_noise.trainer_of(
                materials, problem, backbone, scale, seed, "nft", ema_decay=0.0
            )
            return measure(trainer, scale, judged) | {"seed": seed}

        unit = units.done(study, f"seed{seed}", work)
        if unit is not None:
            last = {name: f"{rises[-1]['mean']:+.3f}" for name, rises in unit["rise"].items()}
            print(f"{study.name}/seed{seed}: all steps {last}", flush=True)


if __name__ == "__main__":
    main()
