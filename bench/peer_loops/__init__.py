"""The training loops of flow_grpo and ddpo-pytorch in our own words, from their published algorithms.

They do the same work in the same order: prompts encoded again for every batch, both halves of guidance in one
batch, a Python loop over denoising steps in sampling and in training, step indices looked up on the host, the
reference forward of every step with the adapter switched off, one batch of the sampler's size per forward and
backward. What they share with lacfast is the diffusers model and its weights, nothing else.
"""

from __future__ import annotations

from bench.peer_loops.ddpo import DDPOLoop, DDPOSettings
from bench.peer_loops.flow_grpo import FlowGRPOLoop, FlowGRPOSettings
from bench.peer_loops.samples import PeerModel, Samples, samples_of

__all__ = [
    "DDPOLoop",
    "DDPOSettings",
    "FlowGRPOLoop",
    "FlowGRPOSettings",
    "PeerModel",
    "Samples",
    "samples_of",
]
