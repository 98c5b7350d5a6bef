"""How much runs at a time: as given, or as much as the free memory holds, and less when it runs out."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lacfast.runtime.failures import FailedError

Result = TypeVar("Result")
Probe = Callable[[int], None]
"""Runs forward and backward of so many pairs and keeps nothing."""

HOST_LIMIT = 256
"""Pairs at a time on a CPU; beyond it only memory grows, see the race of `python -m bench.iteration`."""
HOST_SHARE, DEVICE_SHARE = 0.5, 0.8
"""Shares of the free memory to fill. The rest is for what no probe sees: fragments, other processes."""
PROBES = (1, 2, 4)
"""Pairs of the probes. The two largest that fit tell; a single pair may run through other kernels."""


class DoesNotFitError(FailedError, torch.OutOfMemoryError):
    """The smallest possible batch needs more memory than there is."""


def nothing() -> None:
    """Nothing is made for a batch of one size that could be freed."""


class BatchSize:
    """How many of a kind run at a time. It lives as long as the work: what did not fit is not tried again.

    What is computed does not depend on it, or by the order of sums alone.
    """

    def __init__(self, size: int, *, unit: str, setting: str, shrinks: bool = True) -> None:
        """
        Args:
            size: to begin with. 0: all that there are, or what `find` finds.
            unit: what is counted, as "pair".
            setting: the option that it begins with.
            shrinks: it is halved when memory runs out. False where others wait for as many batches.
        """
        self.size = size
        self.unit = unit
        self.setting = setting
        self.shrinks = shrinks

    def find(self, probe: Probe, device: torch.device, *, reserved: int) -> None:
        """Choose a size for the memory that is free now, if none was given.

        Args:
            probe: of the step whose batches these are.
            device: that it runs on.
            reserved: bytes that will be needed besides, as an optimizer's moments.

        Raises:
            DoesNotFitError: when the probe of one does not fit.
        """
        if self.size:
            return
        peaks: list[int] = []
        for count in PROBES:
            try:
                peaks.append(_peak_bytes(probe, count, device))
            except torch.OutOfMemoryError as error:
                if not peaks:
                    raise self._does_not_fit(error) from error
                break
        # Out here an error no longer holds the tensors of its probe.
        fitting = PROBES[len(peaks) - 1]
        if len(peaks) > 1:
            (few, many), (small, large) = PROBES[len(peaks) - 2 : len(peaks)], peaks[-2:]
            per_pair = max((large - small) // (many - few), 1)
            fixed = max(small - few * per_pair, 0)
            foretold = max((_free_bytes(device) - reserved - fixed) // per_pair, 1)
            # No more than what ran, where the next probe did not.
            fitting = foretold if len(peaks) == len(PROBES) else min(foretold, fitting)
        # A power of two: it hardly depends on how much is free to the byte, so runs are alike.
        self.size = 1 << (fitting.bit_length() - 1)
        if device.type != "cuda":
            self.size = min(self.size, HOST_LIMIT)

    def run(
        self, work: Callable[[int], Result], count: int, *, release: Callable[[], None] = nothing
    ) -> Result:
        """What `work` returns for batches of this size, which is halved as long as memory runs out.

        Args:
            work: takes the size; after an error it can start anew.
            count: how many there are, beyond which the size does not matter.
            release: frees what `work` made for a size that did not fit.

        Raises:
            DoesNotFitError: for one at a time, for a size that does not shrink, or by the work itself.
        """
        while True:
            tried = min(self.size or count, count)
            try:
                return work(self.size or count)
            except DoesNotFitError:
                # A smaller size would not help, as the work says.
                raise
            except torch.OutOfMemoryError as error:
                if tried == 1:
                    raise self._does_not_fit(error) from error
                if not self.shrinks:
                    raise DoesNotFitError(
                        f"out of memory with {tried} {self.unit}s at a time, and the other ranks wait for as "
                        f"many batches; set {self.setting} to {tried // 2}"
                    ) from error
            # Out here the error no longer holds the tensors of the attempt.
            self.size = tried // 2
            release()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            warnings.warn(
                f"out of memory with {tried} {self.unit}s at a time; going on with {self.size}. "
                f"Set {self.setting} to {self.size} to start there",
                RuntimeWarning,
                stacklevel=2,
            )

    def parts(self, work: Callable[[slice], Result], count: int) -> Iterator[Result]:
        """Results of `work` on rows 0 to `count`, as many at a time as this size says and memory holds.

        Raises:
            DoesNotFitError: for a single row.
        """
        first = 0
        while first < count:

            def attempt(size: int, first: int = first) -> tuple[int, Result]:
                rows = slice(first, min(first + size, count))
                return rows.stop, work(rows)

            first, result = self.run(attempt, count - first)
            yield result
            # Whoever took it may have let it go; the next part must not be made beside it.
            del result

    def joined(self, work: Callable[[slice], Tensor], count: int) -> Tensor:
        """(count, ...) of `work` on all rows, part by part; parts are written where they stay.

        Raises:
            DoesNotFitError: for a single row.
        """
        whole: Tensor | None = None

        def write(rows: slice) -> Tensor:
            nonlocal whole
            part = work(rows)
            if len(part) == count:
                return part
            if whole is None:
                # Parts that are kept until the last would need as much room again. Where there is none for
                # it beside the first part, there is beside a smaller one.
                whole = part.new_empty((count, *part.shape[1:]))
            whole[rows] = part
            return whole

        found = torch.empty(0)
        for part in self.parts(write, count):
            found = part
        return found

    def _does_not_fit(self, error: torch.OutOfMemoryError) -> DoesNotFitError:
        return DoesNotFitError(
            f"out of memory with a single {self.unit}: {error}; use gradient_checkpointing, a LoRA in place "
            "of all weights, bfloat16, a lower resolution, keep_text_encoders=False, vae_tiling, or a "
            "smaller batch_size (its rollout is kept)"
        )


def _peak_bytes(probe: Probe, count: int, device: torch.device) -> int:
    """Bytes that a probe of `count` takes at its peak."""
    if device.type != "cuda":
        return _kept_bytes(probe, count)
    # Compiles kernels and makes the libraries' workspaces.
    probe(count)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device)
    probe(count)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - held


def _kept_bytes(probe: Probe, count: int) -> int:
    """The same on a CPU, whose allocator knows no peak: what autograd keeps for the backward pass."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        probe(count)
    return sum(storages.values())


def _free_bytes(device: torch.device) -> int:
    """Bytes to fill of those that are free now."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
        return int(DEVICE_SHARE * free)
    if "SC_AVPHYS_PAGES" not in os.sysconf_names:
        return sys.maxsize
    return int(HOST_SHARE * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
