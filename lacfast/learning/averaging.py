"""The moving average of a policy's weights: less noisy than the last iterate, so results come from it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from lacfast.distributed.shard_files import SavedShard, divided_as
from lacfast.runtime.weights import copy_weights, in_place


class WeightAverage:
    """average <- decay average + (1 - decay) weights, once per iteration. All copies are in place."""

    def __init__(self, live: Mapping[str, Tensor], decay: float) -> None:
        """`live`: the tensors that training changes, see Backbone.policy_state."""
        self.live = live
        self.decay = decay
        self.weights = {name: tensor.detach().clone() for name, tensor in live.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the model's weights of today: one operation for all of a kind, whose kernel takes lists."""
        kinds: defaultdict[object, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
        for name, tensor in self.live.items():
            if tensor.is_floating_point():
                averages, weights = kinds[type(tensor), tensor.dtype, tensor.device]
                averages.append(self.weights[name])
                weights.append(tensor)
            else:
                self.weights[name].copy_(tensor)
        for averages, weights in kinds.values():
            torch._foreach_lerp_(averages, weights, 1 - self.decay)

    def load(self, weights: Mapping[str, Tensor | SavedShard]) -> None:
        """Continue from saved averages of the same model, whole or sharded."""
        copy_weights(self.weights, divided_as(weights, self.weights))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the context the model has the averaged weights, at the addresses that it had."""
        with in_place(self.live, self.weights):
            yield
