"""SANA: diffusers' SanaTransformer2DModel as actor and as critic trunk."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SanaPipeline
from torch import nn

from lacfast.backbones.pipelines import UNDER_MASK, PipelineFamily
from lacfast.backbones.scheduler_choice import flow_scheduler
from lacfast.backbones.transformer import CrossAttentionBackbone
from lacfast.config import PipelineSettings, SamplerConfig
from lacfast.critic.trunk import Features
from lacfast.records import Conditioning, TransitionTable

SOLVER = "DPMSolverMultistepScheduler"
"""The scheduler that SANA is published with; its levels are a flow's."""


class SanaBackbone(CrossAttentionBackbone):
    """A velocity model with linear attention."""

    # diffusers' script for it.
    lora_targets = ("to_q", "to_k", "to_v")
    repeated_blocks = ("SanaTransformerBlock",)

    def __init__(self, model: Any, *args: Any, has_solver_levels: bool, **kwargs: Any) -> None:
        """Arguments as LatentBackbone, and `has_solver_levels`: whether the pipeline has SOLVER's."""
        super().__init__(model, *args, **kwargs)
        self.has_solver_levels = has_solver_levels

    @property
    def time_unit(self) -> float:
        unit: float = 1 / self.model.config["timestep_scale"]
        return unit

    def block_arguments(self) -> nn.Module:
        patch = self.model.config["patch_size"]
        return Grid(*(side // patch for side in self.latent_shape[1:]))

    def schedule_arguments(self, num_steps: int) -> dict[str, Any]:
        if not self.has_solver_levels:
            return {}
        # Before the shift: evenly from the noisiest level of training to none, which is left out.
        steps = self.scheduler.config["num_train_timesteps"]
        return {"sigmas": (1 - torch.linspace(1, 1 / steps, num_steps + 1, dtype=torch.float64)).flip(0)[:-1]}

    def transition_table(self, config: SamplerConfig) -> TransitionTable:
        table = super().transition_table(config)
        # The solver tells its model whole timesteps.
        return replace(table, timesteps=table.timesteps.trunc()) if self.has_solver_levels else table


class Grid(nn.Module):
    """Rows and columns of the image's tokens, which a block convolves."""

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.sides = {"height": height, "width": width}

    def forward(self, features: Features, conditioning: Conditioning) -> dict[str, Any]:
        return dict(self.sides)


def sana_scheduler(scheduler: Any) -> Any:
    """Euler steps at the levels of the solver that SANA is published with, or a flow's scheduler as it is.

    Raises:
        ValueError: for other noise levels than a shifted flow's.
    """
    config = scheduler.config
    is_flow = config.get("prediction_type") == "flow_prediction" and config.get("use_flow_sigmas", False)
    if type(scheduler).__name__ != SOLVER or not is_flow:
        return flow_scheduler(scheduler)
    return FlowMatchEulerDiscreteScheduler(  # type: ignore[no-untyped-call]
        num_train_timesteps=config["num_train_timesteps"], shift=config["flow_shift"]
    )


class SanaPipelines(PipelineFamily):
    """A family whose pipelines come with a solver of second order."""

    def arguments(
        self, pipeline: Any, settings: PipelineSettings, map_shape: tuple[int, ...]
    ) -> dict[str, Any]:
        return {"has_solver_levels": type(pipeline.scheduler).__name__ == SOLVER}


INSTRUCTION = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
"""What the pipeline puts before every prompt, but not before a negative one."""

SANA_PIPELINES = SanaPipelines(
    backbone_class=SanaBackbone,
    prompt_options={"complex_human_instruction": INSTRUCTION},
    **UNDER_MASK,
    scheduler=sana_scheduler,
)
"""SanaPipeline: SANA and SANA-1.5."""
