"""The optimizers of actor and critic, their learning rates, and the states that they can take over."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lacfast.config import PPOConfig
from lacfast.critic.critic import Critic
from lacfast.distributed.shard_files import divided_as
from lacfast.distributed.sharding import own_part
from lacfast.learning.int8_moments import Int8AdamW, is_quantized
from lacfast.learning.int8_moments import moment_bytes as int8_moment_bytes


def policy_optimizer(parameters: Iterable[nn.Parameter], config: PPOConfig) -> Optimizer:
    """AdamW over the actor's trained weights, see Backbone.policy_parameters."""
    return _adamw(
        parameters,
        config,
        lr=config.policy_learning_rate,
        betas=config.betas,
        eps=config.adam_eps,
        weight_decay=config.weight_decay,
    )


def _adamw(parameters: Iterable[Any], config: PPOConfig, **settings: Any) -> Optimizer:
    """AdamW with moments of `config`; either kind reads on the device whether a step is off."""
    if config.moments == "int8":
        return Int8AdamW(parameters, **settings)
    return torch.optim.AdamW(parameters, **settings, fused=True)


def policy_schedule(
    optimizer: Optimizer, config: PPOConfig, progress: Callable[[], float], halved: Callable[[], float]
) -> LambdaLR:
    """The policy's rate: a linear rise over warmup_steps times a linear fall to final_learning_rate.

    Args:
        optimizer: at policy_learning_rate.
        config: of the run.
        progress: share of the run that is behind, from 0 to 1; asked after every optimizer step.
        halved: factor besides, see GradientGuard.
    """

    def factor(step: int) -> float:
        fallen = _fallen(config.policy_learning_rate, config.final_learning_rate, progress())
        return min((step + 1) / (config.warmup_steps + 1), 1.0) * fallen * halved()

    return LambdaLR(optimizer, factor)


def critic_rate_factor(config: PPOConfig, progress: float) -> float:
    """What is left of the critic's rates after a share `progress` of the run."""
    return _fallen(config.value_learning_rate, config.final_value_learning_rate, progress)


def _fallen(first: float, final: float | None, progress: float) -> float:
    """Share of the rate `first` that is left on its linear way to `final`; None: all of it."""
    return 1.0 if final is None else 1 - (1 - final / first) * progress


def refresh(schedule: LambdaLR) -> None:
    """Set the rate by today's progress, which the step before could not know."""
    factors = (factor(schedule.last_epoch) for factor in schedule.lr_lambdas)
    rates = [float(base) * factor for base, factor in zip(schedule.base_lrs, factors, strict=True)]
    set_rates(schedule.optimizer, rates)


def set_rates(optimizer: Optimizer, rates: Sequence[float]) -> None:
    """Set the rate of every group."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        # A graph reads it where it is.
        group["lr"] = group["lr"].fill_(rate) if isinstance(group["lr"], Tensor) else rate


def take_back(schedule: LambdaLR, steps: int) -> None:
    """Set a schedule back by optimizer steps that were turned off."""
    schedule.last_epoch -= steps
    refresh(schedule)


def critic_optimizer(critic: Critic, config: PPOConfig) -> Optimizer:
    """AdamW over the critic's head and own trunk, each at its rate."""
    groups = [
        {"params": list(critic.head.parameters()), "lr": config.value_learning_rate},
        {"params": list(critic.trunk.parameters()), "lr": config.trunk_learning_rate},
    ]
    groups = [group for group in groups if group["params"]]
    return _adamw(groups, config, betas=config.betas, weight_decay=config.weight_decay)


def parameters_of(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def moments_of(optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of the moments and step counts that exist."""
    for number, parameter in enumerate(parameters_of(optimizer)):
        for name, tensor in optimizer.state.get(parameter, {}).items():
            yield f"{name} of the optimizer's parameter {number}", tensor


def rates_of(optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of the rates that a graph reads, see make_capturable."""
    for number, group in enumerate(optimizer.param_groups):
        if isinstance(group["lr"], Tensor):
            yield f"the rate of the optimizer's group {number}", group["lr"]


def make_capturable(optimizer: Optimizer) -> None:
    """Let a graph hold the optimizer's step: rates become tensors, which a schedule fills in place."""
    for group in optimizer.param_groups:
        rate, device = group["lr"], group["params"][0].device
        if not isinstance(rate, Tensor):
            group["lr"] = torch.full((), rate, dtype=torch.float32, device=device)
        group["capturable"] = device.type == "cuda"


def load_moments(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Take over moments and step counts of a state_dict; rates, betas and decay stay this run's own.

    Moments may be whole or sharded in it, and are divided as the parameters are here.
    """
    parameters = parameters_of(optimizer)
    saved = {
        f"{number} {name}": value
        for number, entries in state["state"].items()
        for name, value in entries.items()
        if value.shape == parameters[number].shape
    }
    placed = divided_as(saved, {name: parameters[int(name.partition(" ")[0])] for name in saved})
    moments = {
        number: {name: placed.get(f"{number} {name}", value) for name, value in entries.items()}
        for number, entries in state["state"].items()
    }
    groups = [
        group | {"params": saved["params"]}
        for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True)
    ]
    optimizer.load_state_dict({"state": moments, "param_groups": groups})


def require_same_parameters(optimizer: Optimizer, state: dict[str, Any], what: str) -> None:
    """
    Raises:
        ValueError: when a state_dict is of an optimizer of other parameters.
    """
    own: dict[str, Any] = {}
    saved: dict[str, Any] = {}
    for found, groups in ((own, optimizer.param_groups), (saved, state["param_groups"])):
        found |= {f"group {number}": len(group["params"]) for number, group in enumerate(groups)}
    for number, parameter in enumerate(parameters_of(optimizer)):
        moments = state["state"].get(number)
        if moments is not None:
            own[f"moments {number}"] = _described(parameter.shape, _moments_dtype(optimizer, parameter))
            saved[f"moments {number}"] = _described(moments["exp_avg"].shape, moments["exp_avg"].dtype)
    for name in {**own, **saved}:
        if own.get(name) != saved.get(name):
            raise ValueError(
                f"the optimizer of the {what} does not fit: {name} is {saved.get(name)} there and "
                f"{own.get(name)} here; build model and critic with the configuration of the checkpoint"
            )


def _described(shape: torch.Size, dtype: torch.dtype) -> str:
    return f"{tuple(shape)} of {str(dtype).removeprefix('torch.')}"


def _moments_dtype(optimizer: Optimizer, parameter: nn.Parameter) -> torch.dtype:
    is_coded = isinstance(optimizer, Int8AdamW) and is_quantized(parameter)
    return torch.uint8 if is_coded else parameter.dtype


def moment_bytes(parameters: Iterable[nn.Parameter], moments: str) -> int:
    """Bytes of both moments of a rank's own parts; `moments` as PPOConfig.moments."""
    of = int8_moment_bytes if moments == "int8" else _float_moment_bytes
    return sum(of(parameter) for parameter in parameters)


def _float_moment_bytes(parameter: nn.Parameter) -> int:
    return 2 * own_part(parameter).nbytes


def missing_moments(optimizer: Optimizer) -> int:
    """Bytes that the optimizer's first step will allocate."""
    missing = [parameter for parameter in parameters_of(optimizer) if parameter not in optimizer.state]
    return moment_bytes(missing, "int8" if isinstance(optimizer, Int8AdamW) else "float32")
