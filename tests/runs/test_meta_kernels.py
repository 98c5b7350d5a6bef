"""An operation on the meta device gives the second time what torch gave the first time."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lacfast.runs import meta_kernels
from lacfast.runs.meta_kernels import on_meta

ASKED: list[str] = []
"""The operations that torch was asked for."""


@cache
def heard(func: Any) -> Any:
    """The operation, which notes that it is asked for."""

    def asked(*args: Any, **named: Any) -> Any:
        ASKED.append(str(func))
        return func(*args, **named)

    asked._schema, asked.tags = func._schema, func.tags  # type: ignore[attr-defined]
    return asked


class Answered(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Operations as a plan has them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return on_meta(heard(func), args, kwargs or {})


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def layouts(output: Any) -> list[Any]:
    tensors = output if isinstance(output, tuple) else (output,)
    return [
        each if each is None else (each.shape, each.stride(), each.dtype, each.untyped_storage().nbytes())
        for each in tensors
    ]


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meta_kernels, "_ANSWERS", {})
    ASKED.clear()


MADE: dict[str, Callable[[], Any]] = {
    "promoted": lambda: meta(2, 3, dtype=torch.bfloat16) + meta(3),
    "transposed": lambda: meta(2, 3).t() * 2.0,
    "channels last": lambda: meta(1, 2, 3, 4).to(memory_format=torch.channels_last).exp(),
    "several": lambda: torch.native_layer_norm(meta(2, 3), [3], meta(3), None, 1e-5),
    "not asked for": lambda: torch.ops.aten.native_layer_norm_backward(
        *(meta(2, 3), meta(2, 3), [3], meta(2, 1), meta(2, 1), meta(3), meta(3), [True, False, True])
    ),
    "of a list": lambda: torch.cat([meta(1, 3), meta(4, 3)]),
    "of a list of other shapes": lambda: torch.cat([meta(2, 3), meta(2, 3)]),
    "of other sizes": lambda: meta(2, 3).sum(dim=1, keepdim=True),
    "written to": lambda: meta(2, 3).add_(meta(3)),
    "written into": lambda: torch.addmm(meta(4), meta(2, 3), meta(3, 4), out=meta(2, 4)),
}


@pytest.mark.parametrize("name", MADE)
def test_what_was_given_is_given_again_and_torch_is_not_asked(name: str) -> None:
    expected = layouts(MADE[name]())
    for times in range(3):
        ASKED.clear()
        with Answered():
            assert layouts(MADE[name]()) == expected
        kernels = [func for func in ASKED if not func.startswith(("aten.empty", "aten.t."))]
        assert bool(kernels) == (times == 0)


def test_an_int_and_a_float_that_are_equal_give_their_own_dtypes() -> None:
    with Answered():
        found = [(meta(2, dtype=torch.long) * factor).dtype for factor in (1, 1.0, True, 1.0, 1)]
    assert found == [torch.long, torch.float32, torch.long, torch.float32, torch.long]


def test_tensors_of_one_shape_and_other_strides_keep_theirs() -> None:
    for _ in range(2):
        with Answered():
            assert meta(2, 2).exp().stride() == (2, 1)
            assert meta(2, 2).t().exp().stride() == (1, 2)


def test_what_is_written_to_is_given_back_itself() -> None:
    for _ in range(2):
        written, into = meta(2, 3), meta(2, 4)
        version = written._version
        with Answered():
            assert written.mul_(2) is written
            assert torch.addmm(meta(4), meta(2, 3), meta(3, 4), out=into) is into
        assert written._version > version


@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")
def test_torch_is_asked_again_for_what_changes_a_layout_or_shares_memory() -> None:
    for _ in range(2):
        ASKED.clear()
        with Answered():
            small, tensor = meta(0), meta(2, 3)
            torch.mul(tensor, 2, out=small)
            tensor.t_()
            view = tensor[0]
        assert small.shape == (2, 3)
        assert tensor.shape == (3, 2)
        assert view.untyped_storage() is tensor.untyped_storage()
        assert {"aten.mul.out", "aten.t_.default"} <= set(ASKED)


def test_values_of_the_host_are_computed() -> None:
    with Answered():
        assert [float(torch.ones(3).sum() + number) for number in (1, 1, 2)] == [4, 4, 5]
