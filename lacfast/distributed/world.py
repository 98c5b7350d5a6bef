"""Sums over the ranks of torch.distributed; one process is the sum of itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, distributed

Entry = TypeVar("Entry")


def all_reduce() -> Callable[[Tensor], object] | None:
    """A function that adds a tensor over all ranks in place; None where there is only one."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    return distributed.all_reduce if distributed.get_world_size() > 1 else None


def moments(values: Tensor) -> tuple[float, Tensor, Tensor]:
    """Count, mean and population variance of values (n, M) over the samples of all ranks.

    The variance is taken around the mean of all ranks, so that a large mean costs it no digits.

    Returns:
        The count, and mean (M,) and variance (M,), float64 on the values' device.
    """
    wide = values.detach().double()
    reduce = all_reduce()
    if reduce is None:
        return float(len(wide)), wide.mean(dim=0), wide.var(dim=0, correction=0)
    count = torch.tensor(float(len(wide)), dtype=torch.float64, device=wide.device)
    total = torch.cat([count[None], wide.sum(dim=0)])
    reduce(total)
    mean = total[1:] / total[0]
    squares = ((wide - mean) ** 2).sum(dim=0)
    reduce(squares)
    return float(total[0]), mean, squares / total[0]


def gathered(entries: list[Entry]) -> tuple[list[Entry], int]:
    """The entries of all ranks in their order, and where this rank's begin."""
    if all_reduce() is None:
        return entries, 0
    parts: list[list[Entry]] = [[] for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(parts, entries)
    rank = distributed.get_rank()
    return [entry for part in parts for entry in part], sum(len(part) for part in parts[:rank])
