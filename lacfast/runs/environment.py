"""What `lacfast info` tells: versions, processor, CUDA, which kernels run here and why others do not."""

from __future__ import annotations

import importlib
import os
import platform
import re
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

PACKAGES = ("lacfast", "torch", "triton", "diffusers", "transformers", "peft", "safetensors", "numpy")
_REQUIREMENT = re.compile(r"([\w.-]+).*extra == [\"'](\w+)[\"']")


def extras() -> dict[str, list[str]]:
    """Optional extra -> the packages that it brings besides those of other extras."""
    found: dict[str, list[str]] = {}
    for requirement in [] if _version("lacfast") is None else requires("lacfast") or []:
        if (named := _REQUIREMENT.match(requirement)) and named[1] != "lacfast":
            found.setdefault(named[2], []).append(named[1])
    return found


def describe() -> dict[str, dict[str, Any]]:
    """Section -> name -> value, all of it plain enough for JSON."""
    return {
        "versions": {"python": platform.python_version()}
        | {name: _version(name) or "not installed" for name in PACKAGES},
        "processor": _processor(),
        "cuda": _cuda(),
        "kernels": _kernels(),
        "extras": {extra: _extra(extra, packages) for extra, packages in extras().items()},
        "files": {"encoded prompts": _prompt_files()},
    }


def _prompt_files() -> str:
    """Where the only files lie that lacfast writes elsewhere than it is told."""
    from huggingface_hub import constants

    return str(Path(constants.HF_ASSETS_CACHE) / "lacfast" / "prompts")


def show(console: Console) -> None:
    """Print `describe()` as a table."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for section, values in describe().items():
        table.add_row(f"[bold]{section}[/]", "")
        for name, value in values.items():
            style = "green" if value == "usable" else None
            table.add_row(f"  {name}", escape(_plain(value)), style=style)
    console.print(table, highlight=False)


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(value) if isinstance(value, list) else str(value)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> dict[str, Any]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "machine": platform.machine(),
        "model": _processor_model(),
        "cores": cores,
        "torch threads": torch.get_num_threads(),
        "instruction set (torch)": torch.backends.cpu.get_cpu_capability(),
        "instruction set (lacfast)": _instruction_set(),
    }


def _processor_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(
                (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown"
            )
    except OSError:
        return platform.processor() or "unknown"


def _instruction_set() -> str:
    try:
        return str(importlib.import_module("lacfast._C").instruction_set())
    except ImportError as error:
        return f"none: the native module does not load ({error})"


def _cuda() -> dict[str, Any]:
    import torch

    built = torch.version.cuda or "no: this is a CPU build"
    if not torch.cuda.is_available():
        return {"torch built for": built, "usable": False}
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return {
        "torch built for": built,
        "usable": True,
        "devices": [
            f"{device.name}, sm_{device.major}{device.minor}, {device.total_memory / 2**30:.0f} GiB"
            for device in devices
        ],
    }


def _kernels() -> dict[str, str]:
    """Each backend of lacfast.ops with "usable" or the reason why it is not."""
    from lacfast import ops

    return ops.available()


def _extra(extra: str, packages: list[str]) -> str:
    missing = [package for package in packages if _version(package) is None]
    return (
        "installed"
        if not missing
        else f"not installed ({', '.join(missing)}): pip install 'lacfast[{extra}]'"
    )
