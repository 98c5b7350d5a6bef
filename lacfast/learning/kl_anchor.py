"""The anchor, the frozen policy that the KL is measured from, and its outputs on a rollout, on an own graph.

The anchor shares the policy's weights where it is the model without its adapter, but which adapter runs is a
flag in Python: a graph of the policy has frozen another answer.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from lacfast.backbone import Backbone
from lacfast.distributed.sharding import gathered
from lacfast.learning.pairs import Pairs, states_of
from lacfast.policy import States, guided_output
from lacfast.records import Conditioning, Rollout, Static, padding_rows
from lacfast.runtime.graph import GraphRunner, StaticStep, weights_of


@dataclass(frozen=True)
class _Inputs(Static):
    """What a forward of the anchor reads."""

    states: States
    uncond_conditioning: Conditioning | None


@dataclass(frozen=True)
class _Captured:
    """Where the step reads and writes, for one shape."""

    layout: Hashable
    signature: Hashable
    inputs: _Inputs
    output: Tensor
    step: StaticStep


class KLAnchor:
    """Runs the anchor on states, and over rollouts batch by batch."""

    def __init__(self, backbone: Backbone, graphs: GraphRunner, guidance_scale: float) -> None:
        """
        Args:
            backbone: the frozen policy.
            graphs: captures the step over rollouts, or runs it eagerly.
            guidance_scale: that the rollouts are made with.
        """
        self.backbone = backbone
        self.graphs = graphs
        self.guidance_scale = guidance_scale
        self._captured: _Captured | None = None

    @torch.no_grad()
    def output(self, states: States, uncond_conditioning: Conditioning | None) -> Tensor:
        """Output (P, ...) after guidance."""
        scale = self.guidance_scale
        output, _ = guided_output(self.backbone, states, uncond_conditioning, scale, "cond")
        return output

    @torch.no_grad()
    def outputs(self, rollout: Rollout, steps: Tensor, timesteps: Tensor, *, batch_size: int) -> Tensor:
        """Outputs (K, B, ...) after guidance at `steps` (K,), in the rollout's dtype.

        They take the memory of `rollout.model_outputs` and are the same in every pass, for the anchor does
        not move.

        Args:
            rollout: B trajectories.
            steps: (K,) int64, the trained ones.
            timesteps: (T,) of the table, on the rollout's device.
            batch_size: states at a time.
        """
        outputs = torch.empty_like(rollout.model_outputs[: len(steps)])
        signature = self._signature()
        size, uncond = min(batch_size, rollout.batch_size), rollout.uncond_conditioning
        with gathered(self.backbone.model):
            for position, first in product(range(len(steps)), range(0, rollout.batch_size, size)):
                kept = min(size, rollout.batch_size - first)
                # A captured tail is padded, so that there is one shape.
                rows = first + padding_rows(kept, size if self.graphs.captures else kept, steps.device)
                states = states_of(rollout, timesteps, Pairs(steps[position].expand(len(rows)), rows, rows))
                inputs = _Inputs(states, None if uncond is None else uncond.select(rows))
                outputs[position, first : first + kept] = self._output(inputs, signature)[:kept]
        return outputs

    def release(self) -> None:
        """Free the graph and what it reads."""
        if self._captured is not None:
            self.graphs.release(self._captured.step)
            self._captured = None

    def _signature(self) -> Hashable:
        """What the forward depends on besides tensors; what was captured is where it was.

        Both walk over all modules, so they are asked once for all batches.
        """
        if not self.graphs.captures:
            return None
        signature = self.backbone.forward_signature()
        if self._captured is not None and self._captured.signature == signature:
            self.graphs.check_addresses(self._captured.step)
        return signature

    def _output(self, inputs: _Inputs, signature: Hashable) -> Tensor:
        """(P, ...), until the next call."""
        if not self.graphs.captures:
            return self.output(inputs.states, inputs.uncond_conditioning)
        captured = self._captured_for(inputs, signature)
        captured.inputs.copy_(inputs)
        self.graphs.run(captured.step)
        return captured.output

    def _captured_for(self, inputs: _Inputs, signature: Hashable) -> _Captured:
        found = self._captured
        if found is not None and (found.layout, found.signature) == (inputs.layout, signature):
            return found
        self.release()
        own, output = inputs.clone(), torch.empty_like(inputs.states.sample)

        def run() -> None:
            output.copy_(self.output(own.states, own.uncond_conditioning))

        step = StaticStep(
            name=f"the anchor's step of {tuple(output.shape)}",
            run=run,
            written=lambda: (output,),
            read=lambda: weights_of({"anchor": self.backbone.model}),
        )
        self._captured = _Captured(own.layout, signature, own, output, step)
        return self._captured
