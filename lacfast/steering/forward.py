"""The forwards of steering: output, value and value gradient of states, counted where they happen."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from lacfast.backbone import Backbone
from lacfast.critic.critic import Critic
from lacfast.records import Conditioning
from lacfast.runtime.memory import BatchSize
from lacfast.steering.cost import EvaluationCounter
from lacfast.steering.objective import Objective


@dataclass(frozen=True)
class StateForward:
    """What one state gives."""

    output: Tensor
    """(P, ...) with the prompt."""
    uncond_output: Tensor | None
    """(P, ...) without it, None without classifier-free guidance."""
    values: Tensor | None
    """(P,) float32 V, None without a critic."""
    gradient: Tensor | None
    """(P, ...) of V with respect to the latents, where it was asked for."""

    def select(self, positions: Tensor) -> StateForward:
        def of(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[positions]

        return StateForward(
            self.output[positions], of(self.uncond_output), of(self.values), of(self.gradient)
        )

    @staticmethod
    def concatenate(parts: Sequence[StateForward]) -> StateForward:
        def joined(tensors: list[Tensor | None]) -> Tensor | None:
            present = [tensor for tensor in tensors if tensor is not None]
            return torch.cat(present) if present else None

        return StateForward(
            torch.cat([part.output for part in parts]),
            joined([part.uncond_output for part in parts]),
            joined([part.values for part in parts]),
            joined([part.gradient for part in parts]),
        )


@dataclass(frozen=True)
class SteeredModel:
    """A backbone with its critics and what they should raise."""

    backbone: Backbone
    critics: tuple[Critic, ...]
    objective: Objective
    counter: EvaluationCounter
    uncond_conditioning: Conditioning | None
    """(1, ...) with classifier-free guidance, else None."""
    size: BatchSize
    """Latents per call of the model."""

    def evaluate(
        self,
        sample: Tensor,
        timestep: Tensor,
        conditioning: Conditioning,
        rows: Tensor,
        *,
        with_gradient: bool,
    ) -> StateForward:
        """All that a step needs of its states.

        Args:
            sample: (P, ...) latents.
            timestep: (1,) as the model takes it.
            conditioning: (G, ...) of the images in flight.
            rows: (P,) image of each latent.
            with_gradient: take the gradient of V too; no parameter gets one.
        """

        def evaluate(part: slice) -> StateForward:
            states, chosen = sample[part], conditioning.select(rows[part])
            with self.counter.forgetting_failures():
                return self._evaluate(states, timestep.expand(len(states)), chosen, with_gradient)

        return StateForward.concatenate(list(self.size.parts(evaluate, len(sample))))

    def _evaluate(
        self, sample: Tensor, timestep: Tensor, conditioning: Conditioning, with_gradient: bool
    ) -> StateForward:
        with torch.set_grad_enabled(with_gradient), ExitStack() as stack:
            sample = sample.detach().requires_grad_(with_gradient)
            recorded = [
                stack.enter_context(critic.record(self.backbone.model, detach=not with_gradient))
                for critic in self.critics
            ]
            output = self.backbone.predict(sample, timestep, conditioning)
            stack.close()
            values = [
                critic(features, sample, timestep, conditioning)
                for critic, features in zip(self.critics, recorded, strict=True)
            ]
            combined = self.objective.of_critics(values) if values else None
            gradient = None
            if combined is not None and with_gradient:
                (gradient,) = torch.autograd.grad(combined.sum(), self.counter.watch(sample))
        return StateForward(
            output.detach(),
            self._unconditional(sample.detach(), timestep),
            None if combined is None else combined.detach(),
            gradient,
        )

    @torch.no_grad()
    def _unconditional(self, sample: Tensor, timestep: Tensor) -> Tensor | None:
        if self.uncond_conditioning is None:
            return None
        rows = torch.zeros(len(sample), dtype=torch.int64, device=sample.device)
        return self.backbone.predict(sample, timestep, self.uncond_conditioning.select(rows))
