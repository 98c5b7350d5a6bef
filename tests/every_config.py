"""All classes of settings, and what those need that have options without a default."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from dataclasses import is_dataclass
from typing import Any

import lacfast.config
import lacfast.runs.config
from lacfast.cli import Demo
from lacfast.compat.trl_config import DDPOConfig
from lacfast.config.checks import Config
from lacfast.rewards.remote import RetryConfig
from lacfast.runs.config import EvaluationRun, RunConfig

REQUIRED: dict[type[Config], dict[str, Any]] = {
    RunConfig: {"out": "x", "model": "shapes-dit", "prompts": "shapes", "rewards": (("shapes", 1.0),)},
    EvaluationRun: {"source": "shapes-dit", "prompts": "shapes", "rewards": ("shapes",)},
}
MACHINERY = ("lacfast.config.checks", "lacfast.config.unread")
"""Modules of lacfast.config that hold what settings are made of."""


def config_classes() -> list[type[Config]]:
    found: list[type[Config]] = [RetryConfig, DDPOConfig, Demo]
    modules = [lacfast.runs.config]
    for module in pkgutil.iter_modules(lacfast.config.__path__, "lacfast.config."):
        modules.append(importlib.import_module(module.name))
    for module in modules:
        for _, kind in inspect.getmembers(module, is_dataclass):
            if kind.__module__ == module.__name__ and kind.__module__ not in MACHINERY:
                found.append(kind)
    return found


CONFIGS = config_classes()
