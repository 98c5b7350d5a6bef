"""Many tensors in few collectives: flat buckets of one dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

BUCKET_BYTES = 256 * 2**20
"""Tensors that travel in one call; the bucket is memory beside them."""


@torch.no_grad()
def in_buckets(tensors: Sequence[Tensor], collective: Callable[[Tensor], object]) -> None:
    """Run a collective that works in place on tensors, many at a time."""
    for bucket in _buckets(tensors):
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        collective(flat)
        for tensor, part in zip(bucket, torch.split(flat, [each.numel() for each in bucket]), strict=True):
            tensor.copy_(part.view_as(tensor))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in order, in runs of one dtype and device that hold at most BUCKET_BYTES, or one."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        is_alike = not bucket or (tensor.dtype, tensor.device) == (bucket[0].dtype, bucket[0].device)
        if bucket and (not is_alike or size + tensor.nbytes > BUCKET_BYTES):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket
