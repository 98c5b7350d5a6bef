"""The reference model's outputs on a rollout, computed once for several passes, on a graph of their own.

The reference shares the policy's weights where it is the model without its adapter, but which adapter runs is
a flag in Python: a graph of the policy has frozen another answer.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from lacfast.backbone import Backbone
from lacfast.learning.pairs import Pairs, states_of
from lacfast.policy import States, guided_output
from lacfast.records import Conditioning, Rollout
from lacfast.runtime.graph import GraphRunner, StaticStep


@dataclass(frozen=True)
class _Captured:
    """Where the step reads and writes, for one shape."""

    key: Hashable
    states: States
    uncond_conditioning: Conditioning | None
    output: Tensor
    step: StaticStep

    def load(self, states: States, uncond_conditioning: Conditioning | None) -> None:
        self.states.sample.copy_(states.sample)
        self.states.timestep.copy_(states.timestep)
        self.states.conditioning.copy_(states.conditioning)
        if self.uncond_conditioning is not None and uncond_conditioning is not None:
            self.uncond_conditioning.copy_(uncond_conditioning)


class ReferenceStep:
    """Runs the reference model over rollouts, batch by batch."""

    def __init__(self, reference: Backbone, graphs: GraphRunner, guidance_scale: float) -> None:
        """
        Args:
            reference: the frozen policy.
            graphs: captures the step, or runs it eagerly.
            guidance_scale: that the rollouts are made with.
        """
        self.reference = reference
        self.graphs = graphs
        self.guidance_scale = guidance_scale
        self._captured: _Captured | None = None

    @torch.no_grad()
    def outputs(self, rollout: Rollout, steps: Tensor, timesteps: Tensor, *, batch_size: int) -> Tensor:
        """The reference's outputs (K, B, ...) after guidance at `steps` (K,), in the rollout's dtype.

        They take the memory of `rollout.model_outputs` and are the same in every pass, for the reference does
        not move.

        Args:
            rollout: B trajectories.
            steps: (K,) int64, the trained ones.
            timesteps: (T,) of the table, on the rollout's device.
            batch_size: states at a time.
        """
        outputs = torch.empty_like(rollout.model_outputs[: len(steps)])
        size, uncond = min(batch_size, rollout.batch_size), rollout.uncond_conditioning
        for position in range(len(steps)):
            for first in range(0, rollout.batch_size, size):
                kept = min(size, rollout.batch_size - first)
                rows = torch.arange(first, first + kept, device=steps.device)
                if self.graphs.captures:
                    # The tail repeats its last state, so that there is one shape.
                    rows = torch.arange(first, first + size, device=steps.device).clamp(max=first + kept - 1)
                states = states_of(rollout, timesteps, Pairs(steps[position].expand(len(rows)), rows, rows))
                output = self._output(states, None if uncond is None else uncond.select(rows))
                outputs[position, first : first + kept] = output[:kept]
        return outputs

    def release(self) -> None:
        """Free the graph and what it reads."""
        if self._captured is not None:
            self.graphs.release(self._captured.step)
            self._captured = None

    def _output(self, states: States, uncond_conditioning: Conditioning | None) -> Tensor:
        """(P, ...), until the next call."""
        if not self.graphs.captures:
            return self._guided(states, uncond_conditioning)
        captured = self._captured_for(states, uncond_conditioning)
        captured.load(states, uncond_conditioning)
        self.graphs.check_addresses(captured.step)
        self.graphs.run(captured.step)
        return captured.output

    def _guided(self, states: States, uncond_conditioning: Conditioning | None) -> Tensor:
        output, _ = guided_output(self.reference, states, uncond_conditioning, self.guidance_scale, "cond")
        return output

    def _captured_for(self, states: States, uncond_conditioning: Conditioning | None) -> _Captured:
        uncond = None if uncond_conditioning is None else uncond_conditioning.padded(len(states.sample))
        layouts = (states.conditioning.layout, None if uncond is None else uncond.layout)
        key = (tuple(states.sample.shape), layouts, self.reference.forward_signature())
        if self._captured is not None and self._captured.key == key:
            return self._captured
        self.release()
        own = States(
            states.sample.clone(), states.timestep.clone(), states.conditioning.padded(len(states.sample))
        )
        output = torch.empty_like(states.sample)

        def run() -> None:
            output.copy_(self._guided(own, uncond))

        step = StaticStep(
            name=f"the reference's step of {tuple(states.sample.shape)}",
            run=run,
            written=lambda: (output,),
            read=lambda: {f"reference.{name}": each for name, each in self._parameters()},
        )
        self._captured = _Captured(key, own, uncond, output, step)
        return self._captured

    def _parameters(self) -> list[tuple[str, Tensor]]:
        return list(self.reference.model.named_parameters())
