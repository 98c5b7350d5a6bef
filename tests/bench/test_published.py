"""The published models' denoising step runs without a tensor's value, on each kind of their blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_backbones import make_fake
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from bench.costs import BATCH, Workload
from bench.published import PUBLISHED
from lacfast.records import Conditioning, NoiseKey
from lacfast.rollout.buffers import SamplerBuffers, SamplerInputs
from lacfast.rollout.step import begin, denoise_step

SHALLOW: dict[str, dict[str, Any]] = {
    "sd15": {"layers_per_block": 1},
    "sdxl": {"layers_per_block": 1, "transformer_layers_per_block": [1, 1, 2]},
    "sd35_medium": {"num_layers": 3, "dual_attention_layers": [0]},
    **{name: {"num_layers": 2, "num_single_layers": 2} for name in ("flux_dev", "flux2_dev", "flux2_klein")},
    **{name: {"num_layers": 2} for name in ("qwen_image", "sana", "pixart_sigma", "wan_1b", "wan_14b")},
    "z_image": {"n_layers": 2, "n_refiner_layers": 1},
}
"""Fewer blocks of every kind that the model has: the others are the same code at the same size."""


def shallow(parts: Mapping[str, Mapping[str, Any]], depth: dict[str, Any]) -> dict[str, Any]:
    """The parts with a denoising model of that depth."""
    (name,) = parts.keys() & {"unet", "transformer"}
    config = parts[name]["config"]
    assert depth.keys() <= config.keys()
    return {**parts, name: {**parts[name], "config": config | depth}}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_step_of_a_published_model_looks_at_no_value(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """FakeTensorMode raises at .item(), nonzero and tensors in an if: what a graph capture cannot do."""
    model = PUBLISHED[name]
    monkeypatch.setitem(PUBLISHED, name, replace(model, parts=shallow(model.parts, SHALLOW[name])))
    work = Workload(name)
    sampler, backbone = work.config.sampler, work.backbone
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        make_fake(backbone.model, mode)
        for key, value in vars(backbone).items():
            if isinstance(value, Tensor):
                setattr(backbone, key, mode.from_tensor(value))
        prompts, unconditional = (
            None
            if each is None
            else Conditioning({key: mode.from_tensor(tensor) for key, tensor in each.tensors.items()})
            for each in (work.conditioning, work.uncond_conditioning)
        )
        assert prompts is not None
        zeros = [torch.zeros(count, dtype=torch.int64, device="meta") for count in (1, BATCH)]
        scale = sampler.guidance_scale
        inputs = SamplerInputs.create(work.table, NoiseKey(*zeros), prompts, unconditional, scale)
        buffers = SamplerBuffers.allocate(inputs, backbone.latent_shape, model_dtype=backbone.dtype)
        begin(buffers)
        denoise_step(backbone, None, buffers)
    assert isinstance(buffers.sample, FakeTensor)
