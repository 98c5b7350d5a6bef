"""Weights that lie in parts on several ranks and are gathered block by block where they are used.

Every rank learns from trajectories of its own, sharded or not: sharding changes where weights, gradients and
moments lie. The engine is torch's fully_shard (FSDP2). Its sums are those of World.sum_: no mean, the loss of
each pair has its weight already.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, distributed, nn

from lacfast.distributed.world import TIMEOUT, World

Span = Callable[[str], AbstractContextManager[Any]]
REPLICATE, SHARD = "replicate", "shard"
"""The dimensions of the mesh: ranks along the first have the same parts, along the second the parts."""


# torch is about to give them other names; some builds have neither.
_GATHER: Any = getattr(distributed, "all_gather_single", None) or getattr(
    distributed, "all_gather_into_tensor", None
)
_SUM: Any = getattr(distributed, "reduce_scatter_single", None) or getattr(
    distributed, "reduce_scatter_tensor", None
)


def _unnamed(name: str) -> AbstractContextManager[Any]:
    return nullcontext()


@dataclass(frozen=True)
class Divisible:
    """A module whose weights are to be divided over ranks."""

    root: nn.Module
    """Its forward is called."""
    blocks: Collection[str]
    """Names of classes; each such module within is gathered on its own, all else with the root."""
    dtype: torch.dtype
    """Dtype in which trained weights are gathered; their gradients are summed in float32. Frozen ones keep
    theirs."""
    whole: frozenset[nn.Parameter] = frozenset()
    """Parameters that stay whole on every rank, and are summed by World.sum_."""

    def parts(self) -> list[tuple[nn.Module, list[nn.Parameter]]]:
        """The modules that are gathered on their own with the weights of each, the root's last."""
        taken = set(self.whole)
        found = []
        within = (each for each in self.root.modules() if each is not self.root)
        for module in (*(each for each in within if type(each).__name__ in self.blocks), self.root):
            weights = [each for each in module.parameters() if each not in taken]
            taken.update(weights)
            found.append((module, weights))
        return found


class Divider(Protocol):
    """What weights are given to that are to be divided over ranks."""

    def divide(self, module: Divisible) -> None:
        """See Sharding.divide."""


class Sharding:
    """The ranks in groups of `count`, each of which has all weights together."""

    def __init__(
        self,
        world: World,
        count: int,
        device: torch.device,
        *,
        scatters: bool = False,
        span: Span = _unnamed,
    ) -> None:
        """All ranks call it.

        Args:
            world: the ranks; a multiple of `count`, see World.require_shards.
            count: ranks that a weight is divided over.
            device: of the weights.
            scatters: every backward's gradients are summed within a group, those of the last over the groups.
                False: they stay whole on every rank until the last.
            span: named ranges around the collectives, "shard/gather" and "shard/sum".
        """
        # torch.distributed is not in every build of torch.
        from torch.distributed.device_mesh import DeviceMesh

        places = torch.arange(world.size).view(-1, count)
        # torch has types for its tensors, not for its groups.
        groups: dict[str, Any] = {}
        create: Any = distributed.new_subgroups_by_enumeration
        for name, ranks in ((REPLICATE, places.T), (SHARD, places)):
            groups[name], _ = create(ranks.tolist(), timeout=TIMEOUT)
        names = (REPLICATE, SHARD) if count < world.size else (SHARD,)
        self.mesh = DeviceMesh.from_group(
            [groups[name] for name in names] if len(names) > 1 else groups[SHARD],
            device.type,
            places if len(names) > 1 else places[0],
            mesh_dim_names=names,
        )
        self._gather: Any = _Gather(world, span)
        self._sum: Any = _Sum(world, world.size // count, span)
        self._scatters = scatters

    def divide(self, module: Divisible) -> None:
        """Divide a module's weights over the ranks, in place; its parameters are other objects afterwards.

        Nothing stays gathered behind a forward, see `gathered`: a copy would be stale where weights change.
        """
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

        for part, weights in module.parts():
            is_trained = any(each.requires_grad for each in weights)
            # Inputs keep their dtype: a timestep near 1000 has no place in bfloat16.
            policy = MixedPrecisionPolicy(cast_forward_inputs=False)
            if is_trained:
                policy = MixedPrecisionPolicy(module.dtype, torch.float32, cast_forward_inputs=False)
            fully_shard(
                part,
                mesh=self.mesh,
                reshard_after_forward=True,
                mp_policy=policy,
                ignored_params=set(module.whole),
            )
            assert isinstance(part, FSDPModule)
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
            part.set_custom_all_gather(self._gather)
            part.set_custom_reduce_scatter(self._sum)
            _DIVIDED[part] = self

    def sum_behind(self, part: Any, is_last: bool) -> None:
        """See the function `sum_behind`; `part` is one of this."""
        self._sum.is_last = is_last
        if self._scatters:
            part.set_requires_all_reduce(is_last, recurse=False)
        else:
            part.set_requires_gradient_sync(is_last, recurse=False)


_DIVIDED: WeakKeyDictionary[nn.Module, Sharding] = WeakKeyDictionary()
"""Modules whose weights are gathered on their own, and by what."""
_GATHERED: WeakSet[nn.Module] = WeakSet()
"""Modules that are within `gathered`."""


class _Collective:
    """One of FSDP's collectives, which tells where a rank waits, how much it sends, and its name."""

    def __init__(self, world: World, span: Span) -> None:
        self.world = world
        self.span = span

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The memory that FSDP asks for."""
        return torch.empty(*size, dtype=dtype, device=device)

    @contextmanager
    def _named(self, span: str, what: str) -> Iterator[None]:
        # Of every block: a word in the store, where others would look for it, takes longer than the call.
        with self.span(span), self.world.waiting(what, aloud=False):
            yield


class _Gather(_Collective):
    """Weights of a block, from all ranks of a group."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False
    ) -> Any:
        self.world.traffic.num_bytes += (group.size() - 1) * input_tensor.nbytes
        with self._named("shard/gather", "the weights of a block"):
            return _GATHER(output_tensor, input_tensor, group=group, async_op=async_op)


class _Sum(_Collective):
    """Gradients of a block: each rank gets the sum of its part, which groups then add up."""

    def __init__(self, world: World, replicas: int, span: Span) -> None:
        super().__init__(world, span)
        self.replicas = replicas
        self.is_last = True
        """The groups' parts are added behind this backward."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
    ) -> Any:
        sent = (group.size() - 1) * output_tensor.nbytes
        if self.is_last:
            sent += 2 * (self.replicas - 1) / self.replicas * output_tensor.nbytes
        self.world.traffic.num_bytes += sent
        with self._named("shard/sum", "the gradients of a block"):
            return _SUM(output_tensor, input_tensor, op=op, group=group, async_op=async_op)


def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank has a part of the tensor alone."""
    return hasattr(tensor, "device_mesh")


def own_part(tensor: Tensor) -> Tensor:
    """What this rank has of a tensor, in the same memory; all of one that is not sharded."""
    sharded: Any = tensor
    part: Tensor = sharded.to_local() if is_sharded(tensor) else tensor
    return part


def own_class(module: nn.Module) -> Any:
    """The class that a module had before its weights were sharded."""
    return type(module).__mro__[2] if module in _DIVIDED else type(module)


def divided(modules: Iterable[nn.Module | None]) -> list[Any]:
    """The modules within some whose weights are gathered on their own; [] where nothing is sharded."""
    if not _DIVIDED:
        return []
    return [part for module in modules if module is not None for part in module.modules() if part in _DIVIDED]


@contextmanager
def gathered(*modules: nn.Module | None) -> Iterator[None]:
    """Within the context all weights are gathered, so that ranks may run as many forwards as they like.

    For forwards without a backward, and weights that do not change. Takes the memory of all weights in the
    dtype that they are gathered in. All ranks enter it; where nothing is sharded it does nothing.
    """
    # Where they stay already, the outer context ends it.
    parts = [part for part in divided(modules) if part not in _GATHERED]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    _GATHERED.update(parts)
    try:
        yield
    finally:
        _GATHERED.difference_update(parts)
        for part in parts:
            part.set_reshard_after_forward(True, recurse=False)
            part.reshard()


def sum_behind(parts: Sequence[Any], *, is_last: bool) -> None:
    """Say whether the next backward is the last of an optimizer step, behind which all gradients are summed.

    `parts` as `divided` finds them.
    """
    for part in parts:
        _DIVIDED[part].sum_behind(part, is_last)


def clip_gradients_(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients to a norm of at most `max_norm`, all together; returns the norm () before."""
    gradients = [each.grad for each in parameters if each.grad is not None]
    divided = [each for each in gradients if is_sharded(each)]
    if not divided:
        return nn.utils.clip_grad_norm_(parameters, max_norm)
    own = [own_part(each) for each in divided]
    whole = [each for each in gradients if not is_sharded(each)]
    # In float64 a square neither overflows nor vanishes.
    square = nn.utils.get_total_norm(own).double().square()
    group: Any = divided[0].device_mesh.get_group(SHARD)  # type: ignore[attr-defined]
    world = World.current()
    world.traffic.num_bytes += 2 * (group.size() - 1) / group.size() * square.nbytes
    with world.waiting("the norm of the sharded gradients", aloud=False):
        distributed.all_reduce(square, group=group)
    if whole:
        square += nn.utils.get_total_norm(whole).double().square()
    norm = square.sqrt().to(own[0].dtype)
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([*own, *whole], factor)
    return norm


@torch.no_grad()
def copy_(target: Tensor, whole: Tensor) -> None:
    """Give a tensor the values of a whole one; a sharded one its part of them, without a collective."""
    if is_sharded(whole) or not is_sharded(target):
        target.copy_(whole)
        return
    target.copy_(divided_like(whole, target))


def divided_like(whole: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which every rank has, divided as another one is."""
    if not is_sharded(like):
        return whole
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = like
    return distribute_tensor(whole, sharded.device_mesh, sharded.placements, src_data_rank=None)


def whole_on_first(tensors: Mapping[str, Tensor], world: World, what: str) -> dict[str, Tensor]:
    """Tensors with the sharded ones whole on the first rank, in the host's memory; another rank has none of
    these. All ranks call it."""
    found = {}
    for name, tensor in tensors.items():
        if not is_sharded(tensor):
            found[name] = tensor
            continue
        sharded: Any = tensor
        with world.waiting(what):
            whole = sharded.full_tensor()
        if world.is_first:
            found[name] = whole.cpu()
    return found
