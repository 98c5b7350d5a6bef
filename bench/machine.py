"""What a result was measured on: without it a time means nothing."""

from __future__ import annotations

import datetime
import re
import shutil
import subprocess
from typing import Any

import torch

from lacfast.runs import environment


def describe(device: torch.device) -> dict[str, Any]:
    """Versions, processor, threads, GPU and driver, without names of hosts and users."""
    sections = environment.describe()
    machine = {name: sections[name] for name in ("versions", "processor", "cuda", "kernels")}
    machine["driver"] = _driver()
    machine["label"] = label(device)
    return machine


def label(device: torch.device) -> str:
    """The GPU's name or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return str(environment.describe()["processor"]["model"])


def maker() -> str:
    """The processor's maker in small letters: what tells apart the files of one bench on several machines."""
    return re.split(r"\W", label(torch.device("cpu")))[0].lower()


def today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "none"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip().splitlines()[0] if result.stdout.strip() else "unknown"
