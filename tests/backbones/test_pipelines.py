"""A backbone is its pipeline: prompts, sampling and decoding agree with diffusers' own call."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from refusals import Refusal
from tiny_backbones import brightness
from tiny_pipelines import (
    FAMILIES,
    FRAMES,
    PROMPTS,
    RESOLUTION,
    SETTINGS,
    STEPS,
    VIDEOS,
    backbone_of,
    guided,
    load_pipeline,
    ode_images,
    own_call,
    saved_pipeline,
    settings_of,
    tiny_pipeline,
    unet,
    use_first_order,
)

from lacfast import LoRAConfig, PipelineSettings, SamplerConfig, SteeringConfig, load_backbone, steer
from lacfast.backbones.taps import Tap, record_taps
from lacfast.records import Conditioning, FirstSampleId
from lacfast.steering.particles import Particles

MASKED = ("qwen_image", "z_image", "sana", "pixart")
"""Families whose model is told which tokens are a prompt's."""


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("guidance_scale", "resolution"), [(1.0, RESOLUTION), (4.0, (16, 24))])
def test_sampling_without_noise_gives_the_pipeline_s_own_images(
    family: str, guidance_scale: float, resolution: tuple[int, int]
) -> None:
    pipeline = tiny_pipeline(family)
    use_first_order(pipeline)
    guidance_scale = guided(family, guidance_scale)
    backbone = backbone_of(pipeline, resolution=resolution)
    latents, images = ode_images(backbone, PROMPTS[:2], guidance_scale)
    expected = own_call(pipeline, PROMPTS[:2], latents.clone(), guidance_scale, resolution=resolution)
    frames = (FRAMES,) if family in VIDEOS else ()
    assert images.shape == (2, *frames, 3, *resolution)
    assert expected.std() > 0.01
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_other_predictions_give_the_pipeline_s_own_images(prediction_type: str) -> None:
    pipeline = tiny_pipeline("sd15")
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    pipeline.scheduler.register_to_config(prediction_type=prediction_type)
    use_first_order(pipeline)
    latents, images = ode_images(backbone_of(pipeline), PROMPTS[:2], 3.0)
    expected = own_call(pipeline, PROMPTS[:2], latents.clone(), 3.0)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_a_directory_loads_as_the_pipeline_in_it(family: str, tmp_path: Path) -> None:
    directory = saved_pipeline(family, tmp_path / family)
    before = torch.get_rng_state()
    latents, images = ode_images(backbone_of(directory), PROMPTS[:2], 2.0)
    assert torch.equal(torch.get_rng_state(), before)
    pipeline = load_pipeline(directory)
    use_first_order(pipeline)
    expected = own_call(pipeline, PROMPTS[:2], latents.clone(), 2.0)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_prompt_is_encoded_once_and_the_encoders_can_be_set_aside(family: str) -> None:
    pipeline = tiny_pipeline(family)
    backbone = backbone_of(pipeline)
    calls: list[str] = []
    own = pipeline.encode_prompt

    def counted(prompt: list[str], *args: Any, **kwargs: Any) -> Any:
        calls.extend(prompt)
        return own(prompt, *args, **kwargs)

    pipeline.encode_prompt = counted
    first = backbone.encode_prompts(PROMPTS[:2] * 2)
    again = backbone.encode_prompts(PROMPTS[:3])
    assert calls.count(PROMPTS[0]) == 1
    backbone.free_text_encoders()
    kept = backbone.encode_prompts(PROMPTS[:4])
    unconditional = backbone.encode_unconditional(2)
    for name, tensor in first.tensors.items():
        assert torch.equal(tensor[0], kept.tensors[name][0])
        assert torch.equal(again.tensors[name], kept.tensors[name][:3])
        assert unconditional.tensors[name].shape == (2, *tensor.shape[1:])
    before = len(calls)
    backbone.encode_prompts(["a red sky"])
    assert set(calls[before:]) == {"a red sky"}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_gives_the_same_bits_alone_and_in_any_batch(family: str) -> None:
    alone, together = backbone_of(tiny_pipeline(family)), backbone_of(tiny_pipeline(family))
    expected = together.encode_prompts(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        for name, tensor in alone.encode_prompts([prompt]).tensors.items():
            assert torch.equal(tensor[0], expected.tensors[name][row]), name


@pytest.mark.parametrize("family", MASKED)
def test_nothing_behind_a_prompt_s_mask_changes_a_bit(family: str) -> None:
    backbone = backbone_of(tiny_pipeline(family))
    told = backbone.encode_prompts(PROMPTS[:3]).tensors
    (mask,) = (tensor for name, tensor in told.items() if name.endswith("mask"))
    assert len(set(mask.sum(dim=1).tolist())) > 1
    sample, timestep = torch.randn(3, *backbone.latent_shape), torch.full((3,), 500.0)
    other = torch.where(mask.bool()[..., None], told["encoder_hidden_states"], 7.0)
    with torch.no_grad():
        outputs = [
            backbone.predict(sample, timestep, Conditioning(told | {"encoder_hidden_states": tokens}))
            for tokens in (told["encoder_hidden_states"], other, torch.zeros_like(other))
        ]
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_negative_prompt_takes_the_empty_one_s_place(family: str) -> None:
    settings = settings_of(family, negative_prompt="blue sky")
    plain, negative = (
        backbone_of(tiny_pipeline(family)),
        load_backbone(tiny_pipeline(family), settings=settings),
    )
    tokens = "encoder_hidden_states"
    if family == "sana":
        # It puts its instruction before prompts only.
        encoder: Any = negative.prompt_encoder
        encoder.family = replace(encoder.family, prompt_options={})
    expected = negative.encode_prompts(["blue sky"]).tensors[tokens]
    torch.testing.assert_close(negative.encode_unconditional(1).tensors[tokens], expected)
    assert not torch.allclose(plain.encode_unconditional(1).tensors[tokens], expected)


def test_sdxl_is_told_size_and_pooled_embedding() -> None:
    backbone = backbone_of(tiny_pipeline("sdxl"))
    conditioning = backbone.encode_prompts(PROMPTS[:2])
    assert conditioning.tensors["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]] * 2
    sample, timestep = torch.randn(2, 4, 8, 8), torch.full((2,), 500.0)
    with torch.no_grad():
        output = backbone.predict(sample, timestep, conditioning)
        for name in ("text_embeds", "time_ids"):
            changed = {**conditioning.tensors, name: conditioning.tensors[name] + 1}
            other = backbone.predict(sample, timestep, type(conditioning)(changed))
            assert not torch.allclose(output, other), name


def test_flux_is_told_its_guidance_and_the_shift_of_its_resolution() -> None:
    pipeline = tiny_pipeline("flux")
    backbone = backbone_of(pipeline)
    assert backbone.latent_shape == (16, 16)
    assert backbone.encode_prompts(PROMPTS[:1]).tensors["guidance"].tolist() == [3.5]
    larger = load_backbone(pipeline, settings=PipelineSettings(resolution=(64, 64)))
    config = SamplerConfig(num_steps=4)
    assert larger.transition_table(config).sigmas[1] > backbone.transition_table(config).sigmas[1]


def test_steering_rescales_guidance_as_sampling_does() -> None:
    pipeline = tiny_pipeline("qwen_image")
    backbone = backbone_of(pipeline)
    images, _ = steer(
        backbone,
        PROMPTS[:2],
        SteeringConfig(method="best_of_n", particles=1, selection="reward"),
        sampler=SamplerConfig(kind="ode", noise_level=0.0, num_steps=STEPS, guidance_scale=4.0),
        rewards=brightness,
    )
    ids = FirstSampleId.STEERING + torch.arange(2)
    start = Particles.start(backbone.latent_shape, ids, 1, 0).sample
    torch.testing.assert_close(images, own_call(pipeline, PROMPTS[:2], start, 4.0), rtol=0, atol=1e-4)


def test_z_image_s_prompts_of_two_buckets_stand_in_one_batch() -> None:
    """Behind more than 32 tokens of a prompt the image begins later."""
    pipeline = tiny_pipeline("z_image")
    long = replace(SETTINGS, max_sequence_length=64)
    backbone = load_backbone(pipeline, settings=long)
    prompts = ["a cat", " ".join(["red", "blue", "sky"] * 12)]
    assert backbone.encode_prompts(prompts).tensors["encoder_hidden_states_mask"].sum(1).tolist() == [4, 40]
    latents, images = ode_images(backbone, prompts, 3.0)
    arguments = {"num_inference_steps": STEPS, "guidance_scale": 2.0, "max_sequence_length": 64}
    size = dict(zip(("height", "width"), RESOLUTION, strict=True))
    expected = pipeline(prompts, latents=latents, output_type="pt", **arguments, **size).images
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-4)


def test_flux_says_that_guidance_scale_is_not_the_guidance_that_it_is_told() -> None:
    backbone = backbone_of(tiny_pipeline("flux"))
    with pytest.warns(UserWarning, match=r"guidance_scale=3.5 is classifier-free.*embedded_guidance=3.5"):
        backbone.transition_table(SamplerConfig(num_steps=4, guidance_scale=3.5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backbone.transition_table(SamplerConfig(num_steps=4))
        backbone_of(tiny_pipeline("sd3")).transition_table(SamplerConfig(num_steps=4, guidance_scale=3.5))


@pytest.mark.parametrize(
    ("family", "length", "refusal"),
    [
        (
            "sdxl",
            128,
            Refusal(
                "max_sequence_length=128 would be ignored: a StableDiffusionXLPipeline has the length of its",
                cause="A length of prompts for a pipeline that only has CLIP encoders.",
                remedy="leave it out",
            ),
        ),
        (
            "flux",
            513,
            Refusal(
                "max_sequence_length=513 is more than a FluxPipeline takes",
                cause="Longer prompts than the pipeline's own call takes.",
                remedy="use at most 512",
            ),
        ),
    ],
)
def test_a_length_of_prompts_that_a_pipeline_does_not_have_is_refused(
    family: str, length: int, refusal: Refusal
) -> None:
    with refusal.raised():
        load_backbone(
            tiny_pipeline(family),
            settings=PipelineSettings(resolution=RESOLUTION, max_sequence_length=length),
        )


def test_a_guidance_that_a_model_is_not_told_is_refused() -> None:
    settings = PipelineSettings(resolution=RESOLUTION, embedded_guidance=4.0)
    with Refusal(
        "embedded_guidance=4.0 would be ignored: the SD3Transformer2DModel is told no guidance",
        cause="The guidance of a distilled FLUX for another model.",
        remedy="SamplerConfig(guidance_scale=4.0)",
    ).raised():
        load_backbone(tiny_pipeline("sd3"), settings=settings)


def test_timesteps_reach_the_model_whole() -> None:
    backbone = backbone_of(tiny_pipeline("sd3"))
    sample, conditioning = torch.randn(1, 4, 8, 8), backbone.encode_prompts(PROMPTS[:1])
    with torch.no_grad():
        outputs = [backbone.predict(sample, torch.tensor([time]), conditioning) for time in (500.25, 500.75)]
    assert not torch.equal(*outputs)


def test_bad_sources_and_settings_get_one_error_with_the_remedy(tmp_path: Path) -> None:
    with Refusal(
        "resolution=(18, 16) must be a multiple of 4 pixels",
        cause="Sides that the model's patches do not divide.",
        remedy="use (16, 16)",
    ).raised():
        load_backbone(tiny_pipeline("sd3"), settings=PipelineSettings(resolution=(18, 16)))
    with Refusal(
        "holds no model_index.json",
        cause="A directory that holds no model.",
        remedy="pass a diffusers pipeline's directory or one that trainer.save()",
    ).raised():
        load_backbone(tmp_path)
    with Refusal(
        "is no directory and could not be loaded from the hub",
        cause="A path that does not exist, a hub id that is misspelled, or a hub that cannot be reached.",
        remedy="pass a pipeline object, a directory or a hub id like",
    ).raised():
        load_backbone(tmp_path / "missing")
    with Refusal(
        "unknown vae_dtype 'float99'",
        cause="A dtype that no decoder runs in.",
        remedy="Known: float32, bfloat16, float16",
    ).raised():
        PipelineSettings(vae_dtype="float99")


@pytest.mark.parametrize(
    ("arguments", "refusal"),
    [
        (
            {"source": unet(cross_attention_dim=16)},
            Refusal(
                "a UNet2DConditionModel is only a pipeline's model",
                cause="`load_backbone` got a bare UNet or transformer.",
                remedy="pass the pipeline that holds it, its directory or its hub id",
            ),
        ),
        (
            {"source": 3},
            Refusal(
                "a int is no pipeline",
                cause="`load_backbone` got something else than a pipeline or a name.",
                remedy="pass the pipeline that holds it, its directory or its hub id",
            ),
        ),
        (
            {"source": "somewhere", "dtype": "bfloat16"},
            Refusal(
                "dtype='bfloat16' is a str",
                cause="A dtype's name in the place of torch's.",
                remedy="pass a torch.dtype or None",
            ),
        ),
        (
            {"source": "somewhere", "lora": 4},
            Refusal(
                "lora=4 is a int",
                cause="A rank in the place of a LoRAConfig.",
                remedy="pass a lacfast.config.critic.LoRAConfig or None",
            ),
        ),
        (
            {"source": "somewhere", "settings": {"resolution": (16, 16)}},
            Refusal(
                "settings={'resolution': (16, 16)} is a dict",
                cause="A dict in the place of PipelineSettings.",
                remedy="pass a lacfast.config.pipeline.PipelineSettings or None",
            ),
        ),
    ],
)
def test_what_load_backbone_does_not_take_is_refused(arguments: dict[str, Any], refusal: Refusal) -> None:
    with refusal.raised():
        load_backbone(**arguments)


def test_options_of_another_type_are_refused_and_no_targets_are_not_all_targets() -> None:
    with Refusal(
        "resolution=16 must be a tuple",
        cause="One side in the place of height and width.",
        remedy="(a whole number, a whole number)",
    ).raised():
        PipelineSettings(resolution=16)  # type: ignore[arg-type]
    with Refusal(
        "target_modules='to_q' must be a tuple",
        cause="One name in the place of several.",
        remedy="(text, ...)",
    ).raised():
        LoRAConfig(target_modules="to_q")  # type: ignore[arg-type]
    with Refusal(
        "target_modules=[] match no module of UNet2DConditionModel",
        cause="Names of layers that the model does not have.",
        remedy="leave it out for the family's own",
    ).raised():
        backbone_of(tiny_pipeline("sd15"), lora=LoRAConfig(target_modules=()))


def test_a_class_of_one_s_own_is_used_as_the_one_it_derives_from_and_others_are_refused(
    tmp_path: Path,
) -> None:
    pipeline = tiny_pipeline("sd3")
    _, expected = ode_images(backbone_of(pipeline), PROMPTS[:1], 1.0)
    pipeline.__class__ = type("OwnPipeline", (type(pipeline),), {})
    _, images = ode_images(backbone_of(pipeline), PROMPTS[:1], 1.0)
    assert torch.equal(images, expected)
    pipeline.save_pretrained(tmp_path)
    with Refusal(
        "no backbone for OwnPipeline; known: StableDiffusionPipeline",
        cause="A directory or hub id of a pipeline of another family, or of a class of your own.",
        remedy="pass the pipeline object",
    ).raised():
        load_backbone(tmp_path)
    pipeline.__class__ = type("OtherPipeline", (DiffusionPipeline,), {})
    with pytest.raises(ValueError, match="no backbone for OtherPipeline; known: StableDiffusionPipeline"):
        load_backbone(pipeline)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_unet_takes_every_size_that_its_pipeline_does(family: str) -> None:
    pipeline = tiny_pipeline(family)
    # Three halvings, as in SD 1.x: 12 latents become 6, 3 and 2, and 20 become 10, 5 and 3.
    pipeline.unet = UNet2DConditionModel.from_config(
        pipeline.unet.config,
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    )
    use_first_order(pipeline)
    backbone = load_backbone(pipeline, settings=PipelineSettings(resolution=(24, 40)))
    assert backbone.latent_shape == (4, 12, 20)
    latents, images = ode_images(backbone, PROMPTS[:1], 1.0)
    arguments = {"num_inference_steps": STEPS, "guidance_scale": 1.0, "output_type": "pt"}
    expected = pipeline(PROMPTS[:1], height=24, width=40, latents=latents, **arguments).images
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-4)
    # The critic's copies of the up blocks find the odd sizes too.
    trunk = backbone.branch_trunk(3)
    sample, timestep, conditioning = latents, torch.tensor([500.0]), backbone.encode_prompts(PROMPTS[:1])
    levels = [Tap(f"up_blocks.{level}", lambda _, output, level=level: {level: output}) for level in range(3)]
    with (
        torch.no_grad(),
        record_taps(backbone.model, levels) as actor,
        trunk.record(backbone.model) as features,
    ):
        backbone.predict(sample, timestep, conditioning)
        taps = trunk(features, sample, timestep, conditioning)
    for level, tap in enumerate(taps[1:]):
        torch.testing.assert_close(tap, actor[level].flatten(2).mT)


@pytest.mark.parametrize("family", ["sd15", "sd3", "flux"])
def test_an_attention_backend_is_pinned_or_refused(family: str) -> None:
    backbone = backbone_of(tiny_pipeline(family), attention_backend="sdpa")
    own = backbone_of(tiny_pipeline(family))
    images, expected = (ode_images(each, PROMPTS[:1], 1.0)[1] for each in (backbone, own))
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-4)
    for name in ("flash", "nonsense"):
        refusal = Refusal(
            "cannot be used here",
            cause="An attention backend that is not installed, or that the model's layers do not take.",
            remedy="leave it out for the model's own",
        )
        with refusal.raised() as caught:
            backbone_of(tiny_pipeline(family), attention_backend=name)
        assert f"attention_backend={name!r}" in str(caught.value)


def test_the_decoder_can_be_sliced_and_run_in_bfloat16() -> None:
    latents = torch.randn(3, 4, 8, 8)
    images = [
        load_backbone(tiny_pipeline("sd3"), settings=settings).decode(latents)
        for settings in (
            SETTINGS,
            PipelineSettings(resolution=RESOLUTION, vae_slicing=True),
            PipelineSettings(resolution=RESOLUTION, vae_dtype="bfloat16"),
        )
    ]
    assert all(image.dtype == torch.float32 for image in images)
    torch.testing.assert_close(images[0], images[1], rtol=0, atol=1e-5)
    torch.testing.assert_close(images[0], images[2], rtol=0, atol=0.05)
    assert not torch.equal(images[0], images[2])
