"""What a method costs, in closed form: forwards of an image before any work is done."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lacfast.config import SteeringConfig
from lacfast.records import TransitionTable
from lacfast.steering.guidance import guided_steps


def prune_steps(config: SteeringConfig, table: TransitionTable) -> list[int]:
    """Steps at whose state the worse half is dropped; none for other methods.

    Raises:
        ValueError: for a fraction of the steps that is no step.
    """
    if config.method != "pruning" or config.particles == 1:
        return []
    steps = [round(fraction * table.num_steps) for fraction in config.prune_fractions]
    if len(set(steps)) < len(steps) or not all(0 < step < table.num_steps for step in steps):
        raise ValueError(
            f"prune_fractions={config.prune_fractions} of {table.num_steps} steps are the steps {steps}; "
            f"they must differ and lie between 1 and {table.num_steps - 1}"
        )
    return steps


def children(config: SteeringConfig, table: TransitionTable, step: int) -> int:
    """Candidates that a trajectory tries at a step. Where it draws no noise they would all be the same."""
    is_open = config.method == "beam" and float(table.std[step]) > 0 and step + 1 < table.num_steps
    return config.candidates if is_open else 1


def trajectories_per_step(config: SteeringConfig, table: TransitionTable) -> list[int]:
    """States of one image that the model sees at each of T steps."""
    halvings = prune_steps(config, table)
    counts = []
    for step in range(table.num_steps):
        pruned = config.particles >> sum(earlier < step for earlier in halvings)
        counts.append(max(pruned, 1) * (children(config, table, step - 1) if step else 1))
    return counts


def planned_evaluations(
    config: SteeringConfig, table: TransitionTable, *, guidance_scale: float = 1.0, critic_forwards: int = 0
) -> float:
    """NFE of an image but for the sign test: forwards, and backwards counted as two forwards.

        sum_k N_k (1 + [guidance_scale > 1] + critic_forwards + 2 [step k is guided])

    N_k of T steps: N (best_of_n, smc); N halved after every prune step (pruning); N M behind a step that
    draws noise, else N (beam).

    Args:
        config: method and guidance.
        table: the sampler.
        guidance_scale: above 1 the unconditional half runs too.
        critic_forwards: of the whole model that the critics make for a value: 1 for trunk "copy" or "lora",
            else 0.
    """
    forwards = 1 + (guidance_scale > 1) + critic_forwards
    guided = guided_steps(config, table)
    counts = trajectories_per_step(config, table)
    return float(
        sum(
            count * (forwards + BACKWARD_COST * is_guided)
            for count, is_guided in zip(counts, guided, strict=True)
        )
    )


BACKWARD_COST = 2
"""Forwards that a backward counts as: gradients of activations and the recomputed products."""


@dataclass(frozen=True)
class FunctionEvaluations:
    """NFE of a whole call: latents that went through the model, and gradients that came back."""

    forwards: int
    """Latents through the model, through its unconditional half and through a critic's copy of it."""
    backwards: int
    """Latents whose value gradient was taken."""
    images: int
    """Images that came of it."""

    @property
    def per_image(self) -> float:
        """(forwards + 2 backwards) / images"""
        return (self.forwards + BACKWARD_COST * self.backwards) / self.images


@dataclass(frozen=True)
class ParticleStats:
    """What sequential Monte Carlo did."""

    effective_sample_sizes: Tensor
    """(T, n) float64 effective particles at every state, before resampling; at most N."""
    resampled: Tensor
    """(T, n) bool"""
    log_weights: Tensor
    """(n, N) float64 of the particles at the end, after the final correction."""
    log_evidence: Tensor
    """(n,) float64 estimate of log E[exp(R / tau)] (of V without the final correction)."""

    def on_host(self) -> ParticleStats:
        """The statistics on the CPU."""
        return ParticleStats(**{name: tensor.cpu() for name, tensor in vars(self).items()})

    @staticmethod
    def concatenate(parts: Sequence[ParticleStats]) -> ParticleStats:
        """The statistics of all images of several batches."""
        return ParticleStats(
            torch.cat([part.effective_sample_sizes for part in parts], dim=1),
            torch.cat([part.resampled for part in parts], dim=1),
            torch.cat([part.log_weights for part in parts]),
            torch.cat([part.log_evidence for part in parts]),
        )


@dataclass(frozen=True)
class SteeringStats:
    """What steering cost, what the critic made of it and what the rewards did."""

    evaluations: FunctionEvaluations
    values: Tensor
    """(T, n) V of the chosen trajectory at every state; (0, n) without a critic."""
    rewards: dict[str, Tensor]
    """name -> (n,) raw reward of the chosen image; empty without rewards."""
    gold: dict[str, Tensor]
    """name -> (n,) of rewards that steering never saw."""
    reward_calls: int
    """Images that the rewards judged before the choice; 0 where V alone chose."""
    gradient_gain: float
    """Mean rise of V after a small move along its gradient, the sign test. NaN without guidance."""
    particles: ParticleStats | None = None
    """Statistics of method "smc"; None for the others."""

    def on_host(self) -> SteeringStats:
        """The statistics on the CPU."""
        particles = None if self.particles is None else self.particles.on_host()
        rewards, gold = (
            {name: score.cpu() for name, score in each.items()} for each in (self.rewards, self.gold)
        )
        return replace(self, values=self.values.cpu(), rewards=rewards, gold=gold, particles=particles)

    @staticmethod
    def concatenate(parts: Sequence[SteeringStats]) -> SteeringStats:
        """The statistics of all images of several calls by the same settings."""
        calls = [part.evaluations for part in parts]
        images = sum(call.images for call in calls)
        particles = [part.particles for part in parts if part.particles is not None]
        return SteeringStats(
            FunctionEvaluations(
                sum(call.forwards for call in calls), sum(call.backwards for call in calls), images
            ),
            torch.cat([part.values for part in parts], dim=1),
            {name: torch.cat([part.rewards[name] for part in parts]) for name in parts[0].rewards},
            {name: torch.cat([part.gold[name] for part in parts]) for name in parts[0].gold},
            sum(part.reward_calls for part in parts),
            sum(part.gradient_gain * part.evaluations.images for part in parts) / images,
            ParticleStats.concatenate(particles) if particles else None,
        )


class EvaluationCounter:
    """Latents that went through a model and gradients that came back to them."""

    def __init__(self) -> None:
        self.forwards = 0
        self.backwards = 0

    @contextmanager
    def counting(self, model: nn.Module, others: Iterable[nn.Module]) -> Iterator[None]:
        """Within the context, every forward of `model`, or of its like inside `others`, counts its batch."""
        found = {id(model): model}
        for other in others:
            found |= {id(part): part for part in other.modules() if type(part) is type(model)}
        handles = [
            part.register_forward_pre_hook(self._count_forward, with_kwargs=True) for part in found.values()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def forgetting_failures(self) -> Iterator[None]:
        """Within the context, what an error cut off is not counted: it is done again."""
        before = self.forwards, self.backwards
        try:
            yield
        except Exception:
            self.forwards, self.backwards = before
            raise

    def _count_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sample = args[0] if args else next(iter(kwargs.values()))
        self.forwards += len(sample)

    def watch(self, sample: Tensor) -> Tensor:
        """`sample` (B, ...), which requires grad; its gradient's arrival counts B backwards."""
        sample.register_hook(self._count_backward)  # type: ignore[no-untyped-call]
        return sample

    def _count_backward(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)
