"""A driver of Triton without a GPU: kernels are compiled for one, and their launches are kept."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from triton.backends.compiler import GPUTarget


class LaunchRecorder:
    """What stands in `triton.runtime.driver.driver._active`; nothing that it is told to launch runs."""

    utils = SimpleNamespace(
        load_binary=lambda name, *_: (object(), SimpleNamespace(name=name), 32, 0, 1024),
        # An H100's.
        get_device_properties=lambda _: {"max_shared_mem": 227 << 10},
    )

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []
        """Three sizes of the grid, a stream, the function, two of Triton's own, the kernel's arguments."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 7

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *arguments: self.launches.append(arguments)
