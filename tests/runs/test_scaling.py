"""The model on paper of an iteration on several GPUs."""

from __future__ import annotations

import io
import math
import re
from dataclasses import replace

import pytest
from refusals import Refusal
from rich.console import Console

from lacfast.config import variant
from lacfast.runs.apart import apart
from lacfast.runs.costs import Costs
from lacfast.runs.plan import plan
from lacfast.runs.recipes import recipe
from lacfast.runs.scaling import LINK_BYTES, RANK_FLOPS, scaling
from lacfast.runs.terminal import show_plan

RECIPE = recipe("shapes-ppo").train
# A hold takes no shards.
UNHELD = replace(RECIPE, ppo=replace(RECIPE.ppo, hold=None))
SHAPES = replace(recipe("shapes-ppo"), train=UNHELD, dry_run=True)


@pytest.fixture(scope="module")
def costs() -> Costs:
    return plan(SHAPES).costs


def test_work_is_shared_and_gradients_are_sent_twice_but_for_a_rank_s_own_part(costs: Costs) -> None:
    ppo = SHAPES.train.ppo
    steps = ppo.num_minibatches * ppo.num_inner_epochs
    found = scaling(costs, SHAPES.train, 4)
    assert found.flops == costs.flops / 4
    assert found.optimizer_steps == 2 * steps
    weights = steps * (costs.trained_parameters + costs.critic_parameters)
    assert found.gradient_bytes == 2 * 3 / 4 * 4 * weights
    seconds = found.flops / RANK_FLOPS
    assert found.efficiency == pytest.approx(seconds / (seconds + found.gradient_bytes / LINK_BYTES))


def test_one_rank_sends_nothing(costs: Costs) -> None:
    found = scaling(costs, SHAPES.train, 1)
    assert (found.gradient_bytes, found.efficiency, found.flops) == (0, 1, costs.flops)


SHARDED = variant(SHAPES, train=replace(SHAPES.train, shard=2), value_pretraining=False)


def test_a_rank_keeps_its_part_of_weights_gradients_and_moments() -> None:
    whole = plan(variant(SHAPES, value_pretraining=False), ranks=4).memory
    parts = plan(SHARDED, ranks=4)
    model = parts.shards.model
    assert whole.weight_bytes - parts.memory.weight_bytes == model.kept // 2
    assert whole.training_bytes - parts.memory.training_bytes == model.gradient // 2 * 4
    update = {phase.name: phase.fixed for phase in parts.memory.phases}["policy update"]
    scattered = replace(SHARDED, train=replace(SHARDED.train, shard_gradients=True))
    memory = plan(scattered, ranks=4).memory
    assert {phase.name: phase.fixed for phase in memory.phases}["policy update"] < update


def test_weights_are_gathered_once_for_a_rollout_and_twice_for_a_microbatch() -> None:
    ppo = SHARDED.train.ppo
    planned = plan(
        replace(SHARDED, train=replace(SHARDED.train, ppo=replace(ppo, microbatch_size=64))), ranks=4
    )
    pairs = planned.costs.update_pairs // (ppo.num_minibatches * ppo.num_inner_epochs) / 4
    microbatches = ppo.num_minibatches * ppo.num_inner_epochs * math.ceil(pairs / 64)
    found = planned.on(4)
    assert found.gathers == 1 + 2 * microbatches
    assert found.gathered_bytes == found.gathers * planned.shards.model.gathered / 2


def test_a_dry_run_for_several_gpus_shows_it() -> None:
    config, out = replace(SHAPES, gpus=4), io.StringIO()
    show_plan(config, plan(config, ranks=4), Console(file=out, width=200))
    assert "On 4 GPUs, each" in out.getvalue()
    assert "on paper" in out.getvalue()
    sharded, out = replace(SHARDED, gpus=4), io.StringIO()
    show_plan(sharded, plan(sharded, ranks=4), Console(file=out, width=200))
    assert "weights sent where they are gathered" in out.getvalue()


def test_what_has_no_meaning_is_refused() -> None:
    refused = Refusal(
        "gpus=4 would be ignored: a run has as many as it is started with",
        cause="`gpus` without `dry_run`",
        remedy="start it with torchrun --nproc-per-node, or add --dry-run",
    )
    with refused.raised():
        replace(recipe("shapes-ppo"), gpus=4)
    with pytest.raises(ValueError, match="shard=2 does not divide the 3 ranks"):
        plan(SHARDED, ranks=3)
    with pytest.raises(ValueError, match="is fewer than the 1000 ranks"):
        plan(SHAPES, ranks=1000)


def test_ranks_that_sample_apart_work_while_the_others_learn(costs: Costs) -> None:
    stale = replace(SHAPES.train, rollout_ranks=1, staleness=1)
    found = apart(costs, stale, 4, rollout_bytes=1000)
    sampled = costs.sampling_flops + costs.decode_flops
    assert found.sampling_seconds == pytest.approx(sampled / RANK_FLOPS)
    sums = scaling(costs, stale, 3).gradient_bytes / LINK_BYTES
    assert found.learning_seconds == pytest.approx((costs.flops - sampled) / 3 / RANK_FLOPS + sums)
    assert found.rollout_bytes == 1000
    assert found.weight_bytes == 4 * costs.trained_parameters
    assert found.seconds == max(found.learning_seconds, found.sampling_seconds, found.sending_seconds)
    in_turn = apart(costs, replace(stale, staleness=0), 4, rollout_bytes=1000)
    assert in_turn.seconds == pytest.approx(
        in_turn.learning_seconds + in_turn.sampling_seconds + in_turn.sending_seconds
    )


def test_a_dry_run_tells_who_waits_for_whom() -> None:
    config = replace(SHAPES, gpus=4, train=replace(SHAPES.train, rollout_ranks=1, staleness=1))
    out = io.StringIO()
    show_plan(config, plan(config, ranks=4), Console(file=out, width=200))
    assert "3 GPUs learn and 1 sample, at a time" in out.getvalue()
    assert "on paper" in out.getvalue()
    assert "those that learn " in out.getvalue()
    assert re.search(r"prompts, on the host .* \d+\.\d\d MiB each, 4\.00 GiB at most", out.getvalue())
    with pytest.raises(ValueError, match="rollout_ranks=1 of 1 leave no rank that learns"):
        plan(config, ranks=1)
