"""Tables of a schedule: kept while it is unchanged, marked where a timestep is unknown, never waited for."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from lacfast import ops
from lacfast.compat.ddpo import ddim_step_with_logprob
from lacfast.compat.flow_grpo import sde_step_with_logprob
from lacfast.compat.tables import ScheduleCache, per_sample, require_known, with_unknown_row


class Built:
    """Something that a test can watch die."""


def test_a_value_is_built_once_per_contents_and_settings() -> None:
    cache: ScheduleCache[Built] = ScheduleCache()
    schedule = torch.linspace(1, 0, 5)
    first = cache.get(schedule, "sde", Built)
    assert cache.get(schedule, "sde", Built) is first
    assert cache.get(schedule, "cps", Built) is not first
    schedule[1] = 0.7
    assert cache.get(schedule, "sde", Built) is not first
    assert cache.get(torch.linspace(1, 0, 5), "sde", Built) is not first


def test_values_die_with_their_schedule() -> None:
    cache: ScheduleCache[Built] = ScheduleCache()
    schedule = torch.linspace(1, 0, 5)
    kept = weakref.ref(cache.get(schedule, "sde", Built))
    del schedule
    gc.collect()
    assert kept() is None


def test_an_unknown_step_turns_everything_into_nan() -> None:
    coefficients = with_unknown_row(torch.tensor([[0.9, -0.1, 0.2]]))
    sample, output, noise = torch.randn(3, 2, 4).unbind()
    steps = torch.tensor([0, 1])
    drawn = ops.gaussian_step(sample, output, coefficients, steps, noise=noise)
    judged = ops.step_log_prob(sample, output, noise, coefficients, steps)
    for result in (drawn.prev_sample.sum(1), drawn.log_prob, judged):
        assert result.isnan().tolist() == [False, True]


def test_an_unknown_step_on_the_host_raises() -> None:
    assert require_known(torch.tensor([0, 1]), 2, lambda: "no").tolist() == [0, 1]
    with pytest.raises(ValueError, match="no"):
        require_known(torch.tensor([0, 2]), 2, lambda: "no")


def test_one_step_serves_a_batch() -> None:
    assert per_sample(torch.tensor([4]), 3).tolist() == [4, 4, 4]
    with pytest.raises(ValueError, match="got 2 timesteps for 3 samples"):
        per_sample(torch.tensor([4, 5]), 3)


@pytest.mark.parametrize("peer", ["flow_grpo", "ddpo"])
def test_a_step_on_a_device_never_looks_at_a_value(peer: str) -> None:
    """Meta tensors raise at .item() and at a tensor in an if, which would wait for a GPU."""
    flow = FlowMatchEulerDiscreteScheduler()
    flow.set_timesteps(4)
    ddim = DDIMScheduler(clip_sample=False)
    ddim.set_timesteps(4)
    latents = torch.zeros(2, 4, 4, 4)

    def step(sample: Tensor) -> tuple[Tensor, ...]:
        if peer == "flow_grpo":
            return sde_step_with_logprob(flow, sample, flow.timesteps[:2].to(sample.device), sample)
        return ddim_step_with_logprob(ddim, sample, ddim.timesteps[1].to(sample.device), sample, eta=1.0)

    # The tables are made on the host, once per schedule.
    step(latents)
    assert {result.device.type for result in step(torch.empty_like(latents, device="meta"))} == {"meta"}
