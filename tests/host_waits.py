"""Where the host waits for a device, as a pretended CUDA device notices it (tests/pretended_cuda.py)."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parents[1]
DEVICE_FILES = {
    str(ROOT / "tests" / name) for name in ("host_waits.py", "pretended_cuda.py", "pretended_tensors.py")
}


@dataclass(frozen=True)
class Wait:
    """The host waited for the device."""

    kind: str
    """What it did."""
    function: str
    """"lacfast/rollout/sampler.py:RolloutSampler.sample", the innermost one of this repository."""
    line: int
    called_by: str
    """The function outside of that one, with its line."""
    is_aside: bool
    """In another thread than the one that trains."""

    def __str__(self) -> str:
        return f"{self.function}, line {self.line}: {self.kind} (from {self.called_by})"


class WaitLog:
    """The waits so far."""

    def __init__(self) -> None:
        self.waits: list[Wait] = []
        self.forbidden = ""
        """Why the host must not wait; empty where it may."""
        self._capturing = threading.local()

    @property
    def is_capturing(self) -> bool:
        """Whether this thread captures a graph."""
        return getattr(self._capturing, "value", False)

    @is_capturing.setter
    def is_capturing(self, value: bool) -> None:
        self._capturing.value = value

    def add(self, kind: str) -> None:
        """Take note that the host waits.

        Raises:
            RuntimeError: where it must not.
        """
        (function, line), (caller, at) = callers()
        is_aside = threading.current_thread() is not threading.main_thread()
        wait = Wait(kind, function, line, f"{caller}, line {at}", is_aside)
        if self.is_capturing:
            raise RuntimeError(f"operation not permitted when stream is capturing: {wait}")
        if self.forbidden:
            raise RuntimeError(f"{self.forbidden}: {wait}")
        self.waits.append(wait)

    def clear(self) -> None:
        """Forget them, as at the end of a warm-up."""
        self.waits.clear()
        self.forbidden = ""

    def beyond(self, budget: Mapping[str, int], *, aside: bool = False) -> list[str]:
        """The waits of functions that have more of them than the budget, or are not in it."""
        counts = self.counts(aside=aside)
        return [
            str(wait)
            for wait in self.waits
            if wait.is_aside == aside and counts[wait.function] > budget.get(wait.function, 0)
        ]

    def counts(self, *, aside: bool = False) -> dict[str, int]:
        """Waits by function, of the thread that trains or of those beside it."""
        return dict(Counter(wait.function for wait in self.waits if wait.is_aside == aside))


def callers() -> tuple[tuple[str, int], tuple[str, int]]:
    """The innermost function of this repository with its line, and that around it."""
    found = list(islice(_frames(), 2)) or [("?", 0)]
    return found[0], found[-1]


def _frames() -> Iterator[tuple[str, int]]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(f"{ROOT}/") and path not in DEVICE_FILES:
            # A comprehension is a function of its own or not, by the version of Python.
            name = frame.f_code.co_qualname.split(".<locals>.<")[0].replace(".<locals>", "")
            yield f"{path.removeprefix(f'{ROOT}/')}:{name}", frame.f_lineno
        frame = frame.f_back
