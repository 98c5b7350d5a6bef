"""Host memory beside a device: how much is free, and rows of what lies there, gathered ahead of their use."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

HOST_SHARE = 0.9
"""Share of the free host memory that may be filled with what is planned."""
SLOTS = 2
"""Batches on the device: the one that is read, and the next."""
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def free_host_bytes() -> int | None:
    """Bytes that this process may still take of the host, as Linux tells them; None where nothing does.

    What the page cache holds counts as free, and a container's limit counts where it is lower.
    """
    found = [] if not _MEMINFO.exists() else [_available(_MEMINFO.read_text(encoding="utf-8"))]
    limit = _CGROUP / "memory.max"
    if limit.exists() and (bound := limit.read_text(encoding="utf-8").strip()) != "max":
        used = int((_CGROUP / "memory.current").read_text(encoding="utf-8"))
        statistics = (_CGROUP / "memory.stat").read_text(encoding="utf-8").split()
        cached = int(statistics[statistics.index("inactive_file") + 1])
        found.append(int(bound) - used + cached)
    if not found and "SC_AVPHYS_PAGES" in os.sysconf_names:
        found.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(found, default=None)


def _available(meminfo: str) -> int:
    lines = dict(line.split(":") for line in meminfo.splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


@dataclass
class _Slot:
    """Memory for one batch: pinned on the host, where it is gathered, and on the device."""

    host: dict[str, Tensor] = field(default_factory=dict)
    device: dict[str, Tensor] = field(default_factory=dict)
    copied: torch.cuda.Event | None = None
    """Event behind which the pinned memory may be written again."""
    used: torch.cuda.Event | None = None
    """Event behind which the device's memory may."""

    def fit(self, rows: Mapping[str, tuple[Tensor, Tensor]], device: torch.device) -> bool:
        """Make room for rows of tensors, as `Staging.gather` takes them; whether that was anew."""
        fits = self.host.keys() == rows.keys() and all(
            len(room) >= len(rows[name][1])
            and room.shape[1:] == rows[name][0].shape[1:]
            and room.dtype == rows[name][0].dtype
            for name, room in self.host.items()
        )
        if not fits:
            self.host = {
                name: torch.empty((len(index), *tensor.shape[1:]), dtype=tensor.dtype).pin_memory()
                for name, (tensor, index) in rows.items()
            }
            self.device = {name: torch.empty_like(room, device=device) for name, room in self.host.items()}
        return not fits


class Staging:
    """Gathers rows of host tensors for a device, while that still works on the rows before.

    On CUDA rows are gathered into pinned memory and copied on a stream of their own. There are two slots, so
    one batch is copied while the last is read; the host waits for neither. The tensors themselves need not
    be pinned: page-locked memory cannot be swapped, and torch rounds it up to powers of two.
    """

    def __init__(self, device: torch.device) -> None:
        """`device`: that the rows are for."""
        self.device = device
        self._slots = [_Slot() for _ in range(SLOTS)]
        self._calls = 0
        self._stream: torch.cuda.Stream | None = None

    def gather(self, rows: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """Rows of tensors, on the device.

        Args:
            rows: name -> tensor (N, ...) and which of its rows (P,) int64, both on the host.

        Returns:
            name -> (P, ...), for work that is launched before the next call.
        """
        if self.device.type != "cuda":
            return {name: tensor[index].to(self.device) for name, (tensor, index) in rows.items()}
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        current, stream = torch.cuda.current_stream(self.device), self._stream
        slot, last = self._slots[self._calls % SLOTS], self._slots[(self._calls - 1) % SLOTS]
        if self._calls:
            last.used = current.record_event()
        self._calls += 1
        if slot.copied is not None:
            slot.copied.synchronize()
        if slot.fit(rows, self.device):
            # The allocator may have had the memory from work that is still to come on this stream.
            stream.wait_stream(current)
        elif slot.used is not None:
            stream.wait_event(slot.used)
        for name, (tensor, index) in rows.items():
            torch.index_select(tensor, 0, index, out=slot.host[name][: len(index)])
        with torch.cuda.stream(stream):
            for name, (_, index) in rows.items():
                slot.device[name][: len(index)].copy_(slot.host[name][: len(index)], non_blocking=True)
            slot.copied = stream.record_event()
        current.wait_event(slot.copied)
        return {name: slot.device[name][: len(index)] for name, (_, index) in rows.items()}
