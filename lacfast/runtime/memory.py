"""How many pairs run forward and backward at a time: as given, or as many as the free memory holds."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

Result = TypeVar("Result")
Probe = Callable[[int], None]
"""Runs forward and backward of so many pairs and keeps nothing."""

HOST_LIMIT = 256
"""Pairs at a time on a CPU; beyond it only memory grows, see the race of `python -m bench.iteration`."""
HOST_SHARE, DEVICE_SHARE = 0.5, 0.8
"""Shares of the free memory to fill. The rest is for what no probe sees: fragments, other processes."""
PROBES = (2, 4)
"""Pairs of the two probes; a single pair may run through other kernels."""


class MicrobatchSize:
    """The size of the microbatches of one optimizer. The result depends on it by the order of sums alone."""

    def __init__(self, size: int) -> None:
        """`size`: in pairs; 0 is found by `find`."""
        self.size = size

    def find(self, probe: Probe, device: torch.device, *, reserved: int) -> None:
        """Choose a size for the memory that is free now, if none was given.

        Args:
            probe: of the step whose microbatches these are.
            device: that it runs on.
            reserved: bytes that will be needed besides, as an optimizer's moments.
        """
        if self.size:
            return
        measure = _device_bytes if device.type == "cuda" else _host_bytes
        free, (small, large) = measure(probe, device)
        per_pair = max((large - small) // (PROBES[1] - PROBES[0]), 1)
        fixed = max(small - PROBES[0] * per_pair, 0)
        fitting = (free - reserved - fixed) // per_pair
        # A power of two: it hardly depends on how much is free to the byte, so runs are alike.
        self.size = 1 << (max(fitting, 1).bit_length() - 1)
        if device.type != "cuda":
            self.size = min(self.size, HOST_LIMIT)

    def run(self, step: Callable[[int], Result], pairs: int) -> Result:
        """What `step` returns for microbatches of this size, which is halved as long as memory runs out.

        Args:
            step: takes the size; after an error it can start anew.
            pairs: in the minibatch, beyond which the size does not matter.

        Raises:
            torch.OutOfMemoryError: for a single pair.
        """
        while True:
            try:
                return step(self.size)
            except torch.OutOfMemoryError:
                if min(self.size, pairs) == 1:
                    raise
            # Out here the error no longer holds the tensors of the attempt.
            tried, self.size = min(self.size, pairs), max(min(self.size, pairs) // 2, 1)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            warnings.warn(
                f"out of memory with {tried} pairs at a time; going on with microbatches of {self.size}. "
                f"Set ppo.microbatch_size={self.size} to start there",
                RuntimeWarning,
                stacklevel=2,
            )


def _device_bytes(probe: Probe, device: torch.device) -> tuple[int, list[int]]:
    """Bytes that are free, and those that each of the PROBES takes at its peak."""
    # Compiles kernels and makes the libraries' workspaces.
    probe(PROBES[-1])
    peaks = []
    for pairs in PROBES:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        probe(pairs)
        torch.cuda.synchronize(device)
        peaks.append(torch.cuda.max_memory_allocated(device) - held)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return int(DEVICE_SHARE * free), peaks


def _host_bytes(probe: Probe, device: torch.device) -> tuple[int, list[int]]:
    """The same on a CPU, whose allocator knows no peak: what autograd keeps for the backward pass."""
    kept = []
    for pairs in PROBES:
        storages: dict[int, int] = {}

        def pack(tensor: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            probe(pairs)
        kept.append(sum(storages.values()))
    if "SC_AVPHYS_PAGES" not in os.sysconf_names:
        return HOST_LIMIT * kept[-1], kept
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(HOST_SHARE * free), kept
