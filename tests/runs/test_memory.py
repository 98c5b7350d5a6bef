"""The memory that is planned is that of the whole run, followed on a model without values."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from refusals import Refusal
from tiny_backbones import tiny_backbone

from bench import allocations
from lacfast import CriticConfig, PPOConfig, SamplerConfig
from lacfast.backbone import build_critic
from lacfast.backbones.latent import LatentBackbone
from lacfast.config import KLPenalty, Ratio, TrainConfig, ValuePretrainingConfig
from lacfast.records import Conditioning
from lacfast.runs import capacity
from lacfast.runs.capacity import GIB, GPU_BYTES, MemoryPlan, Phase, require_memory, smaller_batches
from lacfast.runs.costs import LiveBytes
from lacfast.runs.memory import memory_plan
from lacfast.runtime import host_memory
from lacfast.runtime.host_memory import free_host_bytes
from lacfast.tasks.models import TINY

CONFIG = TrainConfig(
    batch_size=6,
    rollout_batch_size=3,
    sampler=SamplerConfig(num_steps=2, guidance_scale=3.0),
    critic=CriticConfig(hidden_dim=16, head_dim=8, num_heads=2),
    ppo=PPOConfig(
        clip=Ratio(1e-3), kl=KLPenalty(0.1), num_minibatches=1, microbatch_size=3, critic_rollouts=2
    ),
    pretrain=ValuePretrainingConfig(iterations=2, held_out_samples=3, minibatch_size=12),
    ema_decay=0.9,
    eval_samples=3,
    eval_batch_size=3,
)


def backbone_without_values(config: TrainConfig) -> tuple[LatentBackbone, Conditioning]:
    """A model with its critic on the meta device, and a prompt's conditioning (1, ...)."""
    backbone = tiny_backbone("dit", size=TINY)
    one = backbone.encode_unconditional(1).to("meta")
    backbone.model.to("meta")
    backbone.codec.to("meta")
    with torch.device("meta"):
        backbone.critic = build_critic(backbone, 1, config.critic)
    return backbone, one


def planned(config: TrainConfig) -> MemoryPlan:
    backbone, one = backbone_without_values(config)
    table = backbone.transition_table(config.sampler)
    return memory_plan(backbone, backbone.critic, table, one, config, overlaps=False)


@pytest.mark.slow
def test_a_plan_is_the_peak_of_the_whole_run() -> None:
    """Every allocation of value pretraining, two iterations and an evaluation."""
    plan = planned(CONFIG)
    foretold = allocations.planned(plan)
    backbone, one = backbone_without_values(CONFIG)
    assert backbone.critic is not None
    weights = [*backbone.model.parameters(), *backbone.critic.parameters()]
    there = sum(tensor.nbytes for tensor in weights)
    found = allocations.followed(backbone, one, CONFIG)
    assert found.keys() == foretold.keys()
    for name, peak in found.items():
        # Without what is there all the time, which is most of so small a model's.
        constant = there + (0 if name == "value pretraining" else plan.training_bytes)
        assert peak.device - constant == pytest.approx(foretold[name].device - constant, rel=0.02), name
        assert peak.host <= foretold[name].host + found["rollout"].host, name
    # Scores and prompts are little beside the images.
    assert found["evaluation"].host == pytest.approx(foretold["evaluation"].host, rel=0.25)
    assert found["value pretraining"].host > 6 * plan.kept_bytes, "the states of its rollouts lie on the host"


def test_memory_is_followed_while_it_lives() -> None:
    before = torch.empty(100, device="meta")
    with LiveBytes() as live:
        first = torch.empty(1000, device="meta")
        second = first[:10].view(2, 5) + before[:5]
        del first
        assert live.live == {"meta": 4 * 10}
        host = second.new_empty(3, device="cpu")
    assert (live.live["cpu"], live.peak) == (host.nbytes, {"meta": 4 * 1010, "cpu": 12})


def phase(name: str, fixed: int, batch: int, *, host: int = 0) -> Phase:
    return Phase(name, fixed * GIB, batch * GIB, 8, "ppo.microbatch_size", host * GIB)


def memory_of(*phases: Phase) -> MemoryPlan:
    return MemoryPlan(GIB, GIB, GIB, GIB, phases)


def test_a_run_that_cannot_fit_is_refused_with_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "free_host_bytes", lambda: 10 * GIB)
    with Refusal(
        "on cpu policy update takes 11.0 GiB whatever its batches are, and 10.0 GiB are free: weights 1.0",
        cause="A model whose weights, optimizer and rollout are larger than the memory.",
        remedy="train a LoRA in place of all weights, or use --dtype bfloat16",
    ).raised():
        require_memory(memory_of(phase("rollout", 5, 8), phase("policy update", 10, 8)), torch.device("cpu"))
    with Refusal(
        "keep 12.0 GiB on the host, and 10.0 GiB are free",
        cause="More rollouts of value pretraining than the host's memory holds.",
        remedy="lower --train.pretrain.kept-rollouts",
    ).raised():
        require_memory(memory_of(phase("value pretraining", 5, 1, host=12)), torch.device("cpu"))


def test_batches_that_will_be_halved_are_told_with_the_size_that_fits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(capacity, "free_host_bytes", lambda: 10 * GIB)
    (line,) = require_memory(
        memory_of(phase("rollout", 5, 4), phase("policy update", 6, 8)), torch.device("cpu")
    )
    assert line.endswith("14.0 GiB with 8 at a time, and 10.0 GiB are free; train.ppo.microbatch_size=4 fits")


def test_a_dry_run_tells_what_a_gpu_of_80_gb_cannot_hold_and_what_helps() -> None:
    (batch,) = smaller_batches(memory_of(phase("rollout", 60, 8), phase("policy update", 70, 8)), GPU_BYTES)
    assert batch.endswith("train.ppo.microbatch_size=4 fits")
    (weights,) = smaller_batches(memory_of(phase("rollout", 200, 8), phase("evaluation", 99, 8)), GPU_BYTES)
    assert "rollout takes 201.0 GiB whatever its batches are" in weights
    assert "train a LoRA in place of all weights" in weights
    assert smaller_batches(memory_of(phase("rollout", 60, 8)), GPU_BYTES) == []


def test_what_this_host_has_free_is_known() -> None:
    free = free_host_bytes()
    assert free is None or 0 < free < 1 << 50


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"meminfo": "MemTotal: 9 kB\nMemAvailable: 8 kB\n"}, 8192),
        (
            {
                "meminfo": "MemAvailable: 8 kB\n",
                "memory.max": "6000\n",
                "memory.current": "3000\n",
                "memory.stat": "anon 1\ninactive_file 500\n",
            },
            3500,
        ),
        ({"meminfo": "MemAvailable: 8 kB\n", "memory.max": "max\n"}, 8192),
    ],
)
def test_free_memory_is_the_container_s_where_that_is_less(
    files: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(host_memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(host_memory, "_CGROUP", tmp_path)
    assert free_host_bytes() == expected
