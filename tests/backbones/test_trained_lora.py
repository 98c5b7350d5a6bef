"""A trained LoRA is trained on or merged, whichever program made it, and the KL knows where it began."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from refusals import Refusal
from safetensors.torch import load_file, save_file
from tiny_backbones import tiny_backbone
from tiny_pipelines import (
    FAMILIES,
    PROMPTS,
    backbone_of,
    guided,
    load_as_card_says,
    ode_images,
    own_call,
    saved_pipeline,
    settings_of,
    tiny_pipeline,
    use_first_order,
)
from tiny_trainers import anchor_output, clones, config_for, differing, trainer_of
from torch import Tensor

from lacfast import LoRAConfig, load_backbone
from lacfast.backbones import trained_lora
from lacfast.checkpoint import save_backbone
from lacfast.config import KLPenalty

TARGETS = ["to_q", "to_v", "to_out.0"]


def part_of(pipeline: Any) -> str:
    return "unet" if hasattr(pipeline, "unet") else "transformer"


def adapted(family: str, **settings: Any) -> tuple[Any, dict[str, Tensor]]:
    """A pipeline with a LoRA of somebody else's, and its weights."""
    pipeline = tiny_pipeline(family)
    model = getattr(pipeline, part_of(pipeline))
    chosen = {"r": 3, "lora_alpha": 6, "target_modules": TARGETS, "init_lora_weights": False} | settings
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        inject_adapter_in_model(LoraConfig(**chosen), model, adapter_name="default")
    return pipeline, get_peft_model_state_dict(model, adapter_name="default")


def by_diffusers(family: str, directory: Path, *, with_metadata: bool = True, **settings: Any) -> Path:
    pipeline, state = adapted(family, **settings)
    part = part_of(pipeline)
    told = getattr(pipeline, part).peft_config["default"].to_dict() if with_metadata else None
    pipeline.save_lora_weights(
        directory, **{f"{part}_lora_layers": state, f"{part}_lora_adapter_metadata": told}
    )
    return directory


def by_peft(family: str, directory: Path, **settings: Any) -> Path:
    """As trainers save that wrap the model in a PeftModel: flow_grpo, DanceGRPO."""
    _, state = adapted(family, **settings)
    pipeline = tiny_pipeline(family)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS, **settings)
    wrapped = get_peft_model(getattr(pipeline, part_of(pipeline)), config)
    wrapped.save_pretrained(directory)
    names = load_file(directory / "adapter_model.safetensors")
    assert {name.removeprefix("base_model.model.") for name in names} == set(state)
    save_file(
        {name: state[name.removeprefix("base_model.model.")] for name in names},
        directory / "adapter_model.safetensors",
    )
    return directory


def by_kohya(directory: Path, *more: str) -> Path:
    """sd-scripts' layout of an SD 1.5 LoRA: its own names, alpha as a tensor per module, `more` beside it."""
    _, state = adapted("sd15", target_modules=["to_q", "to_v"])
    written = {}
    for name, tensor in state.items():
        module, projection, _ = name.rsplit(".", 2)
        key = "lora_unet_" + module.replace(".", "_")
        written[f"{key}.{'lora_down' if projection == 'lora_A' else 'lora_up'}.weight"] = tensor.contiguous()
        written |= {f"{key}.{each}": torch.tensor(6.0) for each in ("alpha", *more)}
    directory.mkdir()
    save_file(written, directory / "kohya.safetensors")
    return directory / "kohya.safetensors"


def own_images(pipeline: Any, latents: Tensor) -> Tensor:
    use_first_order(pipeline)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    return own_call(pipeline, PROMPTS[:1], latents.clone(), 2.0)


# diffusers reads and writes no LoRAs of PixArt.
BY_DIFFUSERS = [family for family in FAMILIES if family != "pixart"]


@pytest.mark.parametrize(
    ("family", "layout"),
    [("sd3", by_peft), ("pixart", by_peft), *((family, by_diffusers) for family in BY_DIFFUSERS)],
)
def test_a_trained_lora_is_loaded_with_the_weights_that_were_saved(
    family: str, layout: Any, tmp_path: Path
) -> None:
    source = layout(family, tmp_path / "lora")
    pipeline, state = adapted(family)
    # A 16-bit base does not round it.
    backbone = backbone_of(tiny_pipeline(family), lora=source, dtype=torch.bfloat16)
    assert backbone.lora is not None
    assert (backbone.lora.rank, backbone.lora.alpha) == (3, 6)
    assert not differing(state, backbone.policy_state())

    backbone = backbone_of(tiny_pipeline(family), lora=str(source))
    latents, images = ode_images(backbone, PROMPTS[:1], guided(family, 2.0))
    torch.testing.assert_close(own_images(pipeline, latents), images, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "layout"), [("sd15", by_diffusers), ("flux", by_diffusers), ("pixart", by_peft)]
)
def test_a_trained_lora_is_trained_on_and_the_run_resumed(family: str, layout: Any, tmp_path: Path) -> None:
    source = layout(family, tmp_path / "lora")
    _, state = adapted(family)
    backbone = backbone_of(tiny_pipeline(family), lora=source)
    trainer = trainer_of(backbone)
    assert trainer.train_iteration()["first_max_abs_log_ratio"] == 0
    trainer.save(tmp_path / "run")
    assert differing(state, backbone.policy_state())
    resumed = trainer_of(backbone_of(tiny_pipeline(family), lora=source))
    resumed.load(tmp_path / "run")
    assert trainer.train_iteration()["policy_loss"] == resumed.train_iteration()["policy_loss"]
    assert not differing(backbone.policy_state(), resumed.backbone.policy_state())


def test_kohya_s_alpha_scales_as_there(tmp_path: Path) -> None:
    source = by_kohya(tmp_path / "lora")
    pipeline = tiny_pipeline("sd15")
    pipeline.load_lora_weights(source.parent, weight_name=source.name)
    backbone = backbone_of(tiny_pipeline("sd15"), lora=source)
    assert backbone.lora == LoRAConfig(rank=3, alpha=6, target_modules=("to_q", "to_v"))
    latents, images = ode_images(backbone, PROMPTS[:1], 2.0)
    torch.testing.assert_close(own_images(pipeline, latents), images, rtol=0, atol=1e-4)


def test_the_anchor_is_the_policy_that_training_goes_on_from_or_its_base(tmp_path: Path) -> None:
    source = by_diffusers("sd3", tmp_path / "lora")
    backbone = backbone_of(tiny_pipeline("sd3"), lora=source)
    of_start = anchor_output(trainer_of(backbone))
    of_base = anchor_output(trainer_of(backbone_of(tiny_pipeline("sd3"))))
    assert not torch.equal(of_start, of_base)
    ppo = config_for(backbone).ppo
    for which, expected in (("start", of_start), ("base", of_base)):
        trainer = trainer_of(
            backbone_of(tiny_pipeline("sd3"), lora=source), ppo=replace(ppo, kl=KLPenalty(0.1, anchor=which))
        )
        before = clones(trainer.backbone.policy_state())
        trainer.train_iteration()
        assert differing(before, trainer.backbone.policy_state())
        assert torch.equal(anchor_output(trainer), expected)
        trainer.save(tmp_path / which)
        assert set(load_file(tmp_path / which / "pytorch_lora_weights.safetensors")) == {
            f"transformer.{name}" for name in before
        }
    # A trainer after the first has an anchor of its own, which is the policy of its day.
    later = trainer_of(trainer.backbone, ppo=replace(ppo, kl=KLPenalty(0.1)))
    between = anchor_output(later)
    later.train_iteration()
    last = anchor_output(trainer_of(trainer.backbone, ppo=replace(ppo, kl=KLPenalty(0.1))))
    assert torch.equal(anchor_output(later), between)
    assert not torch.equal(between, last)


def test_the_base_of_a_model_that_is_trained_whole_is_no_anchor() -> None:
    with Refusal(
        "anchor='base' is the model without its LoRA",
        cause="A KL to the base of a model of which all weights are trained.",
        remedy="use anchor='start'",
    ).raised():
        backbone_of(tiny_pipeline("sd3")).frozen_anchor("base")


@pytest.mark.parametrize("family", ["sd15", "flux", "pixart"])
def test_merged_loras_are_in_the_weights_and_what_is_saved_knows_them(family: str, tmp_path: Path) -> None:
    base, scale = saved_pipeline(family, tmp_path / "base"), guided(family, 2.0)
    # Other ranks in one LoRA are no hindrance to merging it.
    settings = {"rank_pattern": {"to_v": 2}, "alpha_pattern": {"to_v": 1}}
    first = (by_diffusers if family in BY_DIFFUSERS else by_peft)(family, tmp_path / "first", **settings)
    second = by_peft(family, tmp_path / "second")
    merged = {str(first): 0.5, str(second): -0.25}
    backbone = load_backbone(base, settings=settings_of(family), lora=LoRAConfig(rank=2), merged_loras=merged)
    latents, images = ode_images(backbone, PROMPTS[:1], scale)
    plain = ode_images(load_backbone(base, settings=settings_of(family)), PROMPTS[:1], scale)[1]
    assert not torch.allclose(images, plain, atol=1e-3)

    save_backbone(backbone, tmp_path / "saved")
    pipeline = load_as_card_says(tmp_path / "saved", base)
    torch.testing.assert_close(own_images(pipeline, latents), images, rtol=0, atol=1e-4)

    again = load_backbone(tmp_path / "saved")
    assert torch.equal(ode_images(again, PROMPTS[:1], scale)[1], images)
    with Refusal(
        "was trained on another pipeline",
        cause="A LoRA is loaded onto a base into which another LoRA than before was merged.",
        remedy="Pass the pipeline that it was trained on",
    ).raised():
        load_backbone(tmp_path / "saved", merged_loras={str(first): 1.0})


def test_merging_into_a_16_bit_base_rounds_once(tmp_path: Path) -> None:
    source = by_diffusers("flux", tmp_path / "lora")
    _, state = adapted("flux")
    pipeline = tiny_pipeline("flux")
    pipeline.to(torch.bfloat16)
    name = "transformer_blocks.0.attn.to_q"
    weight = pipeline.transformer.get_submodule(name).weight.detach().clone()
    change = state[f"{name}.lora_B.weight"] @ state[f"{name}.lora_A.weight"] * 2
    backbone = backbone_of(pipeline, lora=LoRAConfig(), merged_loras={str(source): 0.3})
    base = backbone.model.get_submodule(name).base_layer.weight
    assert torch.equal(base, (weight.float() + 0.3 * change).bfloat16())


def text_lora(directory: Path) -> Path:
    pipeline, state = adapted("sdxl")
    settings = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    pipeline.text_encoder_2.add_adapter(settings)
    text = get_peft_model_state_dict(pipeline.text_encoder_2, adapter_name="default")
    pipeline.save_lora_weights(directory, unet_lora_layers=state, text_encoder_2_lora_layers=text)
    return directory


REFUSED = {
    "text encoders": (
        "sdxl",
        text_lora,
        Refusal(
            "adapts text_encoder_2, and only the unet is trained",
            cause="A LoRA of text encoders, too, is trained on.",
            remedy="merged_loras=",
        ),
    ),
    "ranks": (
        "sd3",
        lambda directory: by_diffusers("sd3", directory, rank_pattern={"to_v": 2}),
        Refusal(
            "has ranks [2, 3] and scales",
            cause="A LoRA whose modules have different ranks or scales is trained on.",
            remedy="Merge it into the weights and train a new one on them",
        ),
    ),
    "dora": (
        "sd3",
        lambda directory: by_diffusers("sd3", directory, use_dora=True),
        Refusal(
            "is no plain one but a",
            cause="A DoRA, a LoKr or a LoRA with biases is trained on or merged.",
            remedy="pipeline.fuse_lora()",
        ),
    ),
    "dora of another program": (
        "sd15",
        lambda directory: by_kohya(directory, "dora_scale"),
        Refusal(
            "would not be loaded as it is. diffusers says: It seems like you are using a DoRA checkpoint",
            cause="diffusers' loader would leave out a part of a LoRA.",
            remedy="Pass a plain LoRA of this StableDiffusionPipeline",
        ),
    ),
    "another model": (
        "sd3",
        lambda directory: by_diffusers("flux", directory, with_metadata=False),
        Refusal(
            "diffusers says: Loading adapter weights from state_dict led to unexpected keys",
            cause="A LoRA of another model.",
            remedy="Pass a plain LoRA of this StableDiffusion3Pipeline",
        ),
    ),
    "nothing there": (
        "sd3",
        lambda directory: directory / "nowhere",
        Refusal(
            "is no LoRA of a StableDiffusion3Pipeline",
            cause="A LoRA that is neither on disk nor on the hub.",
            remedy="pass a directory or file in diffusers' or peft's layout, a hub id",
        ),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_trained_on_is_refused_with_what_to_do(case: str, tmp_path: Path) -> None:
    family, made, refusal = REFUSED[case]
    source = made(tmp_path / "lora")
    with refusal.raised():
        backbone_of(tiny_pipeline(family), lora=source)


def test_a_model_without_a_pipeline_has_no_lora_of_others(tmp_path: Path) -> None:
    save_backbone(tiny_backbone("dit"), tmp_path / "tiny")
    with Refusal(
        "holds no pipeline, and only a pipeline's LoRA can be read",
        cause="`lora` names a trained LoRA for a model without a pipeline.",
        remedy="leave lora and merged_loras out",
    ).raised():
        load_backbone(tmp_path / "tiny", lora="lora")


def test_one_file_of_a_repository_is_asked_of_the_hub(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = by_diffusers("sd3", tmp_path / "lora")
    pipeline = tiny_pipeline("sd3")
    asked = []

    def load(self: Any, place: str, **arguments: Any) -> None:
        asked.append((place, arguments.pop("weight_name")))
        own(self, source, **arguments)

    own = type(pipeline).load_lora_weights
    monkeypatch.setattr(type(pipeline), "load_lora_weights", load)
    backbone_of(pipeline, lora="somebody/loras/styles/ink.safetensors")
    assert asked == [("somebody/loras", "styles/ink.safetensors")]


def test_a_peft_lora_of_a_repository_comes_from_the_hub(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = by_peft("sd3", tmp_path / "lora")
    monkeypatch.setattr(trained_lora, "hf_hub_download", lambda repository, name: str(source / name))
    backbone = backbone_of(tiny_pipeline("sd3"), lora="somebody/lora")
    assert not differing(adapted("sd3")[1], backbone.policy_state())
