"""The published models' denoising step runs whole and in full size without a tensor's value."""

from __future__ import annotations

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

SLOW = ("flux2_dev", "flux2_klein", "z_image", "sana", "pixart_sigma")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in PUBLISHED]
)
def test_a_step_of_a_published_model_looks_at_no_value(name: str) -> None:
    """FakeTensorMode raises at .item(), nonzero and tensors in an if: what a graph capture cannot do."""
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
