"""The moving average of weights: its equation, to the bit, in few operations."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lacfast.learning.averaging import WeightAverage


class Dispatched(TorchDispatchMode):
    """How often each operator was called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Tensor] = {
        f"layers.{number}": nn.Parameter(torch.randn(3, number + 1, generator=generator))
        for number in range(5)
    }
    found |= {f"half.{number}": torch.randn(4, generator=generator).bfloat16() for number in range(3)}
    return found | {"count": torch.tensor(2)}


def test_every_weight_moves_by_its_share() -> None:
    live = weights()
    average = WeightAverage(live, 0.9)
    kept = {name: tensor.clone() for name, tensor in average.weights.items()}
    with torch.no_grad():
        for tensor in live.values():
            tensor.add_(1)
    average.update()
    for name, tensor in live.items():
        wanted = torch.lerp(kept[name], tensor.detach(), 1 - 0.9) if name != "count" else tensor
        assert torch.equal(average.weights[name], wanted), name


def test_tensors_of_one_kind_take_one_operation() -> None:
    average = WeightAverage(weights(), 0.9)
    with Dispatched() as dispatched:
        average.update()
    # Parameters in float32 and tensors in bfloat16.
    assert dispatched.calls["_foreach_lerp_"] == 2
    assert dispatched.calls["copy_"] == 1
    assert dispatched.calls["lerp_"] == 0
