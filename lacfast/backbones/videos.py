"""Pipelines that make videos: how many frames, and how many of them a latent frame stands for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lacfast.backbones.pipelines import PipelineFamily
from lacfast.config import PipelineSettings
from lacfast.rewards.frames import JUDGED_FRAMES


@dataclass(frozen=True, kw_only=True)
class VideoPipelines(PipelineFamily):
    """A family on latents (C, F, H, W): the first latent frame is one of the video, each other several."""

    num_frames: int
    """Frames of the pipeline's own call."""
    has_frames: bool = True
    scale_factor: str = "vae_scale_factor_spatial"

    def require_read(self, settings: PipelineSettings, pipeline: Any) -> None:
        super().require_read(settings, pipeline)
        frames, step = self._frames(settings), pipeline.vae_scale_factor_temporal
        if (frames - 1) % step:
            near = round((frames - 1) / step) * step + 1
            raise ValueError(
                f"num_frames={frames} must be 1 more than a multiple of {step}, as many as a latent frame "
                f"stands for; use {near}"
            )
        if settings.vae_slicing:
            raise ValueError(
                "vae_slicing=True would be ignored: videos are decoded one after the other; leave it out, or "
                "use vae_tiling, which splits their frames"
            )
        if settings.judged_frames is not None and settings.judged_frames > frames:
            raise ValueError(
                f"judged_frames={settings.judged_frames} exceeds the {frames} frames that a video has; use "
                f"at most {frames}, or a larger num_frames"
            )

    def latent_map(self, pipeline: Any, settings: PipelineSettings) -> tuple[int, ...]:
        channels, *sides = super().latent_map(pipeline, settings)
        return (channels, (self._frames(settings) - 1) // pipeline.vae_scale_factor_temporal + 1, *sides)

    def judged_frames(self, settings: PipelineSettings) -> int:
        return settings.judged_frames or min(JUDGED_FRAMES, self._frames(settings))

    def _frames(self, settings: PipelineSettings) -> int:
        return settings.num_frames or self.num_frames
