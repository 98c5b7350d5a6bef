"""A quantised rollout's ratio is the exact one of two policies; what cannot be exact is refused."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from refusals import Refusal
from tiny_backbones import PROMPTS, brightness, tiny_backbone, tiny_config
from torch import Tensor, nn

from lacfast import LatentActorCriticTrainer, ops
from lacfast.backbones import adapt, quantization
from lacfast.backbones.latent import LatentBackbone
from lacfast.backbones.quantization import ALIGNMENT, quantized_copy
from lacfast.config import CriticConfig, LoRAConfig, PPOConfig, Ratio, SamplerConfig
from lacfast.learning.policy_update import PolicyUpdate
from lacfast.prompts import PromptSet
from lacfast.records import NoiseKey, Rollout


def round_to_float8(linear: nn.Linear) -> None:
    """Float8's rounding in the weight's own dtype: what torchao's weights are worth, without torchao."""
    rounded = linear.weight.to(torch.float8_e4m3fn).to(linear.weight.dtype)
    linear.weight = nn.Parameter(rounded, requires_grad=False)


@pytest.fixture
def _rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(quantization.QUANTIZERS, "fp8_weights", lambda device: round_to_float8)


def trainer_of(backbone: LatentBackbone, **changes: Any) -> LatentActorCriticTrainer:
    config = tiny_config(rollout_precision="fp8_weights", **changes)
    return LatentActorCriticTrainer(backbone, brightness, PROMPTS, config)


def with_lora(seed: int = 0) -> LatentBackbone:
    parts = tiny_backbone("dit", seed=seed)
    return adapt(
        parts.model,
        parts.prompt_encoder,
        parts.codec,
        latent_shape=parts.latent_shape,
        lora=LoRAConfig(rank=4),
    )


@torch.no_grad()
def outputs(backbone: LatentBackbone, rollout: Rollout, step: int) -> Tensor:
    timestep = rollout.table.timesteps[step].expand(rollout.batch_size)
    return backbone.predict(rollout.latents[step], timestep, rollout.conditioning)


def log_prob(rollout: Rollout, step: int, model_output: Tensor) -> Tensor:
    """(B,) float64 mean log-density of the stored transition, up to a constant: section 3, usual form."""
    table = rollout.table
    mean = table.a[step] * rollout.latents[step].double() + table.b[step] * model_output.double()
    distance = rollout.latents[step + 1].double() - mean
    return -(distance.square() / (2 * table.std[step] ** 2)).flatten(1).mean(dim=1)


@pytest.mark.usefixtures("_rounding")
def test_the_ratio_of_a_quantised_rollout_is_that_of_the_two_policies_log_probs_in_float64() -> None:
    backbone = tiny_backbone("dit")
    ppo = PPOConfig(clip=Ratio(1.0), num_minibatches=1, policy_learning_rate=1e-9)
    trainer = trainer_of(backbone, ppo=ppo)
    rollout = trainer.collect(PromptSet.create(PROMPTS).cycle(8), 0)
    assert rollout is not None
    coefficients = rollout.table.coefficients()
    ratios = []
    for step in rollout.table.trainable_steps:
        output, behaviour = outputs(backbone, rollout, step), rollout.model_outputs[step]
        # A batch of the same size gives the same bits: what is stored is the quantised policy's.
        assert torch.equal(behaviour, outputs(trainer.behaviour, rollout, step))  # type: ignore[arg-type]
        assert not torch.equal(behaviour, output)
        exact = log_prob(rollout, step, output) - log_prob(rollout, step, behaviour)
        steps = torch.full((rollout.batch_size,), step)
        terms = ops.log_ratio(output, behaviour, coefficients, steps, noise=rollout.noise)
        # The states are float32, which moves the usual form by about 1e-7 of their distance in stds.
        torch.testing.assert_close(terms.log_ratio.double(), exact, rtol=1e-3, atol=2e-6)
        assert exact.abs().max() > 2e-5
        ratios.append(terms.log_ratio.abs())
    metrics = trainer.update(rollout)
    first = torch.stack(ratios)
    assert metrics["first_max_abs_log_ratio"] == pytest.approx(float(first.max()), rel=1e-3)
    assert metrics["first_mean_abs_log_ratio"] == pytest.approx(float(first.mean()), rel=1e-3)
    assert metrics["first_kl_old"] == pytest.approx(metrics["forward_mismatch"] ** 2 / 2)
    assert metrics["first_kl_old"] > 0


def test_the_joint_ratio_to_the_quantised_policy_is_an_unbiased_importance_weight() -> None:
    """E_mu[ratio] = 1 and E_mu[ratio (x' - mean_mu)] = mean_pi - mean_mu, over draws of one transition."""
    draws, elements = 40_000, 16
    generator = torch.Generator().manual_seed(1)
    behaviour = torch.randn(elements, generator=generator)
    output = behaviour + 0.1 * torch.randn(elements, generator=generator)
    a, b, std = 1.0, -0.2, 0.3
    coefficients = torch.tensor([[a, b, std]])
    steps, noise = torch.zeros(draws, dtype=torch.int64), NoiseKey.create(3, range(draws))
    terms = ops.log_ratio(
        output.expand(draws, -1).contiguous(),
        behaviour.expand(draws, -1).contiguous(),
        coefficients,
        steps,
        noise=noise,
    )
    weights = (terms.log_ratio.double() * elements).exp()
    assert float(weights.mean()) == pytest.approx(1, abs=4 * float(weights.std()) / draws**0.5)
    direction = (output - behaviour).double()
    eps = ops.normal_noise((draws, elements), steps, noise).double()
    moved = weights * ((std * eps) @ direction)
    expected = b * float(direction @ direction)
    assert float(moved.mean()) == pytest.approx(expected, abs=4 * float(moved.std()) / draws**0.5)
    # Uncorrected, the same mean is off by many standard errors.
    plain = (std * eps) @ direction
    assert abs(float(plain.mean()) - expected) > 8 * float(plain.std()) / draws**0.5


@pytest.mark.usefixtures("_rounding")
def test_a_guided_update_does_not_take_the_quantised_output_for_the_policy_s(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The unconditional half of a first step is known only where the policy itself made the rollout."""
    metrics = []
    for reuse in (True, False):
        if not reuse:
            monkeypatch.setattr(PolicyUpdate, "_knows", lambda self, rollout: False)
        ppo = PPOConfig(clip=Ratio(1.0), num_minibatches=1)
        sampler = SamplerConfig(num_steps=4, guidance_scale=3.0)
        metrics.append(trainer_of(tiny_backbone("dit"), ppo=ppo, sampler=sampler).train_iteration())
    known, run = metrics
    assert known["first_max_abs_log_ratio"] == run["first_max_abs_log_ratio"] > 0
    assert known["first_mean_abs_log_ratio"] == run["first_mean_abs_log_ratio"] > 0


@pytest.mark.usefixtures("_rounding")
def test_full_weights_are_quantised_again_in_place_before_every_rollout() -> None:
    trainer = trainer_of(tiny_backbone("dit"))
    behaviour: Any = trainer.behaviour
    _, linears = behaviour.model, behaviour._quantized
    live, quantized = linears.layers[0]
    before, address = quantized.weight.clone(), quantized.weight.data_ptr()
    trainer.train_iteration()
    assert torch.equal(quantized.weight, before)
    trainer.collect(PromptSet.create(PROMPTS[:2]), 100)
    assert not torch.equal(quantized.weight, before)
    assert torch.equal(quantized.weight, live.weight.to(torch.float8_e4m3fn).to(torch.float32))
    assert quantized.weight.data_ptr() == address


@pytest.mark.usefixtures("_rounding")
def test_a_lora_s_base_is_quantised_once_and_its_adapter_is_the_policy_s_own() -> None:
    trainer = trainer_of(with_lora())
    behaviour: Any = trainer.behaviour
    live, quantized = behaviour._quantized.layers[0]
    before = quantized.weight.clone()
    assert [id(weight) for weight in behaviour.policy_parameters()] == [
        id(weight) for weight in trainer.backbone.policy_parameters()
    ]
    trainer.train_iteration()
    trainer.train_iteration()
    assert torch.equal(quantized.weight, before)
    assert not torch.equal(quantized.weight, live.weight)


@pytest.mark.usefixtures("_rounding")
def test_only_the_aligned_layers_of_blocks_are_quantised_and_all_else_is_shared() -> None:
    model = tiny_backbone("dit").model
    copied, linears = quantized_copy(model, ("JointTransformerBlock",), round_to_float8, torch.float32)
    own = {id(quantized.weight) for _, quantized in linears.layers}
    originals = {id(parameter) for parameter in model.parameters()}
    assert own
    assert own.isdisjoint(originals)
    assert {id(parameter) for parameter in copied.parameters()} - own <= originals
    sizes = {size for live, _ in linears.layers for size in live.weight.shape}
    assert all(size % ALIGNMENT == 0 for size in sizes)
    with Refusal(
        "so nothing can be quantised",
        cause="A model whose blocks have no Linear layer of sizes that float8 takes.",
        remedy="use rollout_precision='model'",
    ).raised():
        quantized_copy(model, ("NoSuchBlock",), round_to_float8, torch.float32)


@pytest.mark.usefixtures("_rounding")
def test_evaluation_judges_the_policy_itself() -> None:
    plain = LatentActorCriticTrainer(tiny_backbone("dit"), brightness, PROMPTS, tiny_config())
    quantised = trainer_of(tiny_backbone("dit"))
    assert torch.equal(plain.evaluate().images, quantised.evaluate().images)


def test_off_samples_and_evaluates_with_the_policy_itself() -> None:
    backbone = tiny_backbone("dit")
    trainer = LatentActorCriticTrainer(backbone, brightness, PROMPTS, tiny_config())
    assert trainer.behaviour is backbone
    assert trainer.rollout_sampler is trainer.sampler


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        (
            {"rollout_precision": "int4"},
            Refusal(
                "unknown rollout_precision 'int4'",
                cause="A precision that no rollout has.",
                remedy="known: model, fp8, fp8_weights",
            ),
        ),
        (
            {"ppo": PPOConfig(ratio="ratio_norm")},
            Refusal(
                "ratio='ratio_norm' is no likelihood ratio",
                cause="GRPO-Guard's ratio beside a quantised policy.",
                remedy="use ratio='innovation' or rollout_precision='model'",
            ),
        ),
        (
            {"critic": CriticConfig(trunk="joint")},
            Refusal(
                "trunk='joint' reads the policy's weights in the update and quantised ones in the rollout",
                cause="A critic inside the actor beside a quantised policy.",
                remedy="use 'branch' or 'shared', which learn on the rollout's own features",
            ),
        ),
        (
            {"critic": CriticConfig(keep_features=False)},
            Refusal(
                "keep_features=False lets the critic learn on features of the policy",
                cause="A critic on the training forward beside a quantised policy.",
                remedy="use keep_features=True",
            ),
        ),
        (
            {"critic": CriticConfig(trunk="lora")},
            Refusal(
                "trunk='lora' reads the policy's weights in the update",
                cause="A critic on the actor's base beside a quantised policy.",
                remedy="or rollout_precision='model'",
            ),
        ),
    ],
)
def test_what_cannot_be_corrected_exactly_is_refused(changes: dict[str, Any], refused: Refusal) -> None:
    with refused.raised():
        tiny_config(**({"rollout_precision": "fp8"} | changes))


def test_fp8_is_refused_without_a_capable_device_and_without_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(rollout_precision="fp8")
    with Refusal(
        "rollout_precision='fp8' needs float8 matrix products, of CUDA capability 8.9 on; cpu has no CUDA",
        cause="Float8 rollouts on a device without float8.",
        remedy="use 'fp8_weights', which saves memory only, or 'model'",
    ).raised():
        LatentActorCriticTrainer(tiny_backbone("dit"), brightness, PROMPTS, config)
    monkeypatch.setitem(sys.modules, "torchao", None)
    with Refusal(
        "rollout_precision='fp8_weights' needs torchao",
        cause="Float8 rollouts without their package.",
        remedy="pip install 'lacfast[fp8]'",
    ).raised():
        LatentActorCriticTrainer(
            tiny_backbone("dit"), brightness, PROMPTS, replace(config, rollout_precision="fp8_weights")
        )


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "lora"])
def test_torchao_s_float8_weights_train(lora: bool) -> None:
    pytest.importorskip("torchao")
    trainer = trainer_of(with_lora() if lora else tiny_backbone("dit"))
    behaviour: Any = trainer.behaviour
    _, quantized = behaviour._quantized.layers[0]
    scale = quantized.weight.scale
    for _ in range(2):
        metrics = trainer.train_iteration()
        assert 0 < metrics["first_max_abs_log_ratio"] < 0.1
    # The same memory after a refresh, of which a captured graph knows the address.
    assert quantized.weight.scale is scale or quantized.weight.scale.data_ptr() == scale.data_ptr()
