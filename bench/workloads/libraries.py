"""Other projects' functions beside our ops, where they are installed: what their users really run.

torchrl has `gae`, in two forms. Of `value_pool` Liger and quack have the norm, for a GPU; a head writes the
attention behind it in torch. Of our other ops neither has one: their losses of a policy take logits over a
vocabulary.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import peers
from bench.workloads.workload import Call, Inputs

TORCHRL_LOOP, TORCHRL_VECTORIZED = "torchrl, loop", "torchrl, vectorised"
LIGER, QUACK = "Liger's norm, torch's attention", "quack's norm, torch's attention"


class Borrowed(NamedTuple):
    """What of another project can be called here."""

    calls: dict[str, Call]
    absent: dict[str, str]
    """Provider -> why it cannot be called."""


def gae(gamma: float, gae_lambda: float) -> Borrowed:
    """Both of torchrl's forms on rewards (B, T, M), values, and what `gae_inputs` adds to them."""
    module, reason = _imported("torchrl.objectives.value.functional", "torchrl")
    names = (TORCHRL_LOOP, TORCHRL_VECTORIZED)
    if module is None:
        return Borrowed({}, dict.fromkeys(names, reason))
    functions = (module.generalized_advantage_estimate, module.vec_generalized_advantage_estimate)

    def call(function: Callable[..., tuple[Tensor, Tensor]], given: Inputs) -> tuple[Tensor, ...]:
        states = (given["values"], given["next_values"], given["rewards"], given["done"])
        return function(gamma, gae_lambda, *states)

    return Borrowed({n: partial(call, f) for n, f in zip(names, functions, strict=True)}, {})


def gae_inputs(values: Tensor) -> Inputs:
    """The next state's values (B, T, M), and which step is a trajectory's last, as torchrl takes them."""
    done = torch.zeros(values.shape, dtype=torch.bool, device=values.device)
    done[:, -1] = True
    return {"next_values": torch.nn.functional.pad(values[:, 1:], (0, 0, 0, 1)), "done": done}


def value_pool(device: torch.device) -> Borrowed:
    """The head with Liger's and with quack's norm; nothing on a CPU, for which they have none."""
    calls: dict[str, Call] = {}
    absent: dict[str, str] = {}
    if device.type != "cuda":
        return Borrowed(calls, absent)
    liger, reason = _imported("liger_kernel.transformers.functional", "liger-kernel")
    if liger is None:
        absent[LIGER] = reason
    else:
        calls[LIGER] = _pooled(liger.liger_rms_norm)
    quack, reason = _imported("quack", "quack-kernels")
    if quack is None:
        absent[QUACK] = reason
    else:
        # It takes rows, of whatever was their shape.
        calls[QUACK] = _pooled(
            lambda x, weight, eps: quack.rmsnorm(x.flatten(0, 1), weight=weight, eps=eps).view_as(x)
        )
    return Borrowed(calls, absent)


def _pooled(norm: Callable[[Tensor, Tensor, float], Tensor]) -> Call:
    names = ("features", "query", "norm_weight")
    return lambda given: (peers.attention_pool(*(given[name] for name in names), norm=norm),)


def _imported(module: str, package: str) -> tuple[Any, str]:
    """A module, or None and why it is not there."""
    try:
        return importlib.import_module(module), ""
    except ModuleNotFoundError as error:
        if error.name is not None and module.startswith(error.name):
            return None, f"not installed: pip install {package}"
        return None, f"{package} cannot be imported: {error}"
    except Exception as error:
        # quack looks for a GPU's compiler when it is imported; why it fails is its row.
        return None, f"{package} cannot be imported: {type(error).__name__}: {error}".splitlines()[0]
