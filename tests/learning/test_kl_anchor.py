"""The anchor runs over a rollout once, and a graph of it does not depend on the policy's."""

from __future__ import annotations

import pytest
import torch
from tiny_pipelines import PROMPTS, backbone_of, tiny_pipeline
from torch import Tensor, nn

from lacfast.backbone import Backbone
from lacfast.config import GraphConfig, LoRAConfig, SamplerConfig
from lacfast.learning.kl_anchor import KLAnchor
from lacfast.records import NoiseKey, Rollout
from lacfast.rollout.sampler import RolloutSampler
from lacfast.runtime.graph import GraphRunner

FAKE = GraphConfig(mode="fake", strict=True, warmup_steps=1)
LORA = LoRAConfig(rank=2)


def rollout_of(backbone: Backbone, runner: GraphRunner, guidance_scale: float, seed: int = 0) -> Rollout:
    table = backbone.transition_table(SamplerConfig(num_steps=3))
    noise = NoiseKey.create(seed, range(5))
    prompts = (PROMPTS * 5)[:5]
    return RolloutSampler(backbone, None, runner).sample(
        table, prompts, [{}] * 5, noise, guidance_scale=guidance_scale, batch_size=5
    )


def outputs_of(anchor: KLAnchor, rollout: Rollout, batch_size: int) -> Tensor:
    return anchor.outputs(rollout, torch.tensor([0, 2]), rollout.table.timesteps, batch_size=batch_size)


@pytest.mark.parametrize("lora", [None, LORA], ids=["all weights", "lora"])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_the_captured_anchor_is_the_eager_one_after_the_policy_moved(
    lora: LoRAConfig | None, guidance_scale: float
) -> None:
    backbone = backbone_of(tiny_pipeline("sd3"), lora=lora)
    frozen, runner = backbone.frozen_anchor(), GraphRunner(FAKE)
    captured, eager = (KLAnchor(frozen, each, guidance_scale) for each in (runner, GraphRunner()))
    for seed in range(2):
        rollout = rollout_of(backbone, runner, guidance_scale, seed)
        ours = outputs_of(captured, rollout, batch_size=5)
        assert torch.equal(ours, outputs_of(eager, rollout, batch_size=5))
        policy = rollout.model_outputs[[0, 2]]
        # Before its first update the policy is the anchor.
        assert torch.allclose(ours, policy, atol=1e-4) == (seed == 0)
        with torch.no_grad():
            for parameter in backbone.policy_parameters():
                parameter.add_(0.05)
    # One graph of the policy for each sampler object, one of the anchor.
    assert runner.statistics.captures == 3


@pytest.mark.isa
def test_a_tail_is_padded_to_the_one_shape_that_is_captured() -> None:
    backbone = backbone_of(tiny_pipeline("sd3"), lora=LORA)
    frozen, runner = backbone.frozen_anchor(), GraphRunner(FAKE)
    rollout = rollout_of(backbone, GraphRunner(), 1.0)
    anchor = KLAnchor(frozen, runner, 1.0)
    ours = outputs_of(anchor, rollout, batch_size=2)
    plain = outputs_of(KLAnchor(frozen, GraphRunner(), 1.0), rollout, batch_size=2)
    assert torch.equal(ours[:, :4], plain[:, :4])
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
    assert runner.statistics.captures == 1
    anchor.release()
    assert runner.statistics.graph_bytes == 0


def test_the_modules_are_walked_once_for_all_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = backbone_of(tiny_pipeline("sd3"), lora=LORA)
    anchor = KLAnchor(backbone.frozen_anchor(), GraphRunner(FAKE), 1.0)
    rollout = rollout_of(backbone, GraphRunner(), 1.0)
    outputs_of(anchor, rollout, batch_size=1)
    walks: list[int] = []
    walk = nn.Module.named_modules
    monkeypatch.setattr(
        nn.Module, "named_modules", lambda *args, **kwargs: walks.append(1) or walk(*args, **kwargs)
    )
    counts = []
    for steps in ([0], [0, 2]):
        walks.clear()
        anchor.outputs(rollout, torch.tensor(steps), rollout.table.timesteps, batch_size=1)
        counts.append(len(walks))
    assert counts[0] == counts[1] > 0


def test_weights_that_moved_are_noticed_before_the_next_rollout() -> None:
    backbone = backbone_of(tiny_pipeline("sd3"), lora=LORA)
    anchor = KLAnchor(backbone.frozen_anchor(), GraphRunner(FAKE), 1.0)
    rollout = rollout_of(backbone, GraphRunner(), 1.0)
    outputs_of(anchor, rollout, batch_size=2)
    backbone.model.load_state_dict(
        {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}, assign=True
    )
    with pytest.raises(ValueError, match=r"anchor\.\S+ is not where the graph of the anchor's step"):
        outputs_of(anchor, rollout, batch_size=2)
