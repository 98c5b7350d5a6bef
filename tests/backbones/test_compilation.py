"""Regional compilation: one compiled forward everywhere, hooks and names as before, no late recompiles."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from tiny_backbones import PROMPTS, brightness, tiny_config
from tiny_backbones import tiny_backbone as tiny_backbone_of
from tolerances import assert_same_sum
from torch import Tensor

from lacfast import LatentActorCriticTrainer, SamplerConfig
from lacfast.backbone import build_critic
from lacfast.backbones import adapt, load_backbone
from lacfast.backbones.compilation import CompiledForward
from lacfast.backbones.latent import LatentBackbone
from lacfast.config import KLPenalty, LoRAConfig
from lacfast.metrics import compiled_graphs
from lacfast.rollout.tables import TrainingTables
from lacfast.tasks.codec import CHANNELS
from lacfast.tasks.text import WIDTH


def one_block_backbone(*, lora: LoRAConfig | None = None) -> LatentBackbone:
    """The smallest SD3 transformer: every kind of block costs a compilation."""
    parts = tiny_backbone_of("dit")
    build: Any = SD3Transformer2DModel
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = build(
            sample_size=8, patch_size=4, in_channels=CHANNELS, out_channels=CHANNELS, num_layers=1,
            attention_head_dim=16, num_attention_heads=2, joint_attention_dim=WIDTH,
            caption_projection_dim=32, pooled_projection_dim=WIDTH, pos_embed_max_size=2,
        )  # fmt: skip
    return adapt(model, parts.prompt_encoder, parts.codec, latent_shape=parts.latent_shape, lora=lora)


def output(backbone: LatentBackbone, count: int = 4) -> tuple[Tensor, dict[str, Tensor]]:
    """Model output and what the critic's trunk records of that forward."""
    generator = torch.Generator().manual_seed(count)
    sample = torch.randn((count, *backbone.latent_shape), generator=generator)
    timestep = torch.linspace(900, 100, count)
    conditioning = backbone.encode_prompts(PROMPTS[:count])
    assert backbone.critic is not None
    with backbone.critic.record(backbone.model) as features:
        return backbone.predict(sample, timestep, conditioning), features


def with_critic(backbone: LatentBackbone) -> LatentBackbone:
    backbone.critic = build_critic(backbone, 1, tiny_config().critic)
    return backbone


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, LoRAConfig(rank=2)], ids=["all weights", "lora"])
def test_inductor_s_forward_is_near_eager_s_and_the_same_bits_with_and_without_gradient(
    lora: LoRAConfig | None,
) -> None:
    backbone = with_critic(one_block_backbone(lora=lora))
    eager, _ = output(backbone)
    backbone.compile_blocks()
    with torch.no_grad():
        rollout, _ = output(backbone)
    update, _ = output(backbone)
    update.square().mean().backward()
    assert_same_sum(rollout, eager, unit=eager.abs().max())
    assert torch.equal(rollout, update)
    assert all(parameter.grad is not None for parameter in backbone.policy_parameters())


@pytest.mark.isa
@pytest.mark.parametrize("lora", [None, LoRAConfig(rank=2)], ids=["all weights", "lora"])
def test_a_compiled_run_starts_at_ratio_one_and_compiles_in_its_first_iteration_only(
    lora: LoRAConfig | None,
) -> None:
    # Batches of 8 and 4 only.
    config = tiny_config(batch_size=12, rollout_batch_size=8, eval_batch_size=4)
    config = replace(config, ppo=replace(config.ppo, kl=KLPenalty(0.1), num_minibatches=3, microbatch_size=8))
    backbone = one_block_backbone(lora=lora)
    backbone.compile_blocks(backend="eager")
    trainer = LatentActorCriticTrainer(backbone, brightness, PROMPTS, config)
    first = trainer.train_iteration()
    # A pair may be in a batch of 8 in the rollout and of 4 in the update, whose products round otherwise.
    assert_same_sum(first["first_max_abs_log_ratio"], 0, unit=1)
    assert_same_sum(first["forward_mismatch"], 0, unit=1)
    before = compiled_graphs()
    assert before > 0
    # Other batch sizes, an evaluation, other steps.
    trainer.evaluate(samples=7)
    trainer.tables = trainer.source.tables = TrainingTables(backbone, SamplerConfig(num_steps=3), seed=0)
    shorter = trainer.train_iteration()
    assert_same_sum(shorter["first_max_abs_log_ratio"], 0, unit=1)
    assert len(shorter["explained_variance"]) == 3
    assert compiled_graphs() == before


def test_the_switch_compiles_model_and_critic_and_logs_recompiles(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    backbone = one_block_backbone()
    compile_blocks = LatentBackbone.compile_blocks
    # The trainer asks for inductor, which is slow to start and no part of this test.
    monkeypatch.setattr(LatentBackbone, "compile_blocks", lambda self: compile_blocks(self, backend="eager"))
    trainer = LatentActorCriticTrainer(backbone, brightness, PROMPTS, tiny_config(compile=True))
    assert backbone.critic is not None
    blocks = [
        module
        for root in (backbone.model, backbone.critic.trunk)
        for module in root.modules()
        if type(module).__name__ == "JointTransformerBlock"
    ]
    assert len(blocks) == 2
    assert all(isinstance(block.forward, CompiledForward) for block in blocks)
    assert [trainer.train_iteration()["recompiles"] > 0 for _ in range(2)] == [True, False]


def test_taps_record_and_names_stay_and_copies_compile_for_themselves(tmp_path: Path) -> None:
    backbone = with_critic(one_block_backbone())
    names = list(backbone.model.state_dict())
    eager, eager_features = output(backbone)
    key = backbone.forward_signature()
    backbone.compile_blocks(backend="eager")
    assert backbone.forward_signature() != key
    compiled, features = output(backbone)
    assert torch.equal(eager, compiled)
    assert features.keys() == eager_features.keys()
    assert all(torch.equal(features[name], eager_features[name]) for name in features)
    assert list(backbone.model.state_dict()) == names
    model: Any = backbone.model
    copied = copy.deepcopy(model)
    assert copied.transformer_blocks[0].forward.block is copied.transformer_blocks[0]
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert torch.equal(output(backbone)[0], eager)
    backbone.save_pretrained(tmp_path)
    assert list(load_backbone(tmp_path).model.state_dict()) == names


def test_gradient_checkpointing_recomputes_compiled_blocks() -> None:
    gradients = []
    for checkpointing in (False, True):
        backbone = with_critic(one_block_backbone())
        backbone.compile_blocks(backend="aot_eager")
        if checkpointing:
            backbone.enable_gradient_checkpointing()
        output(backbone)[0].square().mean().backward()
        gradients.append([parameter.grad for parameter in backbone.policy_parameters()])
    for kept, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(kept, recomputed)


@pytest.mark.slow
def test_a_unet_s_blocks_are_compiled_where_diffusers_names_only_its_attention() -> None:
    backbone = with_critic(tiny_backbone_of("unet"))
    eager, _ = output(backbone)
    backbone.compile_blocks(backend="eager")
    compiled, features = output(backbone)
    assert torch.equal(eager, compiled)
    assert features
    kinds = {type(module).__name__ for module in backbone.model.modules() if "forward" in vars(module)}
    assert kinds == {"BasicTransformerBlock", "ResnetBlock2D"}
