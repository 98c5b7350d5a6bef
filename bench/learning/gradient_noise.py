"""Noise of the policy's gradient under every baseline: how much there is, and what a baseline takes away.

At fixed weights each trajectory i and trained step k have a score s_ik, the gradient of the run's own loss
with advantage 1; the update's gradient is the mean of A_ik s_ik, by PPO or by DiffusionNFT. From the scores
of some thousand trajectories, kept as sketches that preserve inner products, follow for any advantages

    signal = |E g|^2,   noise = tr Cov g of one trajectory,   noise scale = noise / signal

without another pass: the noise scale is the number of trajectories at which a rollout's gradient is as much
signal as noise ("An Empirical Model of Large-Batch Training", arXiv 1812.06162).

    python -m bench.learning.gradient_noise                     both stages, DiT, a quarter of an hour a seed
    python -m bench.learning.gradient_noise --smoke --out FILE  does it run

Each measurement is kept in bench/results/learning/gradients, so the next call goes on; docs/results.md has
the table.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bench.learning import page, units
from bench.learning.arms import critic_weighted, latent_critic, pretrained_for
from bench.learning.problems import PROBLEMS, Materials, Prompts
from lacfast.config import TrainConfig
from lacfast.learning.batches import PolicySource
from lacfast.learning.step_tables import step_tables
from lacfast.prompts import PromptSet
from lacfast.records import Advantages, Rollout
from lacfast.rewards.heads import stack_rewards
from lacfast.tasks.models import BackboneName
from lacfast.trainer import LatentActorCriticTrainer

MEASURED_IDS = 1 << 45
"""First sample id of the trajectories that are measured; never the trainer's."""
SKETCH = 4096
"""Numbers that a gradient is kept as: an inner product deviates by 1 / sqrt(SKETCH) of the norms."""
REFERENCE = "critic"
"""Advantages whose expected gradient is the policy's, with little noise."""
LAMBDAS = (0.95, 0.5, 0.0)
"""Of GAE on the critic's values, beside 1, which is R - V."""
BLOCKS = 16
"""Parts of the trajectories, of which one after the other is left out for the error of a signal."""
OF_ONE_REWARD = [name for name, problem in PROBLEMS.items() if len(problem.rewards) == 1]
"""Problems that a gradient's noise is measured on."""
LEARNING = Path(__file__).resolve().parents[1] / "results" / "learning"


@dataclass(frozen=True)
class Scale:
    """How much is sampled; a study holds measurements of one scale."""

    prompts: int
    images_per_prompt: int
    group: int
    """Images of a prompt that a group baseline has, itself included."""
    batch_size: int
    """Trajectories per rollout of value pretraining and of PPO."""
    pretraining: int
    """Iterations of value pretraining."""
    stages: dict[str, int]
    """Name -> images of PPO before the measurement."""


PPO = "ppo"
OBJECTIVES: dict[str, Callable[[str], TrainConfig]] = {PPO: latent_critic, "nft": critic_weighted}
"""What the policy learns by -> its configuration with a critic."""

FULL = Scale(
    prompts=198,
    images_per_prompt=24,
    group=8,
    batch_size=192,
    pretraining=16,
    stages={"base": 0, "trained": 4_800},
)
SMOKE = Scale(
    prompts=2, images_per_prompt=4, group=2, batch_size=8, pretraining=1, stages={"base": 0, "trained": 8}
)


@dataclass(frozen=True)
class Noise:
    """Signal and noise of a gradient, in units of one trajectory's."""

    signal: float
    """|E g|^2, without bias: below 0 where nothing is seen of it."""
    error: float
    """Of the signal, by the jackknife over BLOCKS."""
    noise: float
    """tr Cov g of one trajectory."""
    alignment: float
    """Cosine between E g and that under R - V, which is the policy's gradient; without bias in its parts."""


def run(
    materials: Materials,
    problem: str,
    backbone: BackboneName,
    seeds: Sequence[int],
    scale: Scale,
    study: Path,
    *,
    objective: str = PPO,
    deadline: float = math.inf,
) -> None:
    """Measure what the study does not hold yet; begin nothing after the deadline."""
    stages = scale.stages
    settings = {"problem": problem, "backbone": backbone, "scale": asdict(scale)}
    if objective != PPO:
        # A loss on the forward process is linear in the advantage where the old policy is the policy.
        stages = {stage: images for stage, images in stages.items() if not images}
        settings |= {"objective": objective, "scale": asdict(replace(scale, stages=stages))}
    units.require_settings(study, settings)
    for seed in seeds:
        for stage, images in stages.items():
            if time.monotonic() > deadline:
                return

            def work(seed: int = seed, images: int = images) -> dict[str, Any]:
                return measure(
                    trainer_of(materials, problem, backbone, scale, seed, objective), scale, images
                ) | {"seed": seed}

            unit = units.done(study, f"{stage}-seed{seed}", work)
            if unit is not None:
                noise = {name: f"{steps[-1]['noise']:.3g}" for name, steps in unit["noise"].items()}
                print(f"{study.name}/{stage}-seed{seed}: noise {noise}", flush=True)


def trainer_of(
    materials: Materials,
    problem: str,
    backbone: BackboneName,
    scale: Scale,
    seed: int,
    objective: str = PPO,
    **changes: Any,
) -> LatentActorCriticTrainer:
    """A trainer of the base model, judged on the tuning prompts; `changes` are of its configuration."""
    found = PROBLEMS[problem]
    prompts = Prompts.of(found.task)
    preset = pretrained_for(OBJECTIVES[objective](backbone), scale.pretraining)
    return LatentActorCriticTrainer(
        materials.backbone(found.task, backbone),
        {materials.reward(name, found.task): weight for name, weight in found.rewards.items()},
        prompts.train,
        replace(preset, seed=seed, batch_size=scale.batch_size, **changes),
        held_out=prompts.tuning,
    )


def measure(trainer: LatentActorCriticTrainer, scale: Scale, images: int) -> dict[str, Any]:
    """Noise of every baseline after value pretraining and so many images of PPO.

    Returns:
        "noise": baseline -> the trained steps one by one, and at last all together; "variance": of the
        reward, over all trajectories and within a prompt.
    """
    trainer.pretrain_critic()
    start = trainer.images
    while trainer.images < start + images:
        trainer.train_iteration()
    rollout = trainer.collect(measured_prompts(trainer, scale), MEASURED_IDS)
    assert rollout is not None
    scores = sketched_scores(trainer, rollout)
    found = advantages(trainer, rollout, scale)
    rewards = _rewards(trainer, rollout).view(-1, scale.images_per_prompt)
    return {
        "noise": {
            name: [asdict(noise) for noise in _noises(scores, given, found[REFERENCE])]
            for name, given in found.items()
        },
        "variance": {"all": float(rewards.var()), "within prompt": float(rewards.var(dim=1).mean())},
        "trajectories": rollout.batch_size,
        "images": trainer.images,
    }


def measured_prompts(trainer: LatentActorCriticTrainer, scale: Scale) -> PromptSet:
    """The first prompts that train, each as often as the scale says, group by group."""
    chosen = trainer.prompts.take(range(min(scale.prompts, len(trainer.prompts))))
    return chosen.take([row for row in range(len(chosen)) for _ in range(scale.images_per_prompt)])


def sketched_scores(trainer: LatentActorCriticTrainer, rollout: Rollout) -> Tensor:
    """(K, B, SKETCH): of trained steps and trajectories, gradients of the update's loss at advantage 1."""
    update, one = trainer.learner.policy_update, torch.ones(())
    is_forward = rollout.forward_steps is not None
    tables = step_tables(rollout.table, trainer.config.ppo, rollout.latents, forward=is_forward)
    update.prepare(tables)
    steps = torch.tensor(rollout.trained_steps)
    ones, none = torch.ones(len(steps), rollout.batch_size), torch.zeros(rollout.batch_size, 1)
    source = PolicySource(rollout, Advantages(steps, ones, none, ones.unsqueeze(-1)), tables.timesteps)
    found = torch.empty(len(steps), rollout.batch_size, SKETCH)
    for pair in source.pairs.split(1):
        update.begin()
        update.gradient(source.batch(pair, one))
        gradients = [weight.grad for weight in trainer.backbone.policy_parameters()]
        found[pair.position, pair.rows] = sketch([grad for grad in gradients if grad is not None])
    update.begin()
    return found


def sketch(gradients: Sequence[Tensor]) -> Tensor:
    """(SKETCH,): sums of the gradients' numbers under random signs, the same in every call."""
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    flat = functional.pad(flat, (0, -len(flat) % SKETCH))
    return (flat * _signs(len(flat))).view(-1, SKETCH).sum(dim=0)


@cache
def _signs(count: int) -> Tensor:
    return torch.randint(2, (count,), generator=torch.Generator().manual_seed(0)).float() * 2 - 1


def advantages(trainer: LatentActorCriticTrainer, rollout: Rollout, scale: Scale) -> dict[str, Tensor]:
    """Baseline -> advantages (K, B) of the standardised reward. PPO's E g is the same under all but GAE's."""
    rewards = _rewards(trainer, rollout)
    steps = torch.tensor(rollout.trained_steps)
    values = rollout.values[steps, :, 0].to(rewards)
    count = len(steps)

    def left_out(groups: int) -> Tensor:
        parts = rewards.view(-1, groups)
        others = (parts.sum(dim=1, keepdim=True) - parts) / (groups - 1)
        return (parts - others).flatten().expand(count, -1)

    found = {
        "nothing": rewards.expand(count, -1),
        "rollout": left_out(len(rewards)),
        f"{scale.group} of the prompt": left_out(scale.group),
        f"{scale.images_per_prompt} of the prompt": left_out(scale.images_per_prompt),
        "critic": rewards - values,
        "critic at the first step": (rewards - values[0]).expand(count, -1),
    }
    following = torch.cat([values[1:], rewards[None]])
    if rollout.forward_steps is not None:
        # States that are noised anew do not follow one another.
        return found
    for decay in LAMBDAS:
        advantage, made = torch.zeros_like(rewards), []
        for step in reversed(range(count)):
            advantage = following[step] - values[step] + decay * advantage
            made.append(advantage)
        found[f"critic, lambda {decay:g}"] = torch.stack(made[::-1])
    return found


def _rewards(trainer: LatentActorCriticTrainer, rollout: Rollout) -> Tensor:
    """(B,) in the units of the critic's values."""
    normalizer = trainer.normalizer
    rewards = normalizer.head_rewards(stack_rewards(rollout))[:, 0]
    return (rewards - normalizer.mean[0].to(rewards)) / normalizer.std[0].to(rewards)


def _noises(scores: Tensor, given: Tensor, unbiased: Tensor) -> Iterator[Noise]:
    """Of each trained step, then of all together."""
    weighted, reference = (scores * each.unsqueeze(-1) for each in (given, unbiased))
    yield from (noise_of(*pair) for pair in zip(weighted, reference, strict=True))
    yield noise_of(weighted.sum(dim=0), reference.sum(dim=0))


def noise_of(gradients: Tensor, reference: Tensor) -> Noise:
    """Signal and noise of B trajectories' gradients (B, S), aligned with others' (B, S).

    signal = ( |sum_i g_i|^2 - sum_i |g_i|^2 ) / (B (B - 1)),   noise = mean_i |g_i|^2 - signal
    """
    signals = _inner(gradients, gradients)
    signal, without = float(signals[0]), signals[1:]
    squares = signal * float(_inner(reference, reference)[0])
    alignment = float(_inner(gradients, reference)[0]) / math.sqrt(squares) if squares > 0 else math.nan
    return Noise(
        signal=signal,
        error=float(((len(without) - 1) * without.var(correction=0)).sqrt()),
        noise=float(gradients.double().square().sum()) / len(gradients) - signal,
        alignment=alignment,
    )


def _inner(first: Tensor, second: Tensor) -> Tensor:
    """E f . E s without bias, of all trajectories and then without each block, (1 + BLOCKS,) float64."""
    count = torch.full((BLOCKS + 1,), float(len(first)), dtype=torch.float64)
    parts = [each.double().tensor_split(BLOCKS) for each in (first, second)]
    sums = [torch.stack([part.sum(dim=0) for part in each]) for each in parts]
    alone = torch.stack([(one * other).sum() for one, other in zip(*parts, strict=True)])
    count[1:] -= torch.tensor([len(part) for part in parts[0]])
    left = [torch.cat([each.sum(dim=0, keepdim=True), each.sum(dim=0) - each]) for each in sums]
    # Products of one trajectory with itself are noise.
    own = torch.cat([alone.sum()[None], alone.sum() - alone])
    return ((left[0] * left[1]).sum(dim=1) - own) / (count * (count - 1))


def _name(options: argparse.Namespace) -> str:
    objective = "" if options.objective == PPO else f"-{options.objective}"
    return f"{options.problem}-{options.backbone}{objective}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problem", choices=OF_ONE_REWARD, default="shapes")
    parser.add_argument("--backbone", choices=("dit", "unet"), default="dit")
    parser.add_argument("--objective", choices=tuple(OBJECTIVES), default=PPO, help="of the policy")
    parser.add_argument("--materials", type=Path, default=Path("runs/learning"), help="base models")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--smoke", action="store_true", help="tiny rollouts: does it run")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin nothing after these")
    parser.add_argument(
        "--out", type=Path, help="file without .json; default: gradients/PROBLEM-BACKBONE[-OBJECTIVE]"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    run(
        Materials(options.materials),
        options.problem,
        options.backbone,
        options.seeds,
        SMOKE if options.smoke else FULL,
        options.out or LEARNING / "gradients" / _name(options),
        objective=options.objective,
        deadline=time.monotonic() + 60 * options.minutes,
    )
    page.write(LEARNING)


if __name__ == "__main__":
    main()
