"""ppo_loss on a CPU makes its gradient with the loss: the bits that a backward pass makes."""

from __future__ import annotations

import importlib
import multiprocessing
import resource
import sys
from pathlib import Path

import pytest
import torch
from tolerances import STORAGE_DTYPES
from torch import Tensor

from lacfast import ops
from lacfast.records import NoiseKey

OP = importlib.import_module("lacfast.ops.op")
TABLE = torch.tensor([[0.9, -0.2, 0.3], [1.0, -0.1, 0.0], [0.8, -0.3, 0.02]])


@pytest.fixture
def kernels_called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that ops call, in turn."""
    names: list[str] = []

    def launch(chosen: str, name: str, *rest: object) -> None:
        names.append(name)
        original(chosen, name, *rest)

    original = OP.launch
    monkeypatch.setattr(OP, "launch", launch)
    return names


def _arguments(batch: int, elements: int, dtype: torch.dtype, *, drawn: bool) -> dict[str, object]:
    generator = torch.Generator().manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    old, shift, far, noise = (torch.randn(batch, elements, generator=generator) for _ in range(4))
    return {
        "model_output": (old + 0.05 * shift).to(dtype).requires_grad_(),
        "old_model_output": old.to(dtype),
        "anchor_output": (old + 0.05 * far).to(dtype),
        "advantages": torch.linspace(-1.5, 1, batch, dtype=wide),
        "coefficients": TABLE.to(wide),
        "steps": torch.arange(batch) % 3,
        "noise": NoiseKey.create(3, range(batch)) if drawn else noise,
        "mask": torch.arange(batch) != 2,
        "kl_weight": 0.3,
        "clip_range": 0.1,
    }


def test_a_transform_of_torch_func_is_refused() -> None:
    given = _arguments(3, 8, torch.float32, drawn=False)
    output = given.pop("model_output").detach()  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match=r"autograd\.Function with functorch transforms"):
        torch.func.grad(lambda output: ops.ppo_loss(output, **given)[0])(output)


def _loss_and_gradients(arguments: dict[str, object], outer: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, then its gradient twice: as the forward pass may have made it, and as a backward pass does."""
    loss, _ = ops.ppo_loss(**arguments)
    output, outer = arguments["model_output"], outer.to(loss.dtype)
    first, second = (torch.autograd.grad(loss, output, outer, retain_graph=True)[0] for _ in range(2))
    return loss.detach(), first, second


@pytest.mark.parametrize("drawn", [False, True], ids=["given", "drawn"])
@pytest.mark.parametrize("dtype", STORAGE_DTYPES, ids=str)
def test_it_is_the_gradient_of_a_backward_pass(dtype, drawn, kernels_called, poisoned_memory, monkeypatch):
    # What the last backward pass of this process was given is another test's.
    monkeypatch.setattr(importlib.import_module("lacfast.ops.ppo_loss").PPO_LOSS, "_expected", 1.0)
    arguments = _arguments(5, 17_001, dtype, drawn=drawn)
    for outer in (torch.tensor(0.3), torch.tensor(0.3), torch.tensor(1.0), torch.tensor(1.0)):
        _, first, second = _loss_and_gradients(arguments, outer)
        assert torch.equal(first, second)
        assert first.data_ptr() != second.data_ptr()
    both, after = "ppo_loss_and_gradient", "ppo_loss_backward"
    # Made anew where the loss's gradient is not the last one's, and for a second backward pass always.
    assert kernels_called == [both, after, after, both, after, both, after, after, both, after]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("threads", [2, 3], ids=["rows", "runs"])
def test_a_latent_shared_by_threads_gives_the_same_bits(threads, dtype):
    arguments = _arguments(4, 300_000, dtype, drawn=True)
    alone = _loss_and_gradients(arguments, torch.ones(()))
    torch.set_num_threads(threads)
    try:
        together = _loss_and_gradients(arguments, torch.ones(()))
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


def test_an_input_changed_in_between_is_noticed():
    arguments = _arguments(3, 40, torch.float32, drawn=True)
    loss, _ = ops.ppo_loss(**arguments)
    arguments["old_model_output"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, arguments["model_output"])


def _lacks_memory() -> None:
    """Of a process: room for the gradient and a thread's stack, none for the noise that two threads keep."""
    # More than a process has free in its heap; no page of it is touched.
    rows, elements = 2, 64_000_000
    latents = [torch.empty(rows, elements, dtype=torch.bfloat16) for _ in range(2)]
    arguments = _arguments(rows, 1, torch.bfloat16, drawn=True) | {"anchor_output": None, "kl_weight": 0.0}
    arguments |= {"model_output": latents[0].requires_grad_(), "old_model_output": latents[1]}
    torch.set_num_threads(2)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    room = latents[0].nbytes + 24 * 2**20
    assert room < latents[0].nbytes + 4 * elements
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + room,) * 2)
    with pytest.raises(MemoryError):
        ops.ppo_loss(**arguments)


@pytest.mark.skipif(sys.platform != "linux", reason="lets a process have no more memory, as Linux counts it")
def test_memory_that_a_thread_lacks_is_the_callers_error():
    process = multiprocessing.get_context("fork").Process(target=_lacks_memory)
    process.start()
    process.join()
    assert process.exitcode == 0
