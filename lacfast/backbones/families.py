"""The families of pipelines that are known here, and how a pipeline of one is opened."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline

from lacfast.backbones.flux import FLUX_PIPELINES
from lacfast.backbones.flux2 import FLUX2_PIPELINES
from lacfast.backbones.pipelines import PipelineFamily
from lacfast.backbones.pixart import PIXART_PIPELINES
from lacfast.backbones.qwen_image import QWEN_IMAGE_PIPELINES
from lacfast.backbones.sana import SANA_PIPELINES
from lacfast.backbones.sd3 import SD3_PIPELINES
from lacfast.backbones.sdxl import SDXL_PIPELINES
from lacfast.backbones.unet import SD15_PIPELINES
from lacfast.backbones.wan import WAN_PIPELINES
from lacfast.backbones.z_image import Z_IMAGE_PIPELINES

PIPELINES: dict[str, PipelineFamily] = {
    "StableDiffusionPipeline": SD15_PIPELINES,
    "StableDiffusionXLPipeline": SDXL_PIPELINES,
    "StableDiffusion3Pipeline": SD3_PIPELINES,
    "FluxPipeline": FLUX_PIPELINES,
    "Flux2Pipeline": FLUX2_PIPELINES,
    "Flux2KleinPipeline": FLUX2_PIPELINES,
    "QwenImagePipeline": QWEN_IMAGE_PIPELINES,
    "ZImagePipeline": Z_IMAGE_PIPELINES,
    "SanaPipeline": SANA_PIPELINES,
    "PixArtSigmaPipeline": PIXART_PIPELINES,
    "WanPipeline": WAN_PIPELINES,
}
"""diffusers' pipeline class -> how it is used. A new family is a file with such an object and a line here."""


def named_family(class_name: str) -> PipelineFamily:
    if class_name not in PIPELINES:
        raise ValueError(
            f"no backbone for {class_name}; known: {', '.join(PIPELINES)}. A class of your own that derives "
            "from one of them is loaded by you: pass the pipeline object"
        )
    return PIPELINES[class_name]


def family_of(pipeline: Any) -> PipelineFamily:
    """The family of a pipeline's class, or of the nearest that it derives from."""
    names = [kind.__name__ for kind in type(pipeline).__mro__]
    return named_family(next((name for name in names if name in PIPELINES), names[0]))


def open_pipeline(name: str, dtype: torch.dtype | None, *, is_frozen: bool) -> Any:
    """The pipeline of a directory or hub id.

    Args:
        name: directory or hub id.
        dtype: that it runs in. None: float32.
        is_frozen: a LoRA is trained; else the model's own weights are, which are loaded in float32.

    Raises:
        ValueError: when there is none, or none of a family that is known.
    """
    try:
        class_name = DiffusionPipeline.load_config(name)["_class_name"]
        family = named_family(class_name)
        dtypes: Any = dtype
        if dtype is not None and not is_frozen:
            dtypes = {family.model_part: torch.float32, "default": dtype}
        build: Any = DiffusionPipeline.from_pretrained
        return build(name, **({} if dtypes is None else {_dtype_argument(): dtypes}))
    except OSError as error:
        raise ValueError(
            f"{name!r} is no directory and could not be loaded from the hub: {error}; pass a pipeline "
            "object, a directory or a hub id like 'stable-diffusion-v1-5/stable-diffusion-v1-5'"
        ) from error


def _dtype_argument() -> str:
    """diffusers renamed it, and warns of the older name."""
    version = tuple(int(part) for part in diffusers.__version__.split(".")[:2])
    return "dtype" if version >= (0, 42) else "torch_dtype"
