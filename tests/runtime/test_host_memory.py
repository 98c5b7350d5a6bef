"""Rows of host tensors come to the device whole, in two slots that grow."""

from __future__ import annotations

from itertools import pairwise

import torch
from host_waits import WaitLog

from lacfast.runtime.host_memory import Staging

SIZES = (3, 5, 4, 5, 1)


def test_rows_are_gathered_for_the_device_batch_by_batch(cuda: WaitLog) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(20, 3, generator=generator)
    numbers = torch.arange(20)
    staging = Staging(torch.device("cuda", 0))
    places = []
    for size in SIZES:
        first, second = (torch.randint(20, (size,), generator=generator) for _ in range(2))
        found = staging.gather({"values": (values, first), "numbers": (numbers, second)})
        assert found["values"].is_cuda
        assert torch.equal(found["values"].cpu(), values[first])
        assert torch.equal(found["numbers"].cpu(), numbers[second])
        places.append(found["values"].data_ptr())
    # Each batch leaves the one before alone, and only a larger one takes new memory.
    assert (places[1], places[2]) == (places[3], places[4])
    assert all(one != other for one, other in pairwise(places))


def test_on_the_host_rows_are_gathered_as_they_are() -> None:
    values, rows = torch.arange(6.0).view(3, 2), torch.tensor([2, 0])
    found = Staging(torch.device("cpu")).gather({"values": (values, rows)})
    assert torch.equal(found["values"], values[rows])
