"""Every family of models on a pretended CUDA device: iterations on strict graphs or eagerly, a saved file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_backbones
import torch
from host_waits import WaitLog
from safetensors.torch import load_file
from tiny_backbones import on_cuda, tiny_backbone, tiny_config
from tiny_pipelines import DDIM_FAMILIES, FAMILIES, PROMPTS, settings_of, tiny_pipeline

from lacfast import LatentActorCriticTrainer, load_backbone
from lacfast.checkpoint import save_backbone
from lacfast.config import GraphConfig, LoRAConfig, PPOConfig, Ratio, SamplerConfig

GRAPHS = GraphConfig(mode="on", strict=True, warmup_steps=1)
PPO = PPOConfig(clip=Ratio(1e-3), num_minibatches=1, microbatch_size=12)


EAGER = GraphConfig(mode="off")
SLOW = pytest.mark.slow


def train(
    backbone: Any,
    prompts: list[str],
    sampler: SamplerConfig,
    graph: GraphConfig = GRAPHS,
    ppo: PPOConfig = PPO,
) -> None:
    config = tiny_config(batch_size=4, eval_samples=4, ppo=ppo, sampler=sampler, graph=graph)
    trainer = LatentActorCriticTrainer(backbone, tiny_backbones.brightness, prompts, config)
    for _ in range(2):
        trainer.train_iteration()
    assert trainer.graphs.statistics.fallbacks == 0
    assert (trainer.graphs.statistics.captures > 0) == (graph is GRAPHS)


@pytest.mark.filterwarnings("ignore:.*becomes DDIM")
@pytest.mark.parametrize(
    ("family", "graph"),
    [
        pytest.param(family, graph, id=f"{family}, {graph.mode}", marks=() if is_core else (SLOW,))
        for family in FAMILIES
        # A UNet and a transformer on graphs in every run of the tests, the others eagerly.
        for graph, is_core in ((GRAPHS, family in ("sdxl", "sd3")), (EAGER, family in ("sd15", "flux")))
    ],
)
def test_a_family_trains(cuda: WaitLog, family: str, graph: GraphConfig, tmp_path: Path) -> None:
    is_ddim = family in DDIM_FAMILIES
    # One of either: weights in 16 bits with a LoRA, and all weights in 32.
    given = {"lora": LoRAConfig(rank=2), "dtype": torch.bfloat16} if is_ddim else {"dtype": torch.float32}
    backbone = load_backbone(tiny_pipeline(family), device="cuda", settings=settings_of(family), **given)
    kind = {"kind": "ddim", "noise_level": 1.0} if is_ddim else {}
    train(backbone, PROMPTS, SamplerConfig(num_steps=2, guidance_scale=2.0, **kind), graph)
    backbone.free_text_encoders()
    assert backbone.encode_prompts(PROMPTS[:2]).tensors["encoder_hidden_states"].is_cuda
    save_backbone(backbone, tmp_path / "saved")
    files = list((tmp_path / "saved").rglob("*.safetensors"))
    assert files
    assert not any(tensor.is_cuda for tensor in load_file(files[0]).values())


@SLOW
def test_a_tiny_unet_trains(cuda: WaitLog) -> None:
    train(on_cuda(tiny_backbone("unet")), tiny_backbones.PROMPTS, SamplerConfig(num_steps=2))


def test_a_base_in_int8_trains_on_graphs_with_moments_in_a_byte(cuda: WaitLog) -> None:
    backbone = load_backbone(
        tiny_pipeline("flux"),
        device="cuda",
        settings=settings_of("flux"),
        lora=LoRAConfig(rank=80),
        dtype=torch.bfloat16,
        base_precision="int8",
    )
    # Some of the adapter's weights are large enough for codes.
    train(backbone, PROMPTS, SamplerConfig(num_steps=2), GRAPHS, replace(PPO, moments="int8"))
