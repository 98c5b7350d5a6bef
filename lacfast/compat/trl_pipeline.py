"""TRL's wrapper of a StableDiffusionPipeline: a call with log-probs, a step of the scheduler, its LoRA."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from torch import Tensor

from lacfast.backbones.trained_lora import loaded_lora
from lacfast.checkpoint import load_in_place
from lacfast.compat.ddpo import ddim_step_with_logprob, pipeline_with_logprob
from lacfast.config import LoRAConfig

log = logging.getLogger(__name__)

LORA = LoRAConfig(rank=4, alpha=4, target_modules=("to_k", "to_q", "to_v", "to_out.0"))
"""TRL's adapter."""
_OWN = ("DefaultDDPOStableDiffusionPipeline", "DDPOStableDiffusionPipeline", "object")
"""Classes whose methods do what the engine does."""


@dataclass
class DDPOPipelineOutput:
    """What a call of the wrapper returns."""

    images: Any
    """Images of the call's output_type."""
    latents: list[Tensor]
    """T + 1 of (B, C, H, W), from pure noise to clean."""
    log_probs: list[Tensor]
    """T of (B,)"""


@dataclass
class DDPOSchedulerOutput:
    """What a step of the scheduler returns."""

    latents: Tensor
    """(B, C, H, W)"""
    log_probs: Tensor
    """(B,)"""


class DefaultDDPOStableDiffusionPipeline:
    """A pipeline with a DDIM scheduler and no safety checker, and whether LoRA is trained."""

    def __init__(
        self, pretrained_model_name: str, *, pretrained_model_revision: str = "main", use_lora: bool = True
    ) -> None:
        """
        Args:
            pretrained_model_name: hub id or directory. The training of a pytorch_lora_weights.safetensors
                in it goes on.
            pretrained_model_revision: of the hub's repository.
            use_lora: train an adapter of rank 4 on the attention's projections, else all weights.
        """
        self.pretrained_model = pretrained_model_name
        self.pretrained_revision = pretrained_model_revision
        load: Any = StableDiffusionPipeline.from_pretrained
        self.sd_pipeline: Any = load(pretrained_model_name, revision=pretrained_model_revision)
        self.use_lora = _load_lora(
            self.sd_pipeline, pretrained_model_name, pretrained_model_revision, use_lora
        )
        from_config: Any = DDIMScheduler.from_config
        config = self.sd_pipeline.scheduler.config
        self.sd_pipeline.scheduler = from_config(config, clip_sample=False)
        self.sd_pipeline.safety_checker = None

    def __call__(self, *args: Any, **kwargs: Any) -> DDPOPipelineOutput:
        """Images, latents and log-probs; the arguments are `lacfast.compat.ddpo.pipeline_with_logprob`'s."""
        images, _, latents, log_probs = pipeline_with_logprob(self.sd_pipeline, *args, **kwargs)
        return DDPOPipelineOutput(images, latents, log_probs)

    def scheduler_step(self, *args: Any, **kwargs: Any) -> DDPOSchedulerOutput:
        """One DDIM step; the arguments are `lacfast.compat.ddpo.ddim_step_with_logprob`'s."""
        return DDPOSchedulerOutput(*ddim_step_with_logprob(self.scheduler, *args, **kwargs))

    @property
    def unet(self) -> Any:
        return self.sd_pipeline.unet

    @property
    def vae(self) -> Any:
        return self.sd_pipeline.vae

    @property
    def tokenizer(self) -> Any:
        return self.sd_pipeline.tokenizer

    @property
    def scheduler(self) -> Any:
        return self.sd_pipeline.scheduler

    @property
    def text_encoder(self) -> Any:
        return self.sd_pipeline.text_encoder

    @property
    def autocast(self) -> Any:
        """A context that changes nothing for LoRA, which casts by itself; None: the run's precision."""
        return contextlib.nullcontext if self.use_lora else None

    def set_progress_bar_config(self, **settings: Any) -> None:
        self.sd_pipeline.set_progress_bar_config(**settings)


def require_default_behaviour(wrapper: Any) -> None:
    """
    Raises:
        ValueError: for a wrapper with methods of its own, which the engine would not call.
    """
    hooks = [name for name in vars(DefaultDDPOStableDiffusionPipeline) if not name.startswith("__")]
    hooks += ["__call__", "get_trainable_layers", "save_checkpoint", "load_checkpoint", "save_pretrained"]
    own = {
        name
        for kind in type(wrapper).__mro__
        if kind.__name__ not in _OWN
        for name in vars(kind)
        if name in hooks
    }
    if own:
        raise ValueError(
            f"{type(wrapper).__name__} has its own {', '.join(sorted(own))}, which would not be called: the "
            "engine samples and trains its diffusers pipeline; pass that pipeline, and an adapter by lora="
        )


def take_adapter(pipeline: Any) -> tuple[LoRAConfig, dict[str, Tensor]] | None:
    """The LoRA that a wrapper has loaded, its weights by peft's names; the pipeline is plain afterwards.

    Raises:
        ValueError: for one that is not trained on.
    """
    trained = loaded_lora(pipeline, "unet", ("text_encoder",))
    if trained is None:
        return None
    config = trained.config("unet")
    state = {name: tensor.clone() for name, tensor in trained.state("unet").items()}
    pipeline.unload_lora_weights()
    return config, state


def continue_adapter(backbone: Any, state: dict[str, Tensor]) -> None:
    """Start the backbone's adapter at the weights of `take_adapter`."""
    load_in_place(backbone.policy_state(), state, "LoRA in the model's folder")


def _load_lora(pipeline: Any, source: str, revision: str, wanted: bool) -> bool:
    """Whether LoRA is trained: where one lies beside the model, it is."""
    try:
        pipeline.load_lora_weights(source, weight_name=LORA_WEIGHT_NAME_SAFE, revision=revision)
    except OSError:
        if wanted:
            log.info("%s holds no %s; a new adapter is trained", source, LORA_WEIGHT_NAME_SAFE)
        return wanted
    log.info("training goes on with %s of %s", LORA_WEIGHT_NAME_SAFE, Path(source))
    return True
