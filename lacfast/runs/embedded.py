"""What needs no download: prompts of the embedded tasks, and their models, pretrained on the spot."""

from __future__ import annotations

from lacfast.config import SamplerConfig
from lacfast.prompts import PromptSet, load_prompts
from lacfast.runs.config import RunConfig
from lacfast.schedule import FLOW_KINDS
from lacfast.tasks import crowds, glyphs, scenes, words
from lacfast.tasks.animals import animal_prompts
from lacfast.tasks.models import BackboneName
from lacfast.tasks.pretraining import CONFIGS
from lacfast.tasks.task import Task

TASKS = {"crowds": crowds.TASK, "glyphs": glyphs.TASK, "shapes": scenes.TASK, "words": words.TASK}
TINY_MODELS: dict[str, tuple[Task, BackboneName]] = {
    f"{name}-{backbone}": (task, backbone) for name, task in TASKS.items() for backbone in CONFIGS
}
"""Models that are pretrained on the spot; lacfast.runs.config has their names."""
_HELD_OUT = "-held-out"
PROMPT_SOURCES = ("animals", *TASKS, *(name + _HELD_OUT for name in TASKS))
"""Prompts that need no file."""


def prompts_of(source: str) -> PromptSet:
    """The prompts of a built-in source, a file or a directory."""
    if source not in PROMPT_SOURCES:
        return load_prompts(source)
    if source == "animals":
        return load_prompts(animal_prompts())
    trained, held_out = TASKS[source.removesuffix(_HELD_OUT)].split()
    return load_prompts(held_out if source.endswith(_HELD_OUT) else trained)


def require_flow(config: RunConfig) -> None:
    """A pipeline's sampler is tried where its memory is planned, a tiny model's would be after pretraining.

    Raises:
        ValueError: for a sampler of another kind.
    """
    for name in ("sampler", "eval_sampler"):
        sampler: SamplerConfig | None = getattr(config.train, name)
        if sampler is not None and sampler.kind not in FLOW_KINDS:
            raise ValueError(
                f"{config.model} is a flow, and train.{name}.kind={sampler.kind!r} is for diffusion models; "
                f"use one of {', '.join(sorted(FLOW_KINDS))}"
            )
