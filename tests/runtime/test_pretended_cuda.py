"""The pretended CUDA device notices what goes wrong on a GPU, and a graph on it is one of CUDA's."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from host_waits import WaitLog
from pretended_tensors import DeviceMismatchError
from torch import nn

from lacfast import ops
from lacfast.config import GraphConfig
from lacfast.records import NoiseKey
from lacfast.runtime.graph import GraphRunner, StaticStep
from lacfast.schedule import flow_sde, uniform_sigmas
from lacfast.transfer import to_device

ON = GraphConfig(mode="on", strict=True, warmup_steps=1)


def test_values_are_those_of_the_host(cuda: WaitLog) -> None:
    layer, twin = nn.Linear(5, 3), nn.Linear(5, 3)
    twin.load_state_dict(layer.state_dict())
    layer.cuda()
    inputs = torch.randn(4, 5)
    loss = layer(inputs.cuda()).square().mean()
    loss.backward()
    twin(inputs).square().mean().backward()
    assert loss.device == layer.weight.device == layer.weight.grad.device == torch.device("cuda", 0)
    assert torch.equal(layer.weight.grad.cpu(), twin.weight.grad)
    assert isinstance(layer.weight, nn.Parameter)


def test_gradients_of_rotations_and_of_half_a_split_are_those_of_the_host(cuda: WaitLog) -> None:
    """A complex product's gradient has a lazy conjugate, and a split's other half zeros from nowhere."""
    turns, start = torch.randn(4, 4, dtype=torch.complex64), torch.randn(4, 16)
    gradients = []
    for device in ("cpu", "cuda"):
        parameter = start.to(device).requires_grad_()
        used, _ = parameter.split(8, dim=1)
        rotated = torch.view_as_complex(used.unflatten(1, (4, 2))) * turns.to(device)
        loss = (torch.view_as_real(rotated)[..., 0] ** 2).sum()
        (gradient,) = torch.autograd.grad(loss, parameter)
        gradients.append(gradient.cpu())
    assert torch.equal(*gradients)


def test_tensors_of_both_devices_are_refused_and_numbers_are_not(cuda: WaitLog) -> None:
    there, here = torch.ones(3, device="cuda"), torch.ones(3)
    with pytest.raises(DeviceMismatchError, match=r"add.*test_tensors_of_both_devices"):
        there + here
    with pytest.raises(DeviceMismatchError):
        torch.cat([there, here])
    assert (there + torch.tensor(1.0)).is_cuda


def test_a_kernel_of_the_gpu_takes_no_tensor_of_the_host(cuda: WaitLog) -> None:
    table = flow_sde(uniform_sigmas(4), 0.7)
    sample, steps = torch.ones(2, 3, device="cuda"), torch.zeros(2, dtype=torch.int64, device="cuda")
    given = {"noise": NoiseKey.create(0, range(2), "cuda")}
    assert ops.gaussian_step(sample, sample, table.coefficients("cuda"), steps, **given).prev_sample.is_cuda
    with pytest.raises((DeviceMismatchError, ValueError), match=r"cpu|CPU"):
        ops.gaussian_step(sample, sample, table.coefficients(), steps, **given)


def test_waits_are_recorded_with_their_line(cuda: WaitLog) -> None:
    there = torch.arange(4, device="cuda")
    assert cuda.waits == []
    for wait in (
        lambda: there.sum().item(),
        lambda: bool(there[0] == 0),
        lambda: there.cpu(),
        lambda: there.tolist(),
        lambda: there[there > 1],
        lambda: there[[0, 1]],
        lambda: there.nonzero(),
        lambda: torch.tensor([1.0], device="cuda"),
        lambda: torch.ones(2).to("cuda"),
        lambda: torch.ones(2).pin_memory().to("cuda"),
        lambda: torch.ones(4, dtype=torch.int64).copy_(there),
        lambda: torch.equal(there, there),
        lambda: torch.cuda.synchronize(),
    ):
        cuda.clear()
        wait()
        assert len(cuda.waits) == 1, wait
        assert "test_waits_are_recorded" in cuda.waits[0].function
        assert cuda.waits[0].line > 50
    cuda.clear()
    pinned = torch.empty(4, dtype=torch.int64, pin_memory=True)
    pinned[1:].copy_(there[1:], non_blocking=True)
    to_device(torch.ones(3), "cuda", torch.float64)
    assert torch.zeros(3, device="cuda").masked_fill(torch.ones(3, device="cuda") > 0, 1.0).is_cuda
    assert cuda.waits == []
    with pytest.raises(TypeError, match="numpy"):
        there.numpy()


def test_a_wait_beyond_a_budget_is_named(cuda: WaitLog) -> None:
    there = torch.ones(3, device="cuda")
    for _ in range(2):
        there.sum().item()
    function = cuda.waits[0].function
    assert cuda.beyond({function: 2}) == []
    assert cuda.beyond({function: 1}) == cuda.beyond({}) == [str(wait) for wait in cuda.waits]


def test_waits_of_other_threads_stand_aside(cuda: WaitLog) -> None:
    there = torch.ones(3, device="cuda")
    thread = threading.Thread(target=lambda: torch.ones(3).to("cuda").add(there).sum().item())
    thread.start()
    thread.join()
    assert cuda.counts() == {}
    assert sum(cuda.counts(aside=True).values()) == 2


@pytest.mark.parametrize("wait", ["item", "copy", "mask"])
def test_a_capture_refuses_what_waits(cuda: WaitLog, wait: str) -> None:
    x = torch.ones(3, device="cuda")
    steps = {
        "item": lambda: x.add_(x.sum().item()),
        "copy": lambda: x.copy_(torch.ones(3)),
        "mask": lambda: x.add_(x[x > 0].sum()),
    }
    runner = GraphRunner(ON, "cuda")
    with pytest.raises(RuntimeError, match=r"not permitted when stream is capturing.*test_a_capture_refuses"):
        runner.run(StaticStep("a step", steps[wait], lambda: [x], dict), 3)


def test_a_graph_leaves_no_trace_and_replays_on_its_own_memory(cuda: WaitLog) -> None:
    x, k = torch.zeros(3, device="cuda"), torch.zeros(1, device="cuda")

    def run() -> None:
        made = torch.full((3,), 2.0, device="cuda")
        made += k
        x.add_(made)
        k.add_(1)

    runner = GraphRunner(ON, "cuda")
    runner.run(StaticStep("a walk", run, lambda: [x, k], dict), 5)
    assert (x.tolist(), k.tolist()) == ([20.0] * 3, [5.0])
    assert (runner.statistics.captures, runner.statistics.replays) == (1, 4)
    assert runner.statistics.graph_bytes > 0


def test_a_number_that_python_counts_is_frozen(cuda: WaitLog) -> None:
    x, count = torch.zeros(3, device="cuda"), [0]

    def run() -> None:
        count[0] += 1
        x.add_(count[0])

    with pytest.raises(RuntimeError, match="replays to other values"):
        GraphRunner(ON, "cuda").run(StaticStep("a count", run, lambda: [x], dict), 3)


def test_the_device_is_gone_afterwards(tmp_path: Path) -> None:
    assert not torch.cuda.is_available()
    from pretended_cuda import pretended_cuda

    with pretended_cuda():
        there = torch.ones(3, device="cuda")
        torch.save({"x": there}, tmp_path / "x.pt")
    assert not torch.cuda.is_available()
    assert torch.equal(torch.load(tmp_path / "x.pt")["x"], torch.ones(3))
    assert ops.available()["triton"] != "usable"
