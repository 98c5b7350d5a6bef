"""What one training iteration costs, counted and not timed; and what follows memory."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from lacfast.backbone import Backbone
from lacfast.config import TrainConfig
from lacfast.critic.critic import Critic
from lacfast.critic.trunk import Features
from lacfast.policy import policy_output
from lacfast.records import Conditioning, TransitionTable
from lacfast.runs.meta_kernels import on_meta


@dataclass(frozen=True)
class Costs:
    """Costs of one iteration; a multiply-add is two FLOPs."""

    parameters: int
    """Weights of the model, adapters included."""
    trained_parameters: int
    """Weights of the policy that are trained."""
    critic_parameters: int
    """Weights that are trained for the critic besides."""
    images: int
    """Generated and scored."""
    sampling_forwards: int
    """Samples through the model while sampling, both halves of guidance, and noised anew."""
    update_pairs: int
    """(sample, step) pairs that the policy is trained on."""
    sampling_flops: int
    """The policy's forwards."""
    value_flops: int
    """The critic's values of the sampled states."""
    decode_flops: int
    anchor_flops: int
    """The anchor's forwards for the KL; 0 without one."""
    update_forward_flops: int
    update_backward_flops: int
    critic_flops: int
    """The critic's own update."""

    @property
    def rollout_flops(self) -> int:
        """Trajectories, their values and their images."""
        return self.sampling_flops + self.value_flops + self.decode_flops

    @property
    def update_flops(self) -> int:
        """FLOPs of the policy's update, the anchor's forward included."""
        return self.anchor_flops + self.update_forward_flops + self.update_backward_flops

    @property
    def flops(self) -> int:
        return self.rollout_flops + self.update_flops + self.critic_flops


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
        step_flops = counted(forward).flops
        value_flops = (
            0 if critic is None else counted(lambda: critic(features, sample, timestep, conditioning)).flops
        )
        decode_flops = counted(lambda: backbone.decode(sample)).flops
    if config.gradient_checkpointing:
        backbone.enable_gradient_checkpointing()
    pair_flops = counted(lambda: _differentiated(forward())).flops
    uncond_flops = 0
    if is_guided and ppo.cfg_grad == "cond":
        uncond_flops = counted(lambda: _unconditional(backbone, sample, timestep, conditioning)).flops
    state_flops = 0
    if critic is not None:
        state_flops = counted(lambda: _differentiated(critic(features, sample, timestep, conditioning))).flops
    forward_steps = config.objective.forward_steps(steps)
    chosen = table.trainable_steps if forward_steps is None else forward_steps
    pairs = math.ceil(ppo.timestep_fraction * len(chosen) * batch) * ppo.num_inner_epochs
    held = 0
    if ppo.hold is not None:
        free = steps - len(table.trainable_steps)
        held = math.ceil(ppo.hold.share * free * batch) * ppo.num_inner_epochs
    # The first optimizer step knows its unconditional half, but for a handful of pairs that measure it.
    known = pairs // (ppo.num_minibatches * ppo.num_inner_epochs) if forward_steps is None else 0
    # The old policy runs on the states noised anew that are trained, with a critic on all.
    renoised = 0
    if forward_steps is not None:
        trained_states = batch * len(forward_steps) if ppo.repeats else pairs
        renoised = trained_states if critic is None else batch * steps
    trained = sum(parameter.numel() for parameter in backbone.policy_parameters())
    learned = 0 if critic is None else _count(critic)
    return Costs(
        parameters=_count(backbone.model),
        trained_parameters=trained,
        critic_parameters=learned,
        images=batch,
        sampling_forwards=(batch * steps + renoised) * (2 if is_guided else 1),
        update_pairs=pairs,
        sampling_flops=(batch * steps + renoised) * step_flops,
        value_flops=batch * steps * value_flops,
        decode_flops=batch * decode_flops,
        anchor_flops=(pairs * (ppo.kl is not None) + held) * step_flops,
        update_forward_flops=(pairs + held) * step_flops - known * uncond_flops,
        # What checkpointing recomputes is counted with the backward pass, where it runs.
        update_backward_flops=(pairs + held) * (pair_flops - step_flops),
        critic_flops=batch * steps * ppo.num_inner_epochs * state_flops,
    )


@torch.no_grad()
def _unconditional(
    backbone: Backbone, sample: Tensor, timestep: Tensor, conditioning: Conditioning
) -> Tensor:
    return backbone.predict(sample, timestep, conditioning)


def _differentiated(output: Tensor) -> None:
    output.sum().backward()  # type: ignore[no-untyped-call]


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


_ATEN = torch.ops.aten


_UNCOUNTED = {
    # Asked by wrappers of tensors; it reads an attribute.
    torch.ops.prim.device.default,
    _ATEN.empty.memory_format,
    _ATEN.empty_like.default,
    _ATEN.empty_strided.default,
    _ATEN.new_empty.default,
    _ATEN.new_empty_strided.default,
}
"""Allocations, which a static buffer or the caching allocator answers."""


class OperationCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what is dispatched, and the host's waits for a value of a device that is not the CPU.

    On the meta device a wait has no value to return: it gets 1 (a number) or zeros (a copy).
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations = 0
        """All that is dispatched but allocations; views too, since the host pays for them."""
        self.kernels = 0
        """Operations that are no views."""
        self.syncs = 0
        self.flops = 0
        """A multiply-add counts as two, element-wise work not at all."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if func in _UNCOUNTED:
            return func(*args, **named)
        self.operations += 1
        self.kernels += not (func.is_view or func is _ATEN._unsafe_view.default)
        if _is_awaited(func, args, named):
            self.syncs += 1
            if args[0].is_meta:
                return _stand_in(func, args[0], named)
        output = on_meta(func, args, named)
        packet = func._overloadpacket
        if packet in _LACFAST_FLOPS:
            self.flops += _LACFAST_FLOPS[packet](*args)
        elif packet in flop_registry:
            self.flops += int(flop_registry[packet](*args, **named, out_val=output))
        return output


def _is_awaited(func: Any, args: tuple[Any, ...], named: dict[str, Any]) -> bool:
    """Whether the host waits here for the device."""
    if func is _ATEN._local_scalar_dense.default:
        return bool(args[0].device.type != "cpu")
    is_copy = func is _ATEN._to_copy.default and named.get("device") == torch.device("cpu")
    return is_copy and bool(args[0].device.type != "cpu")


def _stand_in(func: Any, tensor: Tensor, named: dict[str, Any]) -> Any:
    """What the host gets in place of a value that does not exist."""
    if func is _ATEN._to_copy.default:
        return torch.zeros(tensor.shape, dtype=named.get("dtype") or tensor.dtype)
    return 1.0 if tensor.is_floating_point() else 1


@contextmanager
def fused_attention() -> Iterator[None]:
    """Fused attention on the meta device, where torch would write it out.

    A mode of torch would not see a checkpointed forward when the backward pass runs it again.
    """
    original = nn.functional.scaled_dot_product_attention

    def attention(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **named: Any
    ) -> Tensor:
        if not query.is_meta:
            return original(query, key, value, attn_mask, *args, **named)
        # Dropout and masks change no shape.
        output: Tensor = _ATEN._scaled_dot_product_flash_attention(query, key, value)[0]
        return output

    nn.functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = original


def counted(body: Callable[[], Any]) -> OperationCounter:
    """What `body` dispatches."""
    counter = OperationCounter()
    with fused_attention(), counter:
        body()
    return counter


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the memory that is allocated within it: what lives, and its peak, by kind of device.

    What a kernel takes for itself and what an allocator keeps in reserve are not seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live: dict[str, int] = {}
        """Kind of device -> bytes."""
        self.peak: dict[str, int] = {}
        self._seen: dict[int, int] = {}
        self._ends: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        for tensor in _tensors_in((*args, *named.values())):
            self._meet(tensor, is_new=False)
        output = on_meta(func, args, named)
        for tensor in _tensors_in((output,)):
            self._meet(tensor, is_new=True)
        return output

    def _meet(self, tensor: Tensor, *, is_new: bool) -> None:
        """Take in a tensor's storage, whose bytes count unless it was there before."""
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._seen:
            return
        kind = tensor.device.type
        self._seen[key] = size = storage.nbytes() if is_new else 0
        self.live[kind] = self.live.get(kind, 0) + size
        self.peak[kind] = max(self.peak.get(kind, 0), self.live[kind])

        def forget(_: Any) -> None:
            self.live[kind] -= self._seen.pop(key)
            del self._ends[key]

        self._ends[key] = weakref.ref(storage, forget)


def _tensors_in(values: Any) -> Iterator[Tensor]:
    """The tensors among values and in sequences of them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors_in(value)


def _value_pool(features: Tensor, query: Tensor, *_: Any) -> int:
    """Scores and the weighted sum."""
    batch, tokens, dim = features.shape
    return 4 * batch * query.shape[1] * tokens * dim


def _value_pool_backward(features: Tensor, query: Tensor, *rest: Any) -> int:
    """Gradients of weights and query; where features need one, of both of their uses."""
    wanted = rest[-1]
    return _value_pool(features, query) * (2 if wanted[0] else 1)


def _cpu_attention(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> int:
    shapes = (query.shape, key.shape, value.shape)
    return int(sdpa_flop_count(*shapes))  # type: ignore[no-untyped-call]


def _cpu_attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> int:
    shapes = (grad.shape, query.shape, key.shape, value.shape)
    return int(sdpa_backward_flop_count(*shapes))  # type: ignore[no-untyped-call]


_LACFAST_FLOPS: dict[Any, Callable[..., int]] = {
    torch.ops.lacfast.value_pool: _value_pool,
    torch.ops.lacfast.value_pool_backward: _value_pool_backward,
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _cpu_attention,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward,
}
"""FLOPs of what torch's own table lacks."""
