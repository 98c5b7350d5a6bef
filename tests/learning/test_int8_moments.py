"""Moments in a byte: AdamW's first step, nearly its path, a quarter of its memory, a load without a trace."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from refusals import Refusal
from torch import Tensor, nn

from lacfast.config import PPOConfig
from lacfast.learning import int8_moments
from lacfast.learning.int8_moments import BLOCK, SMALLEST, CodeBook, Int8AdamW, moment_bytes
from lacfast.learning.optimizers import missing_moments, policy_optimizer, require_same_parameters

SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-15, "weight_decay": 1e-2}
CPU = torch.device("cpu")


def weights(*sizes: int) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(size, generator=generator)) for size in sizes]


def set_gradients(parameters: list[nn.Parameter], seed: int, *, noise: float = 1.0) -> None:
    """Of |w|^2 / 2 and noise, of magnitudes over six decades."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        spread = 10 ** torch.linspace(-6, 0, parameter.numel())
        drawn = noise * torch.randn(parameter.shape, generator=generator)
        parameter.grad = spread * (parameter.detach() + drawn)


@pytest.mark.parametrize("signed", [True, False])
def test_a_code_is_the_nearest_and_what_is_above_zero_stays_above(signed: bool) -> None:
    book = CodeBook.dynamic(signed=signed, device=CPU)
    assert len(book.values.unique()) == 256
    assert float(book.values.max()) == 1
    assert float(book.values.min()) == pytest.approx(-0.993 if signed else 0, abs=1e-3)
    blocks = torch.randn(3, BLOCK) * 10 ** torch.linspace(-9, 0, BLOCK)
    blocks = blocks if signed else blocks.abs()
    blocks[1] = 0
    codes, scales = book.encode(blocks, keeps_positive=not signed)
    found = book.decode(codes, scales)
    nearest = (blocks[..., None] - book.values * scales[..., None]).abs().amin(dim=-1)
    is_kept = (found - blocks).abs() <= nearest * (1 + 1e-5) + 1e-30
    assert (is_kept | ((blocks > 0) & (not signed))).all()
    assert (found[1] == 0).all()
    if not signed:
        assert ((found > 0) == (blocks > 0)).all()


def test_the_first_step_is_adamw_s_and_many_steps_go_nearly_its_way() -> None:
    sizes = (SMALLEST + 100, 40)
    coded, plain = weights(*sizes), weights(*sizes)
    optimizers = Int8AdamW(coded, **SETTINGS), torch.optim.AdamW(plain, **SETTINGS)
    for step in range(60):
        for parameters, optimizer in zip((coded, plain), optimizers, strict=True):
            set_gradients(parameters, step)
            optimizer.step()
        if step == 0:
            for pair in zip(coded, plain, strict=True):
                torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-6)
    large, small = (
        (a - b).norm() / (b - start).norm() for a, b, start in zip(coded, plain, weights(*sizes), strict=True)
    )
    assert float(large) < 0.1
    assert float(small) < 1e-4


def test_a_moment_takes_a_byte_and_its_share_of_a_scale() -> None:
    parameters = weights(SMALLEST, SMALLEST + 1, 40)
    optimizer = policy_optimizer(parameters, PPOConfig(moments="int8"))
    expected = [2 * (SMALLEST + 4 * 16), 2 * (SMALLEST + 1 + 4 * 17), 2 * 4 * 40]
    assert [moment_bytes(parameter) for parameter in parameters] == expected
    assert missing_moments(optimizer) == sum(expected)
    set_gradients(parameters, 0)
    optimizer.step()
    assert missing_moments(optimizer) == 0
    held = [
        sum(tensor.nbytes for name, tensor in optimizer.state[parameter].items() if name != "step")
        for parameter in parameters
    ]
    assert held == expected


def test_a_bad_gradient_changes_nothing() -> None:
    parameters = weights(SMALLEST, 40)
    optimizer = Int8AdamW(parameters, **SETTINGS)
    set_gradients(parameters, 0)
    optimizer.step()
    before = copy.deepcopy(
        [*(parameter.detach() for parameter in parameters), optimizer.state_dict()["state"]]
    )
    set_gradients(parameters, 1, noise=float("nan"))
    optimizer.found_inf = torch.ones(())  # type: ignore[attr-defined]
    optimizer.step()
    after = [*(parameter.detach() for parameter in parameters), optimizer.state_dict()["state"]]
    assert _equal(before, after)
    optimizer.found_inf = torch.zeros(())  # type: ignore[attr-defined]
    set_gradients(parameters, 1)
    optimizer.step()
    assert not _equal(before[0], parameters[0].detach())


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(_equal(left[key], right[key]) for key in left)
    return all(_equal(*pair) for pair in zip(left, right, strict=True))


def test_a_loaded_state_goes_on_bit_for_bit_and_size_at_once_changes_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runs = []
    for is_loaded, at_once in (
        (False, int8_moments.AT_ONCE),
        (True, int8_moments.AT_ONCE),
        (False, 4 * BLOCK),
    ):
        monkeypatch.setattr(int8_moments, "AT_ONCE", at_once)
        parameters = weights(SMALLEST + 300, 40)
        optimizer = Int8AdamW(parameters, **SETTINGS)
        for step in range(3):
            set_gradients(parameters, step)
            optimizer.step()
            if is_loaded:
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = Int8AdamW(parameters, **SETTINGS)
                optimizer.load_state_dict(state)
        runs.append([*(parameter.detach() for parameter in parameters), optimizer.state_dict()["state"]])
    assert _equal(runs[0], runs[1])
    assert _equal(runs[0], runs[2])


def test_moments_of_the_other_kind_are_refused() -> None:
    parameters = weights(SMALLEST)
    set_gradients(parameters, 0)
    kept = policy_optimizer(parameters, PPOConfig(moments="float32"))
    kept.step()
    with Refusal(
        "moments 0 is (4096,) of float32 there and (4096,) of uint8 here",
        cause="A checkpoint with moments in float32 is loaded where they are kept in a byte, or the reverse.",
        remedy="build model and critic with the configuration of the checkpoint",
    ).raised():
        require_same_parameters(
            policy_optimizer(parameters, PPOConfig(moments="int8")), kept.state_dict(), "policy"
        )
