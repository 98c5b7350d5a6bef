"""Live weights: copied to the host, and given other values at the addresses that they have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


def on_host(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the host."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in weights.items()}


@torch.no_grad()
def copy_weights(targets: Mapping[str, Tensor], sources: Mapping[str, Tensor]) -> None:
    """Give the targets the values of the sources of their names, in place."""
    for name, target in targets.items():
        target.copy_(sources[name])


@contextmanager
def in_place(live: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the context the live tensors have other values, at the addresses that they had."""
    own = {name: tensor.detach().clone() for name, tensor in live.items()}
    copy_weights(live, weights)
    try:
        yield
    finally:
        copy_weights(live, own)
