"""What only a CUDA device can tell of an update: its graphs, its memory, and that the host does not wait."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from lacfast.config import GraphConfig, PPOConfig, Ratio, SamplerConfig

if TYPE_CHECKING:
    from lacfast import LatentActorCriticTrainer

pytestmark = pytest.mark.gpu

GRAPHS = GraphConfig(mode="on", strict=True, warmup_steps=1)
# adam_eps: AdamW divides by the gradient's size, so rounding of one near 0 would be a step of full size.
PPO = PPOConfig(clip=Ratio(1e-3), num_minibatches=3, microbatch_size=5, warmup_steps=8, adam_eps=1e-4)


def trainer_for(**changes: Any) -> LatentActorCriticTrainer:
    # A lent GPU machine may lack diffusers.
    tiny = pytest.importorskip("tiny_backbones")
    trainer_type = pytest.importorskip("lacfast.trainer").LatentActorCriticTrainer
    backbone = tiny.tiny_backbone("dit", size=tiny.models.TINY)
    for module in (backbone.model, backbone.prompt_encoder, backbone.codec):
        module.cuda()
    settings = {"ppo": PPO, "sampler": SamplerConfig(num_steps=4, guidance_scale=2.5)}
    return trainer_type(backbone, tiny.brightness, tiny.PROMPTS, tiny.tiny_config(**(settings | changes)))


def test_an_update_on_graphs_is_the_eager_one() -> None:
    graphed, eager = trainer_for(graph=GRAPHS), trainer_for(graph=GraphConfig(mode="off"))
    for _ in range(4):
        ours, theirs = graphed.train_iteration(), eager.train_iteration()
        for name in ("policy_grad_norm", "critic_grad_norm", "value_loss"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-2), name
    assert graphed.graphs.statistics.fallbacks == 0
    for (name, tensor), other in zip(
        graphed.backbone.model.state_dict().items(), eager.backbone.model.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(tensor, other, rtol=0, atol=1e-5, msg=name)


@contextmanager
def _waiting_allowed() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("default")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("error")


@pytest.mark.parametrize("graph", [GraphConfig(mode="off"), GRAPHS], ids=["off", "on"])
def test_the_host_waits_only_where_it_reads_the_records(
    graph: GraphConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_for(graph=graph)
    # Compiles kernels, finds sizes, captures.
    for _ in range(3):
        trainer.train_iteration()
    rollout = trainer.collect(trainer.prompts, 0)
    assert rollout is not None
    advantages = trainer.advantages(rollout)
    totals = importlib.import_module("lacfast.learning.totals")
    reads, read = [], totals.UpdateRecords.read

    def counted(self: Any, *args: Any) -> Tensor:
        reads.append(len(self._pending))
        with _waiting_allowed():
            return read(self, *args)

    monkeypatch.setattr(totals.UpdateRecords, "read", counted)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.learner.learn(rollout, advantages, 3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(reads) == 1


def test_the_size_that_is_found_fits() -> None:
    trainer = trainer_for(ppo=PPOConfig(clip=Ratio(1e-3)), graph=GraphConfig(mode="off"))
    torch.cuda.reset_peak_memory_stats()
    trainer.train_iteration()
    assert trainer.learner.policy_update.microbatch.size >= 1
    assert torch.cuda.max_memory_allocated() < torch.cuda.get_device_properties(0).total_memory


def test_rows_of_the_host_are_read_as_they_are_however_far_the_device_lags() -> None:
    from lacfast.runtime.host_memory import Staging

    values = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
    busy = torch.eye(2048 if torch.version.cuda else 64, device="cuda")
    staging = Staging(busy.device)
    found, expected = [], []
    for batch in range(12):
        rows = torch.arange(batch, batch + 16 + batch % 3)
        read = staging.gather({"values": (values, rows)})["values"]
        for _ in range(20):
            busy = busy @ busy
        # Behind the work, as an update reads a minibatch while the host gathers the next.
        found.append((read * busy[0, 0]).sum(dim=1).mean())
        expected.append(values[rows].sum(dim=1).mean())
    torch.testing.assert_close(torch.stack(found).cpu(), torch.stack(expected), rtol=1e-3, atol=1e-2)
