"""Rollouts from a captured step are those of the eager one, whatever changes between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_backbones import PROMPTS, brightness, tiny_backbone, tiny_config
from tiny_pipelines import FAMILIES, backbone_of, tiny_pipeline
from tolerances import assert_same_step, assert_same_sum
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lacfast import LatentActorCriticTrainer, ops
from lacfast.backbone import build_critic
from lacfast.backbones import lora as adapters
from lacfast.backbones.latent import LatentBackbone
from lacfast.backbones.scheduler_choice import is_flow
from lacfast.checkpoint import load_weights, save_run
from lacfast.config import (
    TRUNKS,
    CriticConfig,
    Fixed,
    GraphConfig,
    LoRAConfig,
    PPOConfig,
    Ratio,
    SamplerConfig,
)
from lacfast.critic.critic import Critic
from lacfast.learning.averaging import WeightAverage
from lacfast.records import NoiseKey, Rollout
from lacfast.rollout import sampler as rollout_sampler
from lacfast.rollout.sampler import RolloutSampler
from lacfast.runtime.graph import GraphRunner

FAKE = GraphConfig(mode="fake", strict=True, warmup_steps=1)
SAMPLER = SamplerConfig(num_steps=3)
CRITIC = CriticConfig(hidden_dim=16, head_dim=8, num_heads=2)
LORA = LoRAConfig(rank=2)


def critic_of(backbone: LatentBackbone, trunk: str = "branch") -> Critic:
    critic = build_critic(backbone, 2, replace(CRITIC, trunk=trunk))
    assert critic is not None
    # It starts at zero, whatever it reads.
    nn.init.normal_(critic.head.output.weight)
    return critic


class Both:
    """One backbone sampled eagerly and from recorded graphs."""

    def __init__(self, backbone: LatentBackbone, critic: Critic | None, graph: GraphConfig = FAKE) -> None:
        self.backbone = backbone
        self.runner = GraphRunner(graph)
        self.captured = RolloutSampler(backbone, critic, self.runner)
        self.eager = RolloutSampler(backbone, critic, GraphRunner())

    def agree(
        self,
        prompts: list[str] = PROMPTS[:3],
        *,
        sampler: SamplerConfig = SAMPLER,
        seed: int = 0,
        first_id: int = 0,
        **settings: Any,
    ) -> Rollout:
        """Sample by both, compare every bit, and give the captured rollout."""
        table = self.backbone.transition_table(sampler)
        noise = NoiseKey.create(seed, range(first_id, first_id + len(prompts)))
        settings |= {"guidance_scale": sampler.guidance_scale}
        eager, captured = (
            sampler.sample(table, prompts, [{}] * len(prompts), noise, **settings)
            for sampler in (self.eager, self.captured)
        )
        assert_same(captured, eager)
        return captured


def tensors_of(rollout: Rollout) -> dict[str, Tensor]:
    stored = {name: getattr(rollout, name) for name in ("latents", "model_outputs", "log_probs", "values")}
    return stored | {f"features.{name}": tensor for name, tensor in rollout.features.items()}


def assert_same(first: Rollout, second: Rollout) -> None:
    ours, theirs = tensors_of(first), tensors_of(second)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.isfinite().all(), name
        assert torch.equal(tensor, theirs[name]), name


CHANGES: dict[str, dict[str, Any]] = {
    "more steps": {"sampler": replace(SAMPLER, num_steps=6)},
    "fewer steps": {"sampler": replace(SAMPLER, num_steps=1)},
    "window": {"sampler": replace(SAMPLER, window=Fixed((1, 2)))},
    "noise level": {"sampler": replace(SAMPLER, noise_level=0.3)},
    "kind": {"sampler": replace(SAMPLER, kind="cps")},
    "deterministic": {"sampler": replace(SAMPLER, kind="ode", noise_level=0.0)},
    "shift": {"sampler": replace(SAMPLER, shift=3.0)},
    "guidance scale": {"sampler": replace(SAMPLER, guidance_scale=5.0)},
    "seed": {"seed": 9},
    "sample ids": {"first_id": 100},
    "prompts": {"prompts": PROMPTS[4:7]},
}


@pytest.fixture(scope="module")
def guided() -> Both:
    """Has captured rollouts with guidance."""
    backbone = tiny_backbone("dit")
    both = Both(backbone, critic_of(backbone))
    # As many steps as the longest schedule below, so that there is room for it.
    both.agree(sampler=replace(SAMPLER, guidance_scale=3.0, num_steps=6))
    return both


@pytest.mark.parametrize("name", CHANGES)
def test_what_a_rollout_is_made_of_changes_without_a_new_capture(guided: Both, name: str) -> None:
    changes = dict(CHANGES[name])
    sampler = changes.pop("sampler", SAMPLER)
    if sampler.guidance_scale == 1:
        sampler = replace(sampler, guidance_scale=3.0)
    before = guided.captured.sample(
        guided.backbone.transition_table(replace(SAMPLER, guidance_scale=3.0)),
        PROMPTS[:3],
        [{}] * 3,
        NoiseKey.create(0, range(3)),
        guidance_scale=3.0,
    )
    changed = guided.agree(sampler=sampler, **changes)
    assert guided.runner.statistics.captures == 1
    assert changed.latents.shape != before.latents.shape or not torch.equal(changed.latents, before.latents)


def optimizer_step(both: Both) -> None:
    parameters = both.backbone.policy_parameters()
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(parameters, lr=1e-2).step()


def critic_rescaled(both: Both) -> None:
    critic = both.captured.critic
    assert critic is not None
    critic.rescale(torch.zeros(2), torch.ones(2), torch.full((2,), 0.3), torch.full((2,), 2.0))


def adapter_swapped(both: Both) -> None:
    generator = torch.Generator().manual_seed(3)
    for tensor in adapters.adapter_state(both.backbone.model, adapters.POLICY).values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator))


def addresses(backbone: LatentBackbone) -> list[int]:
    return [tensor.data_ptr() for tensor in backbone.model.state_dict().values()]


@pytest.mark.parametrize(
    ("change", "lora"),
    [
        (optimizer_step, None),
        (optimizer_step, LORA),
        (critic_rescaled, None),
        (adapter_swapped, LORA),
    ],
)
def test_weights_that_change_in_place_are_seen_by_the_graph(
    change: Callable[[Both], None], lora: LoRAConfig | None
) -> None:
    backbone = backbone_of(tiny_pipeline("sd3"), lora=lora)
    both, known = Both(backbone, critic_of(backbone)), addresses(backbone)
    before = both.agree()
    change(both)
    assert not torch.equal(both.agree().values, before.values)
    assert addresses(backbone) == known
    assert both.runner.statistics.captures == 1


@pytest.mark.parametrize("lora", [None, LORA], ids=["all weights", "lora"])
def test_averaged_and_loaded_weights_are_seen_by_the_graph(lora: LoRAConfig | None, tmp_path: Path) -> None:
    backbone = backbone_of(tiny_pipeline("sd3"), lora=lora)
    backbone.critic = critic_of(backbone)
    both, known = Both(backbone, backbone.critic), addresses(backbone)
    first = both.agree()
    save_run(backbone, {}, tmp_path / "saved")
    average = WeightAverage(backbone.policy_state(), 0.5)
    optimizer_step(both)
    average.update()
    second = both.agree()
    with average.applied():
        averaged = both.agree()
    assert not torch.equal(averaged.latents, first.latents)
    assert not torch.equal(averaged.latents, second.latents)
    assert_same(both.agree(), second)
    load_weights(backbone, tmp_path / "saved")
    assert_same(both.agree(), first)
    assert addresses(backbone) == known
    assert both.runner.statistics.captures == 1


@pytest.mark.parametrize(
    ("family", "lora"), [*((family, LORA) for family in FAMILIES), ("sd15", None), ("sd3", None)]
)
def test_every_family_is_captured_in_bfloat16_too(family: str, lora: LoRAConfig | None) -> None:
    """With all weights the casts of autocast are in the graph, so an update reaches them."""
    backbone = backbone_of(tiny_pipeline(family), lora=lora, dtype=torch.bfloat16)
    both = Both(backbone, critic_of(backbone))
    first = both.agree(sampler=ddim(backbone))
    optimizer_step(both)
    assert not torch.equal(both.agree(sampler=ddim(backbone)).latents, first.latents)
    assert both.runner.statistics.captures == 1


def ddim(backbone: LatentBackbone) -> SamplerConfig:
    """SD 1.x and XL predict the noise."""
    return SAMPLER if is_flow(backbone.scheduler) else replace(SAMPLER, kind="ddim", noise_level=1.0)


@pytest.mark.parametrize("trunk", [trunk for trunk in TRUNKS if trunk != "none"])
def test_every_critic_is_captured_with_the_step(trunk: str) -> None:
    backbone = backbone_of(tiny_pipeline("sd3"), lora=LORA)
    both = Both(backbone, critic_of(backbone, trunk))
    assert both.agree().values.shape == (3, 3, 2)
    assert both.runner.statistics.captures == 1


def test_a_tail_batch_is_padded_to_the_full_one_and_cut() -> None:
    both = Both(tiny_backbone("dit"), None)
    both.agree(PROMPTS[:4], batch_size=4)
    tail, ids = PROMPTS[4:6], torch.tensor([4, 5])
    table = both.backbone.transition_table(SAMPLER)
    captured = both.captured.sample(table, tail, [{}] * 2, NoiseKey.create(0, ids), batch_size=4)
    padded = both.eager.sample(
        table, [*tail, tail[1], tail[1]], [{}] * 4, NoiseKey.create(0, torch.tensor([4, 5, 5, 5]))
    )
    assert torch.equal(captured.latents, padded.latents[:, :2])
    assert torch.equal(captured.log_probs, padded.log_probs[:, :2])
    assert (captured.prompts, captured.batch_size, len(captured.conditioning)) == (tail, 2, 2)
    assert both.runner.statistics.captures == 1


def test_a_rollout_does_not_change_when_the_next_one_is_sampled() -> None:
    backbone = tiny_backbone("dit")
    both = Both(backbone, critic_of(backbone))
    first = both.agree()
    kept = {name: tensor.clone() for name, tensor in tensors_of(first).items()}
    conditioning = first.conditioning.tensors["encoder_hidden_states"].clone()
    both.agree(PROMPTS[3:6], seed=5)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in tensors_of(first).items())
    assert torch.equal(first.conditioning.tensors["encoder_hidden_states"], conditioning)
    assert first.noise.seed.item() == 0


class CountCopies(TorchDispatchMode):
    """Elements that were copied from one tensor into a new one."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.clone.default:
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


def test_an_eager_rollout_takes_its_buffers_over_and_a_captured_one_copies_them() -> None:
    both = Both(tiny_backbone("dit"), None)
    slab = tuple(both.agree().latents.shape)
    table, noise = both.backbone.transition_table(SAMPLER), NoiseKey.create(0, range(3))
    copies = []
    for sampler in (both.eager, both.captured):
        with CountCopies() as counted:
            sampler.sample(table, PROMPTS[:3], [{}] * 3, noise)
        copies.append(counted.shapes.count(slab))
    assert copies == [0, 1]


def test_what_a_graph_freezes_has_a_graph_of_its_own() -> None:
    backbone = backbone_of(tiny_pipeline("sd3"), lora=LORA)
    both = Both(backbone, None)
    adapter_swapped(both)
    policy = both.agree()
    with adapters.activated(backbone.model, None):
        base = both.agree()
    assert not torch.equal(policy.latents, base.latents)
    assert_same(both.agree(), policy)
    assert both.runner.statistics.captures == 2
    with ops.backend("reference"):
        both.agree()
    both.agree(keep_features=False)
    assert both.runner.statistics.captures == 4


def test_a_longer_schedule_than_there_is_room_for_captures_once_more() -> None:
    both = Both(tiny_backbone("dit"), None)
    for num_steps, captures in ((3, 1), (5, 2), (4, 2), (5, 2)):
        both.agree(sampler=replace(SAMPLER, num_steps=num_steps))
        assert both.runner.statistics.captures == captures
    # The shorter graph is gone.
    assert len(both.captured._captured) == 1


def test_only_so_many_shapes_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout_sampler, "KEPT_SHAPES", 2)
    both = Both(tiny_backbone("dit"), None)
    for count in (1, 2, 1, 3):
        both.agree(PROMPTS[:count])
    both.agree(PROMPTS[:1])
    # The shape that was not used for longest went.
    assert (len(both.captured._captured), both.runner.statistics.captures) == (2, 3)
    size = both.runner.statistics.graph_bytes
    both.captured.close()
    assert size > 0
    assert both.runner.statistics.graph_bytes == 0


def test_a_parameter_that_was_replaced_stops_sampling_with_its_name() -> None:
    both = Both(tiny_backbone("dit"), None)
    both.agree()
    parameter = both.backbone.policy_parameters()[0]
    parameter.data = parameter.data.clone()
    with pytest.raises(ValueError, match=r"model\..* is not where the graph of the denoising step of \(3, "):
        both.agree()


def test_a_step_that_cannot_be_captured_leaves_an_eager_sampler() -> None:
    backbone = tiny_backbone("dit")
    critic = critic_of(backbone)
    critic.head.register_forward_hook(lambda module, inputs, values: values * (1 + 0 * values.sum().item()))
    both = Both(backbone, critic, replace(FAKE, strict=False))
    with pytest.warns(RuntimeWarning, match="the denoising step of .* cannot be captured") as caught:
        both.agree(keep_features=False)
    both.agree(seed=4, keep_features=False)
    assert len(caught) == 1
    assert both.runner.statistics.fallbacks == 1
    assert not both.captured._captured


@pytest.mark.parametrize(
    ("trunk", "count"), [*((trunk, 3) for trunk in TRUNKS if trunk != "none"), ("shared", 40)]
)
def test_values_after_the_last_step_are_those_within_each(trunk: str, count: int) -> None:
    backbone = tiny_backbone("dit")
    critic = critic_of(backbone, trunk)
    valued: list[int] = []
    critic.head.register_forward_hook(lambda module, inputs, values: valued.append(len(values)))
    sampler = RolloutSampler(backbone, critic, GraphRunner())
    table = backbone.transition_table(replace(SAMPLER, num_steps=12, guidance_scale=2.0))
    prompts = [PROMPTS[index % len(PROMPTS)] for index in range(count)]
    after, within = (
        sampler.sample(
            *(table, prompts, [{}] * count, NoiseKey.create(0, range(count))),
            guidance_scale=2.0,
            keep_features=keep,
        ).values
        for keep in (True, False)
    )
    # As many whole steps as 32 states hold, at least one.
    assert valued == ([30, 6] if count == 3 else [40] * 12) + [count] * 12
    torch.testing.assert_close(after, within, rtol=1e-4, atol=1e-5)


@pytest.mark.isa
def test_a_trainer_on_graphs_learns_what_an_eager_one_does() -> None:
    weights, metrics = [], []
    before = tiny_backbone("dit").policy_state()
    for graph in (FAKE, GraphConfig(mode="off")):
        backbone = tiny_backbone("dit")
        ppo = PPOConfig(clip=Ratio(1e-3), num_minibatches=2, microbatch_size=8, adam_eps=1e-4)
        config = tiny_config(graph=graph, ema_decay=0.5, rollout_batch_size=3, ppo=ppo)
        trainer = LatentActorCriticTrainer(backbone, brightness, PROMPTS, config)
        metrics.append([trainer.train_iteration() for _ in range(2)])
        metrics[-1].append(trainer.evaluate().means())
        weights.append(backbone.policy_state())
        trainer.close()
    ours, eager = metrics
    # One denoising step although the last of the parts of three is smaller; forward with backward and
    # optimizer step, each of policy and critic.
    assert [iteration["graph_captures"] for iteration in ours[:2]] == [1 + 2 * 2] * 2
    assert ours[1]["graph_fallbacks"] == 0
    assert "graph_captures" not in eager[0]
    for one, other in zip(ours, eager, strict=True):
        for name in {"reward/brightness", "policy_loss", "value_loss", "brightness"} & one.keys():
            assert_same_sum(one[name], other[name], unit=1)
    assert_same_step(*weights, before)
