"""The last program of a sample adds up its parts: whoever that is, with the same bits, again and again."""

from collections.abc import Callable

import pytest
import torch
from lacfast.kernels.gaussian_step import gaussian_step
from lacfast.kernels.ppo_loss import log_ratio
from lacfast.kernels.step_log_prob import step_log_prob
from torch import Tensor

from lacfast.kernels import gaussian_step as gaussian_step_module
from lacfast.ops.gaussian_step import GaussianStep, GaussianStepOutputs
from lacfast.ops.ppo_loss import LogRatioOutputs, PPOLoss
from lacfast.ops.step_log_prob import StepLogProb, StepLogProbOutputs

interpreter = pytest.importorskip("triton.runtime.interpreter", reason="Triton is not installed")

pytestmark = pytest.mark.interpreter

BATCH, SIZE = 3, 7001
"""Four programs of a sample, the last of them ragged."""
STEPS = torch.tensor([2, 0, 3])
Launch = Callable[[], Tensor]


@pytest.fixture
def tickets(monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """What a stream's tickets are: the same for every launch."""
    tickets = torch.zeros(BATCH, dtype=torch.int32)
    monkeypatch.setattr(gaussian_step_module, "tickets_for", lambda batch, device: tickets)
    return tickets


@pytest.fixture(params=["gaussian_step", "step_log_prob", "log_ratio"])
def launch(
    request: pytest.FixtureRequest, draw: Callable[..., Tensor], coefficients: Tensor, tickets: Tensor
) -> Launch:
    """One launch, which gives its sums; they are NaN before."""
    first, second, third = (draw(BATCH, SIZE) for _ in range(3))
    scale = 1 / SIZE

    def step() -> Tensor:
        outputs = GaussianStepOutputs(torch.empty_like(first), torch.full((BATCH,), torch.nan), None)
        gaussian_step(
            GaussianStep(first, second, None, None, coefficients, STEPS, third, None, None, scale), outputs
        )
        return outputs.log_prob

    def log_prob() -> Tensor:
        outputs = StepLogProbOutputs(torch.full((BATCH,), torch.nan))
        step_log_prob(StepLogProb(first, second, third, coefficients, STEPS, scale), outputs)
        return outputs.log_prob

    def ratio() -> Tensor:
        outputs = LogRatioOutputs(torch.full((BATCH, 3), torch.nan))
        log_ratio(
            PPOLoss(first, second, first + second, coefficients, STEPS, third, None, None, scale), outputs
        )
        return outputs.terms

    return {"gaussian_step": step, "step_log_prob": log_prob, "log_ratio": ratio}[request.param]


def test_the_tickets_are_free_again_after_a_launch(launch: Launch, tickets: Tensor) -> None:
    sums = launch()
    assert not tickets.any()
    assert torch.equal(launch(), sums)
    assert sums.isfinite().all()


@pytest.mark.parametrize("order", ["backwards", "samples in turn"])
def test_sums_do_not_depend_on_which_program_ends_last(
    launch: Launch, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sums = launch()
    builder, programs = interpreter.interpreter_builder, 4 * BATCH
    place = builder.set_grid_idx

    def elsewhere(x: int, y: int, z: int) -> None:
        turned = programs - 1 - x if order == "backwards" else x % BATCH * 4 + 3 - x // BATCH
        place(turned, y, z)

    monkeypatch.setattr(builder, "set_grid_idx", elsewhere)
    assert torch.equal(launch(), sums)


def test_tickets_that_are_shared_leave_a_sum_out(launch: Launch, tickets: Tensor) -> None:
    # What the owners of tickets rule out: another launch's program counts as one of this sample's.
    tickets[1] = 1
    sums = launch()
    assert tickets.tolist() == [0, 1, 0]
    assert sums[[0, 2]].isfinite().all()
