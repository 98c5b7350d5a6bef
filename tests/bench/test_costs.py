"""The published models cost what is recorded, within the budgets; the plan counts what the steps dispatch."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
import torch

from bench import costs
from bench.published import PUBLISHED, prompt_conditioning
from lacfast.runs import costs as counters
from lacfast.runs.costs import count

RECORDED = json.loads(costs.RESULT.read_text(encoding="utf-8"))
BLOCKS = {
    "sd15": (2, 9),
    "sdxl": (2, 7),
    "sd35_medium": (1, 24),
    "flux_dev": (1, 57),
    "flux2_dev": (1, 56),
    "flux2_klein": (1, 25),
    "qwen_image": (1, 60),
    "z_image": (1, 30),
    "sana": (1, 20),
    "pixart_sigma": (1, 28),
    "wan_1b": (1, 30),
    "wan_14b": (1, 40),
}
"""Blocks of the critic's branch and of the model; a UNet's are its levels and its middle."""

COUNTED_IN_PART = {
    *("sdxl", "sd35_medium", "flux_dev", "flux2_dev", "flux2_klein", "qwen_image", "z_image"),
    *("sana", "pixart_sigma", "wan_1b", "wan_14b"),
}
"""By test_the_step_is_recorded; in full they would take most of the time."""

each_model = pytest.mark.parametrize("name", PUBLISHED)


@cache
def counted(name: str) -> dict[str, Any]:
    return RECORDED[name] if name in COUNTED_IN_PART else costs.measure(name)


@pytest.mark.parametrize("name", sorted(PUBLISHED.keys() - COUNTED_IN_PART))
def test_what_is_recorded_is_what_is_counted(name: str) -> None:
    assert counted(name) == RECORDED[name], "python -m bench.costs && python -m bench.report"


QUICK = ("sdxl", "sd35_medium", "flux_dev")


@pytest.mark.parametrize(
    "name",
    [
        *QUICK,
        *(pytest.param(name, marks=pytest.mark.slow) for name in sorted(COUNTED_IN_PART.difference(QUICK))),
    ],
)
def test_the_step_is_recorded(name: str) -> None:
    work, recorded = costs.Workload(name), RECORDED[name]
    step = work.step(None)
    assert step.model_kernels == recorded["kernels"]["model"]
    assert step.all.kernels == recorded["kernels"]["step"]["none"]
    assert step.all.flops * work.table.num_steps == recorded["flops_per_image"]["sampling"] * costs.BATCH


@each_model
def test_the_model_has_its_published_size(name: str) -> None:
    assert counted(name)["parameters"] == PUBLISHED[name].parameters


@each_model
def test_a_step_adds_six_kernels_and_a_store_for_each_kept_feature(name: str) -> None:
    kernels, features = counted(name)["kernels"], counted(name)["features"]
    assert features["none"] == 0 < min(features["shared"], features["branch"])
    for trunk, kept in features.items():
        budget = costs.ADDED_KERNELS + kept * costs.KERNELS_PER_FEATURE + costs.OWN_KERNELS.get(name, 0)
        assert kernels["step"][trunk] - kernels["model"] <= budget, trunk


@each_model
def test_a_microbatch_stays_within_its_budget_and_the_host_never_waits(name: str) -> None:
    found = counted(name)
    assert found["operations"]["microbatch"] <= costs.MICROBATCH_OPERATIONS[name]
    assert found["syncs"] == costs.SYNCS


@each_model
def test_values_of_all_steps_cost_a_share_of_sampling(name: str) -> None:
    flops = counted(name)["flops_per_image"]
    part, whole = BLOCKS[name]
    assert 0 < flops["values"]["shared"] <= costs.VALUE_SHARE_OF_HEADS * flops["sampling"]
    bound = part / whole + costs.VALUE_SHARE_BEYOND_BRANCH
    assert flops["values"]["shared"] < flops["values"]["branch"] <= bound * flops["sampling"]


def test_an_image_takes_fewer_flops_than_in_flow_grpo_s_loop() -> None:
    found = counted("sd35_medium")
    ours = costs.same_maths(found["flops_per_image"])
    assert ours <= costs.FLOW_GRPO_RATIO * costs.same_maths(found["flow_grpo_flops_per_image"])


def test_the_plan_of_a_run_counts_what_its_steps_dispatch() -> None:
    work = costs.Workload("sd15")
    plan = count(
        work.backbone, None, work.table, prompt_conditioning(work.model, work.backbone, 1), work.config
    )
    flops = {
        phase: total * work.config.batch_size
        for phase, total in RECORDED["sd15"]["flops_per_image"].items()
        if isinstance(total, int)
    }
    assert plan.sampling_flops == flops["sampling"]
    assert plan.decode_flops == flops["decode"]
    assert plan.update_forward_flops == flops["update_forward"]
    assert plan.update_backward_flops == flops["update_backward"]


def test_a_wait_of_the_host_is_counted() -> None:
    tensor = torch.empty(3, device="meta")

    def body() -> None:
        float(tensor.sum())
        tensor.cpu()
        tensor.view(1, 3).mul(2)

    found = counters.counted(body)
    assert (found.syncs, found.operations, found.kernels) == (2, 5, 4)
