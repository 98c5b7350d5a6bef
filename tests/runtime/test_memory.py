"""The size of a microbatch fits the memory, gives way when it does not, and changes no result."""

from __future__ import annotations

import copy
import warnings
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import Refusal
from tiny_backbones import PROMPTS, brightness, tiny_backbone, tiny_config
from tolerances import assert_same_step
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from lacfast import LatentActorCriticTrainer, steer
from lacfast.backbones.latent import LatentBackbone
from lacfast.config import GraphConfig, KLPenalty, PPOConfig, Ratio, SteeringConfig, ValuePretrainingConfig
from lacfast.learning.batches import PolicyBatch
from lacfast.learning.runner import GraphedUpdate
from lacfast.prompts import PromptSet
from lacfast.records import Conditioning, Rollout
from lacfast.runtime import memory
from lacfast.runtime.memory import HOST_LIMIT, BatchSize

AUTO = PPOConfig(clip=Ratio(1e-3), num_minibatches=2, adam_eps=1e-4)
CPU = torch.device("cpu")


def trainer_for(ppo: PPOConfig, **changes: Any) -> LatentActorCriticTrainer:
    return LatentActorCriticTrainer(
        tiny_backbone("dit"), brightness, PROMPTS, tiny_config(ppo=ppo, **changes)
    )


def with_free_memory(monkeypatch: pytest.MonkeyPatch, free: int, fixed: int, per_pair: int) -> None:
    def measured(probe: memory.Probe, count: int, device: torch.device) -> int:
        probe(count)
        return fixed + count * per_pair

    monkeypatch.setattr(memory, "_peak_bytes", measured)
    monkeypatch.setattr(memory, "_free_bytes", lambda device: free)


def pairs_at_a_time(size: int = 0) -> BatchSize:
    return BatchSize(size, unit="pair", setting="ppo.microbatch_size")


def out_of_memory_beyond(limit: int, count: int) -> None:
    if count > limit:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def limited(backbone: LatentBackbone, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the model hold `limit` samples in its memory, and no more."""
    predict = backbone.predict

    def within(sample: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        output = predict(sample, timestep, conditioning)
        out_of_memory_beyond(limit, len(sample))
        return output

    monkeypatch.setattr(backbone, "predict", within)


def assert_same_trajectories(one: Rollout | None, other: Rollout | None) -> None:
    assert one is not None
    assert other is not None
    assert one.prompts == other.prompts
    for name in ("latents", "model_outputs", "log_probs", "values"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert torch.equal(one.rewards["brightness"], other.rewards["brightness"])


@pytest.mark.parametrize(
    ("free", "expected"), [(10_000, HOST_LIMIT), (1_199, 128), (300, 16), (150, 1), (0, 1)]
)
def test_the_largest_power_of_two_that_fits_is_chosen(
    free: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_free_memory(monkeypatch, free, fixed=100, per_pair=5)
    size = pairs_at_a_time()
    size.find(lambda count: None, CPU, reserved=50)
    assert size.size == expected
    size.find(lambda count: pytest.fail("it is known already"), CPU, reserved=0)


def test_a_pair_s_activations_are_measured() -> None:
    weight = torch.nn.Parameter(torch.randn(64, 64))

    def probe(count: int) -> None:
        (torch.ones(count, 64) @ weight).exp().sum().backward()

    # The input of the product and the result of exp; the weight is in both.
    assert (memory._peak_bytes(probe, 4, CPU) - memory._peak_bytes(probe, 2, CPU)) // 2 == 2 * 64 * 4
    assert memory._free_bytes(CPU) > 0


@pytest.mark.parametrize(("limit", "tried"), [(4, [1, 2, 4]), (3, [1, 2, 4]), (1, [1, 2])])
def test_a_probe_that_does_not_fit_bounds_the_size_by_what_ran(
    limit: int, tried: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_free_memory(monkeypatch, 1 << 20, fixed=0, per_pair=1)
    size, seen = pairs_at_a_time(), list[int]()

    def probe(count: int) -> None:
        seen.append(count)
        out_of_memory_beyond(limit, count)

    size.find(probe, CPU, reserved=0)
    assert size.size == {4: HOST_LIMIT, 3: 2, 1: 1}[limit]
    assert seen == tried


TOO_LARGE = Refusal(
    "out of memory with a single pair: CUDA out of memory",
    cause="A single sample needs more memory than the device has.",
    remedy="use gradient_checkpointing, a LoRA in place of all weights, bfloat16, a lower resolution",
    error=torch.OutOfMemoryError,
)


def test_a_first_probe_that_does_not_fit_names_what_needs_less_memory() -> None:
    with TOO_LARGE.raised():
        pairs_at_a_time().find(lambda count: out_of_memory_beyond(0, count), CPU, reserved=0)


def test_a_probe_that_does_not_fit_leaves_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    short = trainer_for(AUTO)
    gradient = short.learner.policy_update.gradient

    def cut_off(batch: PolicyBatch) -> None:
        gradient(batch)
        out_of_memory_beyond(1, len(batch.steps))

    monkeypatch.setattr(short.learner.policy_update, "gradient", cut_off)
    monkeypatch.setattr(short.learner.policy_update, "learn", lambda *_: out_of_memory_beyond(0, 1))
    with pytest.raises(torch.OutOfMemoryError):
        short.train_iteration()
    assert short.learner.policy_update.microbatch.size == 1
    assert all(parameter.grad is None for parameter in short.backbone.policy_parameters())


def test_the_probe_leaves_no_trace() -> None:
    found, given = trainer_for(AUTO), trainer_for(PPOConfig(**{**vars(AUTO), "microbatch_size": HOST_LIMIT}))
    first, second = found.train_iteration(), given.train_iteration()
    assert [update.microbatch.size for update in found.learner.updates] == [HOST_LIMIT, HOST_LIMIT]
    for name in ("policy_loss", "value_loss", "policy_grad_norm", "critic_grad_norm"):
        assert first[name] == second[name], name


def test_parts_are_smaller_where_the_whole_does_not_fit_beside_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    size, tried = pairs_at_a_time(4), list[int]()
    new_empty = Tensor.new_empty

    def allocated(part: Tensor, shape: tuple[int, ...]) -> Tensor:
        out_of_memory_beyond(2, len(part))
        return new_empty(part, shape)

    def rows(part: slice) -> Tensor:
        tried.append(part.stop - part.start)
        return torch.arange(part.start, part.stop).float()

    monkeypatch.setattr(Tensor, "new_empty", allocated)
    with pytest.warns(RuntimeWarning, match="out of memory with 4 pairs at a time; going on with 2"):
        assert size.joined(rows, 5).tolist() == [0, 1, 2, 3, 4]
    assert tried == [4, 2, 2, 1]
    assert pairs_at_a_time().joined(rows, 3).tolist() == [0, 1, 2]
    assert len(pairs_at_a_time().joined(rows, 0)) == 0


@pytest.mark.isa
def test_running_out_of_memory_halves_the_size_and_leaves_the_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain, short = trainer_for(AUTO), trainer_for(AUTO)
    before = copy.deepcopy(plain.backbone.model.state_dict())
    plain.train_iteration()
    gradient = short.learner.policy_update.gradient

    def cut_off(batch: PolicyBatch) -> None:
        # The error comes after the gradients of this microbatch are in.
        gradient(batch)
        out_of_memory_beyond(5, len(batch.steps))

    monkeypatch.setattr(short.learner.policy_update, "gradient", cut_off)
    with pytest.warns(RuntimeWarning, match=r"out of memory with \d+ pairs.*Set ppo.microbatch_size to 3"):
        metrics = short.train_iteration()
    assert [update.microbatch.size for update in short.learner.updates] == [3, HOST_LIMIT]
    assert metrics["first_max_abs_log_ratio"] < 1e-6
    assert_same_step(short.backbone.model.state_dict(), plain.backbone.model.state_dict(), before)


def test_a_captured_update_keeps_nothing_of_the_shape_that_did_not_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ppo = PPOConfig(**{**vars(AUTO), "microbatch_size": 8})
    short = trainer_for(ppo, graph=GraphConfig(mode="fake", strict=True))
    update = short.learner.policy_update
    gradient = update.gradient

    def cut_off(batch: PolicyBatch) -> None:
        out_of_memory_beyond(4, len(batch.steps))
        gradient(batch)

    monkeypatch.setattr(update, "gradient", cut_off)
    with pytest.warns(RuntimeWarning, match="out of memory with 8 pairs"):
        short.train_iteration()
    assert isinstance(update.runner, GraphedUpdate)
    steps = [step.name for _, step in update.runner._microbatches.values()]
    assert steps == ["the policy's microbatch of 4 pairs"]


@pytest.mark.parametrize("phase", ["rollout", "update"])
def test_a_graph_that_does_not_fit_is_captured_anew_for_fewer(
    phase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ppo = PPOConfig(**{**vars(AUTO), "microbatch_size": 8})
    graph = GraphConfig(mode="fake", strict=False)
    plain, short = trainer_for(AUTO), trainer_for(ppo, graph=graph)
    before = copy.deepcopy(plain.backbone.model.state_dict())
    plain.train_iteration()
    predict = short.backbone.predict

    def within(sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        # Eagerly all of it fits; the pool of a graph is memory besides.
        if is_in_torch_dispatch_mode() and torch.is_grad_enabled() == (phase == "update"):
            out_of_memory_beyond(4, len(sample))
        return predict(sample, *args, **kwargs)

    monkeypatch.setattr(short.backbone, "predict", within)
    unit = {"rollout": "samples", "update": "pairs"}[phase]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        short.train_iteration()
    told = [str(each.message) for each in caught if issubclass(each.category, RuntimeWarning)]
    assert [text.partition(";")[0] for text in told] == [f"out of memory with 8 {unit} at a time"]
    statistics = short.graphs.statistics
    assert statistics.fallbacks == 0
    assert statistics.captures >= 2
    assert_same_step(short.backbone.model.state_dict(), plain.backbone.model.state_dict(), before)


def test_a_single_pair_that_does_not_fit_is_an_error() -> None:
    def step(size: int) -> None:
        out_of_memory_beyond(0, size)

    with TOO_LARGE.raised(), pytest.warns(RuntimeWarning, match="out of memory with 4"):
        pairs_at_a_time(512).run(step, 4)


def test_what_was_made_for_a_size_that_does_not_fit_is_freed_before_the_next() -> None:
    events: list[str] = []

    def work(size: int) -> int:
        events.append(f"work {size}")
        out_of_memory_beyond(2, size)
        return size

    with pytest.warns(RuntimeWarning):
        assert pairs_at_a_time(8).run(work, 8, release=lambda: events.append("release")) == 2
    assert events == ["work 8", "release", "work 4", "release", "work 2"]


def test_a_part_that_was_handed_on_does_not_live_while_the_next_is_made() -> None:
    alive: list[bool] = []
    kept: list[weakref.ref[Tensor]] = []

    def work(rows: slice) -> Tensor:
        alive.extend(reference() is not None for reference in kept[-1:])
        made = torch.zeros(rows.stop - rows.start)
        kept.append(weakref.ref(made))
        return made

    sizes = [len(part) for part in map(torch.clone, pairs_at_a_time(2).parts(work, 5))]
    assert sizes == [2, 2, 1]
    assert alive == [False, False]


@pytest.mark.parametrize("mode", ["off", "fake"])
def test_a_rollout_goes_on_in_smaller_parts_and_is_the_same(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = GraphConfig(mode=mode, strict=mode == "fake")
    prompts = PromptSet.create(PROMPTS).cycle(8)
    expected = trainer_for(AUTO, rollout_batch_size=2, graph=graph).collect(prompts, 0)
    short = trainer_for(AUTO, graph=graph)
    limited(short.backbone, 3, monkeypatch)
    with pytest.warns(RuntimeWarning) as caught:
        found = short.collect(prompts, 0)
    assert [str(warning.message) for warning in caught] == [
        "out of memory with 8 samples at a time; going on with 4. Set rollout_batch_size to 4 to start there",
        "out of memory with 4 samples at a time; going on with 2. Set rollout_batch_size to 2 to start there",
    ]
    assert_same_trajectories(found, expected)
    # Nothing of the shapes that did not fit is kept, and they are not tried again.
    assert {len(held.buffers.sample) for held in short.sampler._captured.values()} <= {2}
    assert len(short.graphs._programs) == (mode == "fake")
    with warnings.catch_warnings(action="error"):
        assert_same_trajectories(short.collect(prompts, 0), expected)


def test_an_evaluation_goes_on_in_smaller_parts_and_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, short = trainer_for(AUTO, eval_batch_size=2).evaluate(), trainer_for(AUTO)
    limited(short.backbone, 2, monkeypatch)
    with pytest.warns(RuntimeWarning, match="Set eval_batch_size to 2 to start there"):
        found = short.evaluate()
    assert torch.equal(found.images, expected.images)
    assert torch.equal(found.rewards["brightness"], expected.rewards["brightness"])


def test_decoding_goes_on_in_smaller_parts_and_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_backbone("dit")
    decode, latents = backbone.codec.decode, torch.randn(7, *backbone.latent_shape)
    expected = torch.cat([decode(part) for part in torch.split(latents, 3)])

    def within(part: Tensor) -> Tensor:
        out_of_memory_beyond(3, len(part))
        return decode(part)

    monkeypatch.setattr(backbone.codec, "decode", within)
    with pytest.warns(RuntimeWarning, match="out of memory with 7 images.*rollout_batch_size or eval_batch"):
        assert torch.equal(backbone.decode(latents), expected)


@pytest.mark.parametrize("weight", [0.0, 0.1])
def test_steering_goes_on_in_smaller_parts_and_is_the_same(
    weight: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_for(AUTO)
    nn.init.normal_(trainer.critic.head.output.weight, generator=torch.Generator().manual_seed(0))
    config = SteeringConfig(method="best_of_n", particles=4, batch_size=8, guidance_weight=weight)
    made = partial(steer, trainer.backbone, PROMPTS[:2], config, sampler=trainer.config.sampler)
    images, stats = made()
    limited(trainer.backbone, 3, monkeypatch)
    with pytest.warns(RuntimeWarning, match="out of memory with 4 latents.*Set batch_size to 2"):
        found, counted = made()
    torch.testing.assert_close(found, images, rtol=1e-4, atol=1e-5)
    assert counted.evaluations == stats.evaluations


def test_completions_of_value_bounds_go_on_in_smaller_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    pretrain = ValuePretrainingConfig(iterations=1, held_out_samples=8, completions=2, bound_states=4)
    bounds = []
    for is_short in (False, True):
        made = trainer_for(AUTO, pretrain=pretrain, eval_batch_size=8 if is_short else 2)
        rollout = made.collect(PromptSet.create(PROMPTS[:4]).cycle(8), 0)
        assert rollout is not None
        if is_short:
            limited(made.backbone, 3, monkeypatch)
            with pytest.warns(RuntimeWarning, match="Set eval_batch_size to 2"):
                bounds.append(made.measure_bounds(rollout))
        else:
            bounds.append(made.measure_bounds(rollout))
    assert torch.equal(bounds[0].ceiling, bounds[1].ceiling)


def test_the_anchor_goes_on_in_smaller_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    ppo = PPOConfig(**{**vars(AUTO), "num_inner_epochs": 2, "kl": KLPenalty(0.1), "microbatch_size": 8})
    plain, short = trainer_for(ppo), trainer_for(ppo)
    before = copy.deepcopy(plain.backbone.model.state_dict())
    plain.train_iteration()
    assert short.learner.anchor is not None
    limited(short.learner.anchor.backbone, 4, monkeypatch)
    with pytest.warns(RuntimeWarning, match="out of memory with 8 pairs"):
        short.train_iteration()
    assert short.learner.policy_update.microbatch.size == 4
    assert_same_step(short.backbone.model.state_dict(), plain.backbone.model.state_dict(), before)


def test_a_resumed_run_keeps_the_size_that_was_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, resumed = trainer_for(AUTO), trainer_for(AUTO)
    # The moments of a tiny model are nothing beside a pair of this size.
    with_free_memory(monkeypatch, 5 << 40, fixed=0, per_pair=1 << 40)
    first.train_iteration()
    first.save(tmp_path / "run")
    monkeypatch.undo()
    resumed.load(tmp_path / "run")
    resumed.train_iteration()
    assert resumed.learner.policy_update.microbatch.size == first.learner.policy_update.microbatch.size == 4


def test_a_size_that_other_ranks_wait_for_does_not_shrink() -> None:
    refused = Refusal(
        "out of memory with 4 pairs at a time, and the other ranks wait for as many batches",
        cause="A rank with sharded weights runs out of memory.",
        remedy="set ppo.microbatch_size to 2",
        error=memory.DoesNotFitError,
    )
    size = BatchSize(4, unit="pair", setting="ppo.microbatch_size", shrinks=False)
    with refused.raised():
        size.run(partial(out_of_memory_beyond, 2), 4)
    assert size.size == 4
