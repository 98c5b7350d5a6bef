"""Sampling is a pure function of static buffers, and a rollout keeps exactly what training needs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_backbones import FAMILIES, PROMPTS, make_fake, tiny_backbone
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lacfast import ops
from lacfast.backbone import build_critic
from lacfast.config import CriticConfig, SamplerConfig
from lacfast.records import INITIAL_STEP, NoiseKey
from lacfast.rollout.buffers import SamplerBuffers, SamplerInputs
from lacfast.rollout.sampler import RolloutSampler
from lacfast.rollout.step import begin, denoise_step
from lacfast.runtime.graph import GraphRunner

STEPS = 4


def rollout_of(backbone, prompts: list[str], ids: range, *, critic=None, seed: int = 3, **settings):
    table = backbone.transition_table(SamplerConfig(num_steps=STEPS))
    sampler = RolloutSampler(backbone, critic, GraphRunner())
    return sampler.sample(table, prompts, [{}] * len(prompts), NoiseKey.create(seed, ids), **settings)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_runs_whole_without_looking_at_a_value(family: str) -> None:
    """FakeTensorMode raises at .item(), nonzero and tensors in an if: what a graph capture cannot do."""
    backbone = tiny_backbone(family)
    critic = build_critic(backbone, 2, CriticConfig())
    table = backbone.transition_table(SamplerConfig(num_steps=STEPS))
    assert critic is not None
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for module in (backbone.model, backbone.prompt_encoder, critic):
            make_fake(module, mode)
        conditioning = backbone.encode_prompts(PROMPTS[:2])
        noise = NoiseKey(torch.zeros(1, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))
        inputs = SamplerInputs.create(table, noise, conditioning, conditioning, 3.0)
        buffers = SamplerBuffers.allocate(inputs, backbone.latent_shape, num_rewards=2)
        begin(buffers)
        for _ in range(2):
            denoise_step(backbone, critic, buffers)
        assert buffers.values.shape == (STEPS, 2, 2)


def test_a_step_writes_into_the_buffers_it_was_given() -> None:
    backbone = tiny_backbone("dit")
    critic = build_critic(backbone, 1, CriticConfig())
    table = backbone.transition_table(SamplerConfig(num_steps=STEPS))
    inputs = SamplerInputs.create(table, NoiseKey.create(0, range(2)), backbone.encode_prompts(PROMPTS[:2]))
    buffers = SamplerBuffers.allocate(inputs, backbone.latent_shape, num_rewards=1)
    begin(buffers)
    denoise_step(backbone, critic, buffers)
    addresses = {
        name: tensor.data_ptr() for name, tensor in vars(buffers).items() if isinstance(tensor, torch.Tensor)
    }
    features = {name: tensor.data_ptr() for name, tensor in buffers.features.items()}
    for _ in range(STEPS - 1):
        denoise_step(backbone, critic, buffers)
    assert addresses == {
        name: tensor.data_ptr() for name, tensor in vars(buffers).items() if isinstance(tensor, torch.Tensor)
    }
    assert features == {name: tensor.data_ptr() for name, tensor in buffers.features.items()}
    assert int(buffers.step) == STEPS


@pytest.mark.isa
def test_a_trajectory_does_not_depend_on_its_batch() -> None:
    backbone = tiny_backbone("dit")
    whole = rollout_of(backbone, PROMPTS[:4], range(10, 14))
    alone = rollout_of(backbone, PROMPTS[2:3], range(12, 13))
    torch.testing.assert_close(whole.latents[:, 2:3], alone.latents, rtol=1e-4, atol=1e-4)
    assert torch.equal(whole.latents[0, 2:3], alone.latents[0])


def test_a_rollout_satisfies_its_own_equation() -> None:
    rollout = rollout_of(tiny_backbone("dit"), PROMPTS[:2], range(2))
    table = rollout.table
    for step in range(STEPS):
        steps = torch.full((2,), step)
        eps = ops.normal_noise(tuple(rollout.latents[0].shape), steps, rollout.noise)
        expected = (
            table.a[step] * rollout.latents[step]
            + table.b[step] * rollout.model_outputs[step]
            + table.std[step] * eps
        )
        torch.testing.assert_close(rollout.latents[step + 1], expected.float(), rtol=1e-5, atol=1e-5)
        scored = ops.step_log_prob(
            rollout.latents[step],
            rollout.model_outputs[step],
            rollout.latents[step + 1],
            table.coefficients(),
            steps,
        )
        torch.testing.assert_close(rollout.log_probs[step], scored, rtol=1e-4, atol=1e-4)
    start = ops.normal_noise(tuple(rollout.latents[0].shape), torch.full((2,), INITIAL_STEP), rollout.noise)
    assert torch.equal(rollout.latents[0], start)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_the_slab_holds_the_bits_of_the_functional_step(guidance_scale: float) -> None:
    rollout = rollout_of(tiny_backbone("dit"), PROMPTS[:3], range(3), guidance_scale=guidance_scale)
    for step in range(STEPS):
        result = ops.gaussian_step(
            rollout.latents[step],
            rollout.model_outputs[step],
            rollout.table.coefficients(),
            torch.full((3,), step),
            noise=rollout.noise,
        )
        assert torch.equal(result.prev_sample, rollout.latents[step + 1])
        assert torch.equal(result.log_prob, rollout.log_probs[step])


class TransitionOps(TorchDispatchMode):
    """Our operations, and whatever is dispatched between the last of the model's and the end of the step."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_the_transition_of_a_step_is_one_operation_and_its_counter() -> None:
    backbone = tiny_backbone("dit")
    conditioning = backbone.encode_prompts(PROMPTS[:2])
    table, noise = backbone.transition_table(SamplerConfig(num_steps=STEPS)), NoiseKey.create(0, range(2))
    inputs = SamplerInputs.create(table, noise, conditioning, conditioning, 3.0)
    buffers = SamplerBuffers.allocate(inputs, backbone.latent_shape)
    begin(buffers)
    with TransitionOps() as dispatched:
        denoise_step(backbone, None, buffers)
    assert dispatched.names[-2:] == ["lacfast.gaussian_step_in_place.default", "aten.add_.Tensor"]
    assert sum(name.startswith("lacfast.") for name in dispatched.names) == 1
    assert not any("index_copy" in name or "copy_" in name for name in dispatched.names[-3:])


def test_seed_and_sample_id_change_the_noise() -> None:
    backbone = tiny_backbone("dit")
    first = rollout_of(backbone, PROMPTS[:1], range(1), seed=0).clean_latents
    assert not torch.allclose(first, rollout_of(backbone, PROMPTS[:1], range(1), seed=1).clean_latents)
    assert not torch.allclose(first, rollout_of(backbone, PROMPTS[:1], range(1, 2), seed=0).clean_latents)


def test_guidance_of_equal_halves_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_backbone("dit")
    plain = rollout_of(backbone, PROMPTS[:2], range(2))
    # The unconditional prompt is replaced by the conditional one: v + s (v - v) = v.
    monkeypatch.setattr(
        backbone, "encode_unconditional", lambda count: backbone.encode_prompts(PROMPTS[:count])
    )
    guided = rollout_of(backbone, PROMPTS[:2], range(2), guidance_scale=5.0)
    torch.testing.assert_close(plain.latents, guided.latents)
    assert guided.uncond_conditioning is not None


def test_mismatched_inputs_raise_with_the_counts() -> None:
    with pytest.raises(ValueError, match="2 prompts, 2 metadata and 3 sample ids"):
        rollout_of(tiny_backbone("dit"), PROMPTS[:2], range(3))
