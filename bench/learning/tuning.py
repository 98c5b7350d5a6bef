"""Tuning: the batch and the rate of every arm by successive halving, with as many images for each arm."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from bench.learning.runs import Arm

LEARNING_RATES = (0.25, 0.5, 1.0, 2.0)
"""Policy learning rates in units of the arm's own: the grid on which every arm is tuned alike."""
SURVIVORS = 1 / 4
"""Share of a round's settings that the next one tries (successive halving, arXiv 1502.07943)."""


@dataclass(frozen=True)
class Setting:
    """What is tuned of an arm."""

    batch_size: int
    """Images of a rollout, whole groups."""
    rate: float
    """Policy learning rate."""


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """Settings that every arm of a claim is tried with, on the tuning prompts."""

    rates: tuple[float, ...] = LEARNING_RATES
    """In units of the arm's own rate."""
    batches: tuple[float, ...] = (1.0,)
    """In units of the arm's own rollout."""
    rounds: tuple[float, ...] = (0.5,)
    """Share of the claim's images that a run of each round gets; none tunes nothing."""
    falls: bool = False
    """Whether the rate falls to 0 over a run; else it stays."""

    def settings(self, arm: Arm) -> list[Setting]:
        """What the first round tries."""
        config, group = arm.config, arm.config.samples_per_prompt
        return [
            Setting(
                max(round(share * config.batch_size / group), 1) * group,
                rate * config.ppo.policy_learning_rate,
            )
            for share in self.batches
            for rate in self.rates
        ]

    def keys(self, start: str, settings: Iterable[Setting], number: int) -> dict[str, Setting]:
        """Keys of a round's runs.

        Args:
            start: what the keys of the arm's runs begin with.
            settings: that the round tries.
            number: of the round, from 0.
        """
        kind = f"tuning/round{number + 1}" if len(self.rounds) > 1 else "tuning"
        sizes = len(self.batches) > 1
        return {
            f"{kind}/{start}" + (f"{setting.batch_size}-" if sizes else "") + f"{setting.rate:g}": setting
            for setting in settings
        }

    def survivors(self, count: int, number: int) -> int:
        """How many of a round's settings the round `number` tries; one is chosen after the last."""
        return 1 if number == len(self.rounds) else math.ceil(SURVIVORS * count)

    def applied(self, arm: Arm, setting: Setting, images: int) -> Arm:
        """The arm with a setting, for a run of so many images."""
        config = replace(arm.config, batch_size=setting.batch_size)
        ppo = replace(config.ppo, policy_learning_rate=setting.rate)
        if self.falls:
            ppo = replace(ppo, final_learning_rate=0.0)
            config = replace(config, iterations=math.ceil(images / setting.batch_size))
        return replace(arm, config=replace(config, ppo=ppo))

    def untuned(self) -> Tuning:
        """The middle of the rates, and each arm's own rollout."""
        middle = len(self.rates) // 2
        return replace(self, rates=self.rates[middle : middle + 1], batches=(1.0,), rounds=())

    def described(self, arms: Sequence[Arm]) -> str:
        """What the first round tries, in words."""
        tried = [setting for arm in arms for setting in self.settings(arm)]
        rates = ", ".join(f"{rate:g}" for rate in sorted({setting.rate for setting in tried}))
        if len(self.batches) == 1:
            return rates
        sizes = ", ".join(str(size) for size in sorted({setting.batch_size for setting in tried}))
        return f"{rates} and rollouts of {sizes} images"


RATES = Tuning()
"""Four rates, half of the images each."""
FIXED = Tuning(rates=(1.0,), rounds=())
"""Every arm as it is."""
