"""What a trained model makes of three times the compute per image.

Its critic chooses among trajectories, the chain is longer, or the true reward chooses, which costs calls of
the reward for every image that is delivered.
"""

from __future__ import annotations

from dataclasses import replace

from lacfast.config import SamplerConfig, SteeringConfig
from lacfast.config.sampling import Fixed
from lacfast.metrics import diversity
from lacfast.steering import steer
from lacfast.trainer import LatentActorCriticTrainer

TIMES = 3
"""Compute of a plain image that an image may cost, but for the critic's last look."""
STEERED = "steered by the critic"
BEST = f"best of {TIMES} by the reward"
Use = tuple[SteeringConfig, SamplerConfig]


def uses(sampler: SamplerConfig, *, has_critic: bool) -> dict[str, Use]:
    """Name -> how an image is made: plain ones, and those that cost TIMES as much; all with the training's
    noise, and by the ODE.

    Args:
        sampler: of the training; its window is fixed.
        has_critic: whether there is one that steers.
    """
    window = sampler.window
    assert isinstance(window, Fixed), "steps that move are the training's, and no sampler's"
    wider = Fixed((TIMES * window.steps[0], TIMES * window.steps[1]))
    noisy = sampler, replace(sampler, num_steps=TIMES * sampler.num_steps, window=wider)
    ode = SamplerConfig(kind="ode", num_steps=sampler.num_steps, noise_level=0.0)
    samplers = {"": noisy, ", ODE": (ode, replace(ode, num_steps=TIMES * ode.num_steps))}
    single = SteeringConfig(method="best_of_n", particles=1, selection="reward")
    found = {}
    for how, (same, longer) in samplers.items():
        found["one image" + how] = single, same
        found[f"{TIMES} times the steps{how}"] = single, longer
        if has_critic:
            found[STEERED + how] = SteeringConfig(), same
        found[BEST + how] = replace(single, particles=TIMES), same
    return found


def measured(trainer: LatentActorCriticTrainer, samples: int) -> dict[str, dict[str, float]]:
    """Use -> scores of held-out prompts, "diversity", and per image "nfe" and "reward_calls".

    Args:
        trainer: at the end of a run.
        samples: images of each use.
    """
    prompts, (rewards, judges) = trainer.held_out.cycle(samples), trainer.scorers
    found = {}
    with trainer.averaged():
        for name, (config, sampler) in uses(
            trainer.config.sampler, has_critic=trainer.critic is not None
        ).items():
            images, stats = steer(
                trainer.backbone,
                prompts,
                replace(config, seed=trainer.config.seed),
                sampler=sampler,
                rewards=rewards,
                gold=judges,
            )
            chosen_by_reward = config.selection == "reward" and config.particles > 1
            found[name] = {score: float(each.mean()) for score, each in (stats.rewards | stats.gold).items()}
            found[name] |= {
                "diversity": diversity(images.cpu(), prompts.texts),
                "nfe": stats.evaluations.per_image,
                "reward_calls": float(config.particles * chosen_by_reward),
            }
    return found
