"""The published models stand in full size without the hub."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lacfast.backbones.blueprint import load_blueprint
from lacfast.backbones.published import published_as, published_models
from lacfast.runs.embedded import TINY_MODELS
from lacfast.runs.recipes import recipes

PARAMETERS = {
    "sd15": 859.5,
    "sdxl": 2567.5,
    "sd35_medium": 2243.2,
    "flux_dev": 11901.4,
    "qwen_image": 20430.4,
    "flux2_dev": 32223.3,
    "flux2_klein": 3875.5,
    "z_image": 6154.9,
    "sana": 1604.6,
    "pixart_sigma": 610.9,
    "wan_1b": 1419.0,
    "wan_14b": 14288.5,
}
"""Millions, of the denoising model."""
ENCODERS = {
    "sd15": [123.1],
    "sdxl": [123.1, 694.7],
    "sd35_medium": [123.7, 694.7, 4762.3],
    "flux_dev": [123.1, 4762.3],
    "qwen_image": [8292.2],
    "flux2_dev": [24011.4],
    "flux2_klein": [4022.5],
    "z_image": [4022.5],
    "sana": [2614.3],
    "pixart_sigma": [4762.3],
    "wan_1b": [5680.9],
    "wan_14b": [5680.9],
}
"""Millions: CLIP-L with and without projection, bigG, T5-XXL, Qwen2.5-VL-7B, Mistral-Small-3.1-24B, Qwen3-4B,
Gemma-2-2B, UMT5-XXL."""
DECODERS = {
    "qwen_image": 126.9,
    "flux2_dev": 84.0,
    "flux2_klein": 84.0,
    "sana": 312.3,
    "wan_1b": 126.9,
    "wan_14b": 126.9,
}
"""Millions, of autoencoders that are not those of Stable Diffusion."""


def millions(module: Any) -> float:
    return round(sum(parameter.numel() for parameter in module.parameters()) / 1e6, 1)


def test_every_published_model_is_known() -> None:
    assert set(published_models()) == set(PARAMETERS)
    models = {recipe.settings.model for recipe in recipes().values()} - set(TINY_MODELS)
    assert all(published_as(model) is not None for model in models), models


@pytest.mark.parametrize("name", PARAMETERS)
def test_sizes_are_the_published_ones_and_the_hub_is_not_asked(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(*args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"the hub was asked: {args}")

    monkeypatch.setattr("huggingface_hub.file_download.hf_hub_download", ask)
    monkeypatch.setattr("diffusers.DiffusionPipeline.load_config", ask)
    model = published_models()[name]
    blueprint = load_blueprint(
        model.hub_ids[0],
        dtype=torch.bfloat16,
        settings=model.settings,
    )
    denoiser = blueprint.backbone.model
    assert millions(denoiser) == PARAMETERS[name]
    assert sum(parameter.numel() for parameter in denoiser.parameters()) == model.parameters
    encoders = model.text_encoders()
    assert [millions(encoder) for encoder in encoders] == ENCODERS[name]
    assert blueprint.text_encoder_bytes == 2 * sum(p.numel() for e in encoders for p in e.parameters())
    assert round(blueprint.decoder_bytes / 2e6, 1) in (83.7, 83.8, DECODERS.get(name))
    tensors = blueprint.conditioning().tensors
    assert {name: list(tensors[name].shape[1:]) for name in model.prompt} == model.prompt


def test_a_model_whose_configs_are_not_here_is_looked_up() -> None:
    assert published_as("somebody/another-model") is None
