"""Wan's videos: their frames, what of the family is refused, and its versions' own calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    LTXPipeline,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from refusals import Refusal
from tiny_pipelines import (
    FRAMES,
    PROMPTS,
    RESOLUTION,
    STEPS,
    backbone_of,
    ode_images,
    own_call,
    settings_of,
    tiny_pipeline,
    use_first_order,
)
from tolerances import assert_same_sum

from lacfast import LoRAConfig, PipelineSettings, SamplerConfig, load_backbone
from lacfast.backbones.casting import cast_weights
from lacfast.checkpoint import save_backbone
from lacfast.runtime.memory import BatchSize, DoesNotFitError


@pytest.mark.parametrize(("num_frames", "latent_frames"), [(1, 1), (5, 2), (9, 3)])
def test_a_video_has_the_frames_that_are_asked_for(num_frames: int, latent_frames: int) -> None:
    backbone = load_backbone(tiny_pipeline("wan"), settings=settings_of("wan", num_frames=num_frames))
    assert backbone.latent_shape == (4, latent_frames, 4, 4)
    assert backbone.judged_frames == min(3, num_frames)
    videos = backbone.decode(torch.randn(2, *backbone.latent_shape))
    assert videos.shape == (2, num_frames, 3, *RESOLUTION)
    assert 0 <= videos.min() < videos.max() <= 1


def test_without_settings_a_video_is_that_of_the_pipeline_s_own_call() -> None:
    backbone = load_backbone(tiny_pipeline("wan"))
    assert backbone.latent_shape == (4, 21, 120, 208)


def test_a_video_is_decoded_alone_whatever_the_batch() -> None:
    backbone = backbone_of(tiny_pipeline("wan"))
    latents = torch.randn((3, *backbone.latent_shape), generator=torch.Generator().manual_seed(0))
    decoded: list[int] = []
    own = backbone.codec.decode
    backbone.codec.decode = lambda part: decoded.append(len(part)) or own(part)  # type: ignore[method-assign]
    together = backbone.decode(latents)
    assert decoded == [1, 1, 1]
    assert all(torch.equal(together[row], own(latents[row : row + 1])[0]) for row in range(3))
    # In one go, as a decoder of pictures.
    backbone._decoding = BatchSize(0, unit="image", setting="")
    assert_same_sum(backbone.decode(latents), together, unit=1)


def test_a_video_that_does_not_fit_is_called_one() -> None:
    backbone = backbone_of(tiny_pipeline("wan"))

    def decode(latents: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("nothing is free")

    backbone.codec.decode = decode  # type: ignore[method-assign]
    with pytest.raises(DoesNotFitError, match="out of memory with a single video"):
        backbone.decode(torch.zeros(2, *backbone.latent_shape))


def test_a_negative_prompt_and_another_shift_give_the_pipeline_s_own_videos() -> None:
    pipeline = tiny_pipeline("wan")
    pipeline.scheduler = UniPCMultistepScheduler.from_config(pipeline.scheduler.config, flow_shift=8.0)
    use_first_order(pipeline)
    backbone = load_backbone(pipeline, settings=settings_of("wan", negative_prompt="blue sky"))
    latents, videos = ode_images(backbone, PROMPTS[:2], 5.0)
    arguments = {"negative_prompt": ["blue sky"] * 2}
    expected = own_call(pipeline, PROMPTS[:2], latents.clone(), 5.0, **arguments)
    torch.testing.assert_close(videos, expected, rtol=0, atol=1e-4)
    plain = own_call(pipeline, PROMPTS[:2], latents.clone(), 5.0)
    assert not torch.allclose(videos, plain, atol=1e-3)
    levels = [
        backbone_of(each).transition_table(SamplerConfig(num_steps=STEPS)).sigmas
        for each in (pipeline, tiny_pipeline("wan"))
    ]
    assert (levels[0][1:-1] > levels[1][1:-1]).all()


@pytest.mark.parametrize("family", ["wan", "sana"])
def test_the_first_step_of_a_solver_s_levels_keeps_the_sample(family: str) -> None:
    table = backbone_of(tiny_pipeline(family)).transition_table(SamplerConfig(num_steps=10))
    assert 0.999 < table.sigmas[0] < 1
    assert (table.a.abs() <= 1).all()
    assert (table.std <= 1).all()


def test_a_euler_scheduler_is_taken_as_it_is() -> None:
    pipeline = tiny_pipeline("wan")
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    latents, videos = ode_images(backbone_of(pipeline), PROMPTS[:2], 1.0)
    expected = own_call(pipeline, PROMPTS[:2], latents.clone(), 1.0)
    torch.testing.assert_close(videos, expected, rtol=0, atol=1e-4)


def test_a_timestep_for_every_token_is_one_for_all() -> None:
    """Wan 2.2's model of 5B takes them so, and has an autoencoder of patches."""
    pipeline = tiny_pipeline("wan")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        autoencoder = AutoencoderKLWan(
            base_dim=8,
            decoder_base_dim=8,
            z_dim=4,
            dim_mult=[1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[True, True],
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[2.0, 1.5, 1.0, 0.5],
            is_residual=True,
            in_channels=12,
            out_channels=12,
            patch_size=2,
            scale_factor_temporal=4,
            scale_factor_spatial=8,
        )
    parts = {name: part for name, part in pipeline.components.items() if name != "vae"}
    later = WanPipeline(**parts, vae=autoencoder, expand_timesteps=True)
    later.set_progress_bar_config(disable=True)
    use_first_order(later)
    backbone = backbone_of(later, resolution=(32, 48))
    assert backbone.latent_shape == (4, 2, 4, 6)
    latents, videos = ode_images(backbone, PROMPTS[:2], 4.0)
    expected = own_call(later, PROMPTS[:2], latents.clone(), 4.0, resolution=(32, 48))
    torch.testing.assert_close(videos, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "refusal"),
    [
        (
            PipelineSettings(num_frames=16),
            Refusal(
                "num_frames=16 must be 1 more than a multiple of 4",
                cause="Frames of a video that no number of latent frames decodes to.",
                remedy="use 17",
            ),
        ),
        (
            PipelineSettings(num_frames=5, vae_slicing=True),
            Refusal(
                "vae_slicing=True would be ignored: videos are decoded one after the other",
                cause="A memory saving of batches of pictures, for videos.",
                remedy="leave it out, or use vae_tiling",
            ),
        ),
        (
            PipelineSettings(num_frames=5, judged_frames=6),
            Refusal(
                "judged_frames=6 exceeds the 5 frames that a video has",
                cause="More frames for rewards of images than a video has.",
                remedy="use at most 5, or a larger num_frames",
            ),
        ),
    ],
)
def test_frames_that_no_video_has_are_refused(settings: PipelineSettings, refusal: Refusal) -> None:
    with refusal.raised():
        load_backbone(tiny_pipeline("wan"), settings=settings)


def test_the_remedies_are_taken() -> None:
    with pytest.raises(ValueError, match=r"num_frames=2 must be .* use 1"):
        load_backbone(tiny_pipeline("wan"), settings=PipelineSettings(num_frames=2))
    with pytest.raises(
        ValueError, match=r"resolution=\(20, 16\) must be a multiple of 8 pixels; use \(16, 16\)"
    ):
        load_backbone(tiny_pipeline("wan"), settings=PipelineSettings(resolution=(20, 16)))


def test_frames_of_a_picture_are_refused() -> None:
    pipeline = tiny_pipeline("sd3")
    with Refusal(
        "num_frames=5 would be ignored: a StableDiffusion3Pipeline makes pictures and no videos",
        cause="Frames of a video for a family of pictures.",
        remedy="leave it out",
    ).raised():
        load_backbone(pipeline, settings=PipelineSettings(resolution=RESOLUTION, num_frames=5))
    with pytest.raises(ValueError, match="judged_frames=2 would be ignored"):
        load_backbone(pipeline, settings=PipelineSettings(resolution=RESOLUTION, judged_frames=2))


def test_two_models_and_models_of_pictures_and_prompts_are_refused() -> None:
    pipeline = tiny_pipeline("wan")
    two = WanPipeline(**pipeline.components | {"transformer_2": pipeline.transformer}, boundary_ratio=0.9)
    halved = {"transformer": None, "transformer_2": pipeline.transformer}
    low_alone = WanPipeline(**pipeline.components | halved)
    for each in (two, low_alone):
        with Refusal(
            "the WanPipeline has two transformers",
            cause="Wan 2.2 of 14B, whose two models share the denoising.",
            remedy="load Wan 2.1, or Wan2.2-TI2V-5B",
        ).raised():
            backbone_of(each)
    config = {name: value for name, value in pipeline.transformer.config.items() if not name.startswith("_")}
    for changes in ({"in_channels": 9}, {"image_dim": 8, "added_kv_proj_dim": 32}):
        pipeline.transformer = WanTransformer3DModel.from_config(config | changes)
        with Refusal(
            "the WanTransformer3DModel takes a picture beside the prompt",
            cause="A Wan model of image to video in a WanPipeline.",
            remedy="load a model that makes videos from prompts alone",
        ).raised():
            backbone_of(pipeline)


@pytest.mark.parametrize("kind", [WanImageToVideoPipeline, LTXPipeline])
def test_other_pipelines_of_videos_are_refused_by_name(kind: Any, tmp_path: Path) -> None:
    pipeline = tiny_pipeline("wan")
    pipeline.__class__ = kind
    with pytest.raises(ValueError, match=rf"no backbone for {kind.__name__}; known: .*WanPipeline"):
        load_backbone(pipeline)
    (tmp_path / "model_index.json").write_text(f'{{"_class_name": "{kind.__name__}"}}', encoding="utf-8")
    with pytest.raises(ValueError, match=rf"no backbone for {kind.__name__}; known: .*WanPipeline"):
        load_backbone(tmp_path)


def test_a_cast_keeps_in_float32_what_diffusers_keeps(tmp_path: Path) -> None:
    pipeline = tiny_pipeline("wan")
    pipeline.transformer.save_pretrained(tmp_path)
    cast_weights(pipeline.transformer, torch.bfloat16)
    loaded = WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    ours, theirs = pipeline.transformer.state_dict(), loaded.state_dict()
    assert {name: tensor.dtype for name, tensor in ours.items()} == {
        name: tensor.dtype for name, tensor in theirs.items()
    }
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert pipeline.transformer.rope.freqs_cos.dtype == torch.float32
    assert {ours["scale_shift_table"].dtype, ours["proj_out.weight"].dtype} == {torch.float32, torch.bfloat16}

    backbone = backbone_of(tiny_pipeline("wan"), lora=LoRAConfig(rank=2), dtype=torch.bfloat16)
    assert backbone.dtype == torch.bfloat16
    assert backbone.model.scale_shift_table.dtype == torch.float32
    cast_weights(pipeline.transformer, torch.float64)
    assert {tensor.dtype for tensor in pipeline.transformer.state_dict().values()} == {torch.float64}


def test_a_saved_directory_keeps_the_frames(tmp_path: Path) -> None:
    settings = settings_of("wan", num_frames=FRAMES, judged_frames=2)
    backbone = load_backbone(tiny_pipeline("wan"), settings=settings)
    save_backbone(backbone, tmp_path / "saved")
    assert "pipeline_tag: text-to-video\n" in (tmp_path / "saved" / "README.md").read_text(encoding="utf-8")
    loaded = load_backbone(tmp_path / "saved")
    assert (loaded.latent_shape, loaded.judged_frames) == (backbone.latent_shape, 2)
