"""How large the claims are run: on two cores in about an hour per backbone, or on a GPU with larger models.

A scale changes sizes and budgets and nothing of what is compared. The GPU's recipes and budgets are
estimates: none has been run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from bench.learning.claims import Claim
from bench.learning.dual_encoder import STEPS
from bench.learning.problems import PROBLEMS, Materials, Problem
from bench.learning.runs import Arm
from lacfast.config import PPO, Ratio, TrainConfig
from lacfast.tasks import crowds, glyphs, scenes
from lacfast.tasks.models import SMALL, TINY, BackboneName, ModelSize
from lacfast.tasks.pretraining import PretrainConfig
from lacfast.tasks.task import BASE_SIZE, Task

SIZED: dict[str, Callable[[int], Task]] = {
    "shapes": scenes.task,
    "glyphs": glyphs.task,
    "crowds": crowds.task,
}
"""Tasks by their name at scale 1."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Sizes and budgets of all claims."""

    model: ModelSize = TINY
    recipes: dict[BackboneName, PretrainConfig] = field(default_factory=dict)
    """Recipes of the base models; a backbone that is not here has the tiny one's."""
    encoder_steps: int = STEPS
    """Optimizer steps of the dual encoders."""
    batch: float = 1.0
    """Trajectories of a rollout, a multiple of the preset's."""
    images: float = 1.0
    """Images of a run, a multiple of the claim's."""
    seconds: float = 1.0
    """The same for its time."""
    samples: float = 1.0
    """Images per judgement, a multiple of the claim's."""
    seeds: float = 1.0
    """Paired seeds, a multiple of the claim's."""
    tunes: bool = True
    """Whether learning rates are tuned as the claim has it; False takes the middle one."""
    pretraining_iterations: int = 0
    """Iterations of value pretraining; 0: the preset's."""

    def materials(self, folder: Path, device: str) -> Materials:
        return Materials(folder, self.model, self.recipes, device, self.encoder_steps)

    def task(self, task: Task) -> Task:
        """The task with pictures larger by as much as the model's are than BASE_SIZE."""
        return SIZED[task.name](self.model.image_size // BASE_SIZE)

    def problem(self, problem: Problem) -> Problem:
        return replace(problem, task=self.task(problem.task))

    def claim(self, claim: Claim) -> Claim:
        """The claim with this scale's arms, budgets, seeds and tuning."""

        def arms(backbone: BackboneName) -> dict[str, Arm]:
            made, side = claim.arms(backbone), self.task(PROBLEMS[claim.problem].task).image_size
            return {name: replace(arm, config=self.config(arm.config, side)) for name, arm in made.items()}

        budgets = {
            backbone: replace(
                budget,
                images=round(self.images * budget.images),
                seconds=self.seconds * budget.seconds,
                judged_every=round(self.images * budget.judged_every),
                samples=round(self.samples * budget.samples),
            )
            for backbone, budget in claim.budgets.items()
        }
        tuning = claim.tuning if self.tunes else claim.tuning.untuned()
        return replace(
            claim, arms=arms, budgets=budgets, seeds=max(round(self.seeds * claim.seeds), 1), tuning=tuning
        )

    def config(self, config: TrainConfig, image_size: int) -> TrainConfig:
        """Rollouts of this scale, whole groups, and a clip at as many deviations of the log ratio."""
        group = config.samples_per_prompt
        batch = max(round(self.batch * config.batch_size / group), 1) * group
        pretrain = config.pretrain
        if self.pretraining_iterations and config.critic.trunk != "none":
            count = self.pretraining_iterations
            pretrain = replace(pretrain, iterations=count, patience=count, held_out_samples=2 * batch)
        # A log ratio is a mean over N elements, so it deviates by 1 / sqrt(N): by that of the picture's side.
        narrower = BASE_SIZE / image_size
        ppo, has_ratio = config.ppo, isinstance(config.objective, PPO)
        if has_ratio and isinstance(ppo.clip, Ratio) and isinstance(ppo.clip.clip_range, float):
            ppo = replace(ppo, clip=Ratio(ppo.clip.clip_range * narrower))
        if ppo.critic_minibatches:
            states = batch * config.sampler.num_steps
            ppo = replace(ppo, critic_minibatches=min(ppo.critic_minibatches, states))
        return replace(config, batch_size=batch, pretrain=pretrain, ppo=ppo)


SCALES = {
    "cpu": Scale(),
    "gpu": Scale(
        model=SMALL,
        recipes={
            "dit": PretrainConfig(steps=2_500, batch_size=256, learning_rate=2e-3, warmup_steps=100),
            "unet": PretrainConfig(steps=2_000, batch_size=256, learning_rate=1e-3, warmup_steps=100),
        },
        batch=4.0,
        images=6.0,
        samples=2.0,
        seeds=2.0,
    ),
    "rehearsal": Scale(
        model=ModelSize(image_size=64, num_layers=2, num_heads=2, channels=(16, 32)),
        recipes={"dit": PretrainConfig(steps=2, batch_size=8), "unet": PretrainConfig(steps=2, batch_size=8)},
        encoder_steps=2,
        batch=1 / 12,
        images=1 / 150,
        seconds=0.0,
        samples=1 / 40,
        seeds=0.0,
        tunes=False,
        pretraining_iterations=1,
    ),
}
"""Name of --scale -> scale. "rehearsal" does what "gpu" does, in seconds on a CPU, and learns nothing."""
