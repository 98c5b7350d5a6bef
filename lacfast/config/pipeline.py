"""How a pipeline is used: size, prompts, decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from lacfast.config.checks import Config, Count, NonNegative, OneOf


@dataclass(frozen=True, kw_only=True)
class PipelineSettings(Config):
    """How a pipeline is used; a saved directory keeps them."""

    resolution: tuple[Count, Count] | None = None
    """(height, width) in pixels. None: the pipeline's own."""
    num_frames: Count | None = None
    """Frames of a video, 1 more than a multiple of those that a latent frame stands for, 4 of Wan. None: the
    pipeline's own, 81 of Wan."""
    judged_frames: Count | None = None
    """Frames of a video that a reward of images judges, evenly spaced from the first to the last; its score
    is their mean. 1: the middle one. None: 3, or as many as there are."""
    negative_prompt: str | None = None
    """Text in the prompt's place for classifier-free guidance. None: what the pipeline does without one."""
    max_sequence_length: Count | None = None
    """Tokens of a prompt but for CLIP's; SD 1.x and SDXL have no others. None: the pipeline's, 256 of SD3,
    300 of SANA and PixArt, else 512."""
    embedded_guidance: NonNegative | None = None
    """Guidance that a distilled FLUX is told; not classifier-free guidance. None: the pipeline's own, 3.5 of
    FLUX.1 and 4 of FLUX.2."""
    vae_dtype: Annotated[str, OneOf(("float32", "bfloat16", "float16"))] | None = None
    """Dtype that the decoder runs in. None: the decoder's own, but float32 where float16 overflows."""
    vae_slicing: bool = False
    """Decode one image at a time."""
    vae_tiling: bool = False
    """Decode an image in tiles."""
