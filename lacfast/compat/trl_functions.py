"""TRL's reward and prompt functions as the trainer's rewards and prompts."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lacfast.compat.trl_config import DDPOConfig
from lacfast.prompts import PromptSet
from lacfast.seeds import derived_seed

RewardFunction = Callable[[Tensor, tuple[str, ...], tuple[Any, ...]], tuple[Any, Any]]
"""(images (B, 3, H, W) in [0, 1], prompts, metadata) -> (rewards (B,), anything for the hook)."""


Judged = tuple[tuple[Tensor, ...], tuple[Any, ...]]
"""Rewards (B,) and reward metadata of every batch."""


class BatchedReward:
    """TRL's reward as ours: in sample batches, which are kept for the hook."""

    def __init__(
        self, config: DDPOConfig, function: RewardFunction, compute: Callable[[list[list[Any]], bool], Judged]
    ) -> None:
        """`compute` is the trainer's compute_rewards, which a subclass may have changed."""
        self.__name__ = getattr(function, "__name__", type(function).__name__)
        self._function = function
        self._compute = compute
        self._size = config.sample_batch_size
        self._aside = config.async_reward_computation
        self._batches: list[list[Any]] = []

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[Any]) -> Tensor:
        parts = [slice(start, start + self._size) for start in range(0, len(prompts), self._size)]
        batches: list[list[Any]] = [
            [images[part], tuple(prompts[part]), tuple(metadata[part])] for part in parts
        ]
        rewards, about = self._compute(batches, self._aside)
        self._batches += [[*batch, *more] for batch, *more in zip(batches, rewards, about, strict=True)]
        return torch.cat([reward.detach().float().cpu() for reward in rewards])

    def judge(self, batches: list[list[Any]], workers: int) -> Judged:
        """The reward's answers for [images, prompts, metadata] batches, so many at a time."""
        with ThreadPoolExecutor(workers) as pool:
            rewards, about = zip(*pool.map(self._judge, batches), strict=True)
        return rewards, about

    def take_batches(self) -> list[list[Any]]:
        """[images, prompts, metadata, rewards, reward metadata] of every batch since the last call."""
        batches, self._batches = self._batches, []
        return batches

    def _judge(self, batch: list[Any]) -> tuple[Tensor, Any]:
        result = self._function(*batch)
        if not isinstance(result, tuple) or len(result) != 2:
            raise ValueError(
                f"a TRL reward returns (rewards, metadata), {self.__name__} returned "
                f"a {type(result).__name__}"
            )
        return torch.as_tensor(result[0]).detach().float().cpu(), result[1]


@dataclass(frozen=True)
class PromptFunction(PromptSet):
    """Prompts that a function makes, drawn anew every epoch."""

    function: Callable[[], tuple[str, Any]]

    def draw(self, count: int, *, seed: int, iteration: int, repeats: int = 1) -> PromptSet:
        with _seeded(derived_seed(seed, iteration)):
            drawn = [self.function() for _ in range(count)]
        repeated = [entry for entry in drawn for _ in range(repeats)]
        return PromptSet([str(prompt) for prompt, _ in repeated], [about for _, about in repeated])

    def cycle(self, count: int) -> PromptSet:
        """The same `count` prompts at every evaluation."""
        return self.draw(count, seed=0, iteration=0)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Python's, numpy's and torch's global generators start at `seed` inside and go on as before outside."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
