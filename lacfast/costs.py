"""What one training iteration costs, counted and not timed: FLOPs and bytes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from lacfast.config import TrainConfig
from lacfast.critic import Critic
from lacfast.protocols import Backbone, Features
from lacfast.records import Conditioning, TransitionTable
from lacfast.sampler import policy_output

ADAM_BYTES = 8
"""Two float32 moments per trained weight."""


@dataclass(frozen=True)
class Costs:
    """Of one iteration; FLOPs count a multiply-add as two, bytes are those that live at the same time."""

    parameters: int
    """Of the model, adapters included."""
    trained_parameters: int
    """Of the policy."""
    critic_parameters: int
    """Trained for the critic besides."""
    images: int
    """Generated and scored."""
    sampling_forwards: int
    """Samples through the model while sampling, both halves of guidance."""
    update_pairs: int
    """(sample, step) pairs that the policy is trained on."""
    sampling_flops: int
    update_flops: int
    critic_flops: int
    weight_bytes: int
    """Model and critic."""
    training_bytes: int
    """Gradients, moments and the average of trained weights."""
    rollout_bytes: int
    """Latents, outputs and what the critic reads, for all steps."""
    activation_bytes: int
    """Kept by the forward of the smallest possible microbatch, one pair."""

    @property
    def flops(self) -> int:
        return self.sampling_flops + self.update_flops + self.critic_flops


def count(
    backbone: Backbone,
    critic: Critic | None,
    table: TransitionTable,
    conditioning: Conditioning,
    config: TrainConfig,
) -> Costs:
    """Count an iteration of `config` by running one sample through the model.

    Args:
        backbone: best on the meta device, where a forward costs nothing; see backbones.blueprint.
        critic: of the backbone.
        table: the sampler.
        conditioning: (1, ...) of a prompt.
        config: what would be trained.
    """
    is_guided = config.sampler.guidance_scale > 1
    ppo, batch, steps = config.ppo, config.batch_size, table.num_steps
    device = next(backbone.model.parameters()).device
    sample = torch.zeros(1, *backbone.latent_shape, device=device)
    timestep = torch.full((1,), float(table.timesteps[0]), device=device)
    features: Features = {}

    def forward() -> Tensor:
        nonlocal features
        result = policy_output(
            backbone,
            sample,
            timestep,
            conditioning,
            conditioning if is_guided else None,
            cfg_grad=ppo.cfg_grad,
            critic=critic,
        )
        features = result.features
        return result.output if result.uncond_output is None else result.output + result.uncond_output

    with torch.no_grad():
        step_flops = _flops(forward)
        value_flops = (
            0 if critic is None else _flops(lambda: critic(features, sample, timestep, conditioning))
        )
    if config.gradient_checkpointing:
        backbone.enable_gradient_checkpointing()
    pair_flops = _flops(lambda: forward().sum().backward())  # type: ignore[no-untyped-call]
    activation_bytes = _saved_bytes(forward, backbone.model)
    reference_flops = step_flops if ppo.kl_weight > 0 else 0
    state_flops = 0
    if critic is not None:
        state_flops = _flops(lambda: critic(features, sample, timestep, conditioning).sum().backward())
    pairs = math.ceil(ppo.timestep_fraction * len(table.trainable_steps) * batch) * ppo.num_inner_epochs
    trained = sum(parameter.numel() for parameter in backbone.policy_parameters())
    learned = 0 if critic is None else _count(critic)
    kept = [*features.values(), sample, sample]
    return Costs(
        parameters=_count(backbone.model),
        trained_parameters=trained,
        critic_parameters=learned,
        images=batch,
        sampling_forwards=batch * steps * (2 if is_guided else 1),
        update_pairs=pairs,
        sampling_flops=batch * steps * (step_flops + value_flops),
        update_flops=pairs * (pair_flops + reference_flops),
        critic_flops=batch * steps * ppo.num_inner_epochs * state_flops,
        weight_bytes=_bytes(backbone.model) + (0 if critic is None else _bytes(critic)),
        training_bytes=(trained + learned) * (4 + ADAM_BYTES) + (4 * trained if config.ema_decay else 0),
        rollout_bytes=batch * steps * sum(tensor.numel() * tensor.element_size() for tensor in kept),
        activation_bytes=activation_bytes,
    )


class _AttentionOutput(torch.autograd.Function):
    """Keeps what fused attention keeps for its backward pass. The values do not matter."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_zeros((*query.shape[:-1], value.shape[-1]))
        ctx.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError("only the bytes that it keeps are counted")


class _FusedAttention(TorchFunctionMode):
    """Attention without its (L, L) weights, which torch's meta device would keep and a GPU does not."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **named)
        given = dict(zip(("query", "key", "value"), args, strict=False)) | named
        return _AttentionOutput.apply(  # type: ignore[no-untyped-call]
            given["query"], given["key"], given["value"]
        )


def _flops(body: Callable[[], Any]) -> int:
    # The counter does not know every device's fused attention; written out, it has the same FLOPs.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        body()
    return int(counter.get_total_flops())


def _saved_bytes(body: Callable[[], Any], model: nn.Module) -> int:
    """Bytes that autograd keeps for the backward pass, each tensor once, the weights not counted."""
    seen: dict[int, Tensor] = {id(parameter): parameter for parameter in model.parameters()}
    total = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        base = tensor._base if tensor._base is not None else tensor
        if id(base) not in seen:
            seen[id(base)] = base
            total += base.numel() * base.element_size()
        return tensor

    with _FusedAttention(), saved_tensors_hooks(pack, lambda tensor: tensor):
        body()
    return total


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _bytes(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
