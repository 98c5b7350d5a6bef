"""A base in int8 is the model on its rounded weights, bit for bit, in sampling, training and saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import Refusal
from tiny_pipelines import (
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
from tiny_trainers import anchor_output, clones, differing, trainer_of
from torch import nn

from lacfast import LoRAConfig, TrainConfig, load_backbone
from lacfast.backbones.families import PIPELINES
from lacfast.backbones.int8 import Int8Linear, is_quantized, quantize_base
from lacfast.checkpoint import save_backbone
from lacfast.config import variant
from lacfast.distributed.sharding import Divider
from lacfast.runs.plan import model_arguments
from lacfast.runs.recipes import recipe

LORA = LoRAConfig(rank=4, alpha=8)


def rounded(pipeline: Any, dtype: torch.dtype = torch.float32) -> Any:
    """The pipeline on the weights that int8 keeps of its blocks."""
    family = PIPELINES[type(pipeline).__name__]
    model = getattr(pipeline, family.model_part)
    quantize_base(model, family.backbone_class.repeated_blocks, dtype)
    for layer in model.modules():
        if isinstance(layer, Int8Linear):
            layer.make_plain()
    return pipeline


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 24), (2, 3, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_is_the_plain_one_on_its_rounded_weight_and_keeps_no_other_copy(
    dtype: torch.dtype, shape: tuple[int, ...], bias: bool
) -> None:
    layer = nn.Linear(24, 10, bias=bias, dtype=dtype).requires_grad_(False)
    weight = layer.weight.clone()
    Int8Linear.install(layer)
    plain = nn.Linear(24, 10, bias=bias, dtype=dtype).requires_grad_(False)
    plain.weight.copy_(layer.dequantized())
    if bias:
        plain.bias.copy_(layer.bias)
    # Half a level of each row's scale, and the rounding of the product.
    bound = weight.float().abs().amax(dim=1, keepdim=True) * (0.5 / 127 + torch.finfo(dtype).eps)
    assert ((layer.dequantized() - weight).float().abs() <= bound).all()
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    results = []
    for each in (layer, plain):
        inputs = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = each(inputs)
        if each is layer:
            assert {tensor.dtype for tensor in kept if tensor.shape == weight.shape} == {torch.int8}
        output.square().sum().backward()
        results.append((output, inputs.grad))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_a_row_of_zeros_stays_zeros() -> None:
    layer = nn.Linear(8, 2).requires_grad_(False)
    layer.weight[1] = 0
    Int8Linear.install(layer)
    assert (layer.dequantized()[1] == 0).all()


@pytest.mark.parametrize("family", ["sd15", "flux", "pixart", "z_image"])
def test_a_run_on_an_int8_base_is_the_run_on_the_rounded_weights_and_resumes_bit_for_bit(
    family: str, tmp_path: Path
) -> None:
    scale = guided(family, 4.3)
    dtype = torch.bfloat16 if family == "flux" else torch.float32
    plain = trainer_of(
        backbone_of(rounded(tiny_pipeline(family), dtype), lora=LORA, dtype=dtype), guidance_scale=scale
    )

    def made() -> Any:
        backbone = backbone_of(tiny_pipeline(family), lora=LORA, dtype=dtype, base_precision="int8")
        return trainer_of(backbone, guidance_scale=scale)

    trainer = made()
    assert is_quantized(trainer.backbone.model)
    assert trainer.critic is not None
    assert not is_quantized(trainer.critic)
    base = anchor_output(trainer)
    first, expected = trainer.train_iteration(), plain.train_iteration()
    assert first["first_max_abs_log_ratio"] == 0
    trainer.save(tmp_path / "run")
    second, expected = trainer.train_iteration(), plain.train_iteration()
    names = ("policy_loss", "value_loss", "reward/brightness", "policy_grad_norm")
    assert [second[name] for name in names] == [expected[name] for name in names]
    assert not differing(plain.backbone.policy_state(), trainer.backbone.policy_state())
    assert torch.equal(anchor_output(trainer), base)
    resumed = made()
    resumed.load(tmp_path / "run")
    again = resumed.train_iteration()
    assert [again[name] for name in names] == [second[name] for name in names]
    assert not differing(clones(resumed.backbone.policy_state()), trainer.backbone.policy_state())


@pytest.mark.parametrize("trunk", ["copy", "lora"])
def test_critics_that_run_the_base_once_more_learn_on_it_too(trunk: str) -> None:
    trainer = trainer_of(backbone_of(tiny_pipeline("sd3"), lora=LORA, base_precision="int8"), trunk=trunk)
    assert trainer.critic is not None
    before = clones(dict(trainer.critic.named_parameters()))
    for _ in range(2):
        assert trainer.train_iteration()["first_max_abs_log_ratio"] == 0
    # The head's last layer starts at zero, so what lies below it learns from the second step on.
    assert any(
        name.startswith("trunk.") for name in differing(before, dict(trainer.critic.named_parameters()))
    )


@pytest.mark.slow
def test_compiled_blocks_give_what_eager_ones_do() -> None:
    outputs = []
    for is_compiled in (False, True):
        backbone = backbone_of(tiny_pipeline("flux"), lora=LORA, base_precision="int8")
        with torch.no_grad():
            for tensor in backbone.policy_state().values():
                tensor.add_(0.05)
        if is_compiled:
            backbone.compile_blocks(backend="aot_eager")
        sample = torch.ones(2, *backbone.latent_shape)
        output = backbone.predict(sample, torch.full((2,), 500.0), backbone.encode_prompts(PROMPTS[:2]))
        output.sum().backward()
        outputs.append((output, *(parameter.grad for parameter in backbone.policy_parameters())))
    for eager, compiled in zip(*outputs, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=1e-4, atol=1e-5)


def test_what_is_saved_goes_on_in_int8_and_loads_in_plain_diffusers(tmp_path: Path) -> None:
    base = saved_pipeline("flux", tmp_path / "base")
    trainer = trainer_of(load_backbone(base, lora=LORA, settings=settings_of("flux"), base_precision="int8"))
    trainer.train_iteration()
    save_backbone(trainer.backbone, tmp_path / "saved")
    latents, images = ode_images(trainer.backbone, PROMPTS[:1], 1.0)
    loaded = load_backbone(tmp_path / "saved")
    assert is_quantized(loaded.model)
    assert torch.equal(ode_images(loaded, PROMPTS[:1], 1.0)[1], images)
    assert not is_quantized(load_backbone(tmp_path / "saved", base_precision="model").model)
    run = variant(recipe("flux-pickscore-24gb"), model=str(tmp_path / "saved"))
    assert model_arguments(run)["base_precision"] == "int8"
    with Refusal(
        "saved was trained on a base in int8, and base_precision='model' is of other weights",
        cause="A run from a model whose LoRA belongs to a rounded base, without saying so.",
        remedy="pass base_precision='int8'",
    ).raised():
        model_arguments(variant(run, base_precision="model"))
    pipeline = rounded(tiny_pipeline("flux"))
    pipeline.save_pretrained(tmp_path / "rounded")
    pipeline = load_as_card_says(tmp_path / "saved", tmp_path / "rounded")
    use_first_order(pipeline)
    torch.testing.assert_close(
        own_call(pipeline, PROMPTS[:1], latents.clone(), 1.0), images, rtol=0, atol=1e-4
    )


def test_a_pipeline_with_an_adapter_is_refused_before_its_base_is_quantised() -> None:
    pipeline = tiny_pipeline("flux")
    backbone = backbone_of(pipeline, lora=LORA)
    with pytest.raises(ValueError, match="already has adapters"):
        backbone_of(pipeline, lora=LORA, base_precision="int8")
    assert not is_quantized(backbone.model)


def test_what_an_int8_base_cannot_do_is_refused() -> None:
    with Refusal(
        "base_precision='int8' is of a frozen base, and without a LoRA all weights are trained",
        cause="A model of which all weights are trained is to be kept in int8.",
        remedy="pass lora=LoRAConfig(), or leave base_precision out",
    ).raised():
        backbone_of(tiny_pipeline("flux"), base_precision="int8")
    with Refusal(
        "unknown base_precision 'int4'",
        cause="A precision that no base is kept in.",
        remedy="did you mean 'int8'? Known: model, int8",
    ).raised():
        backbone_of(tiny_pipeline("flux"), lora=LORA, base_precision="int4")
    backbone = backbone_of(tiny_pipeline("flux"), lora=LORA, base_precision="int8")
    with Refusal(
        "rollout_precision='fp8' quantises a base that base_precision='int8' quantised before",
        cause="Rollouts in float8 on a base in int8.",
        remedy="use rollout_precision='model', which samples with that base",
    ).raised():
        backbone.quantized("fp8")
    with Refusal(
        "base_precision='int8' is for a model that fits one GPU",
        cause="Weights in int8 are to be divided over GPUs.",
        remedy="use base_precision='model' or shard=1",
    ).raised():
        backbone.shard(Divider.__new__(Divider))
    run = recipe("flux-pickscore-24gb")
    with Refusal(
        "base_precision='int8' is one base for sampling and training, on every GPU",
        cause="A run on a base in int8 with float8 rollouts or sharded weights.",
        remedy="use 'model' and 1, or base_precision='model'",
    ).raised():
        variant(run, train=variant(run.train, rollout_precision="fp8_weights"))
    with Refusal(
        "ppo.moments='int8' makes blocks of whole weights, and shard=2 has them in parts",
        cause="Moments in a byte of sharded weights.",
        remedy="use ppo.moments='float32' or shard=1",
    ).raised():
        TrainConfig(ppo=run.train.ppo, shard=2)
