"""Tensors that say cuda:0 and hold values on the host, and what becomes of operators on them.

The part of tests/pretended_cuda.py that stands in for torch's dispatcher; there is how to use it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache, partialmethod
from typing import Any

import torch
from host_waits import WaitLog, callers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves

from lacfast.runtime.trees import leaves, mapped

DEVICE = torch.device("cuda", 0)
READERS = {
    *("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select", "aten::bincount"),
    *("aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::is_nonzero"),
}
"""Operators whose result, or its size, is a value of the device."""
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}


class DeviceMismatchError(RuntimeError):
    """Tensors of both devices where a GPU wants them on one."""


class _OfThread(threading.local):
    tape: Tape | None = None
    """What the thread captures."""
    is_asked: bool = False
    """Whether it is Python that calls torch now, and not torch's own backward pass."""


thread = _OfThread()

log = WaitLog()
"""Of the device that is pretended now."""


class CudaTensor(Tensor):
    """A tensor of the device; `values` are where a GPU would have them."""

    values: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl
    device = DEVICE  # type: ignore[assignment]
    is_cuda = True
    is_cpu = False

    @staticmethod
    def __new__(cls, values: Tensor, requires_grad: bool = False) -> CudaTensor:
        with torch._C.DisableTorchFunction():
            tensor: CudaTensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
                cls,
                values.size(),
                strides=values.stride(),
                storage_offset=values.storage_offset(),
                dtype=values.dtype,
                layout=values.layout,
                device=values.device,
                requires_grad=requires_grad,
            )
        tensor.values = values
        return tensor

    def __repr__(self) -> str:  # type: ignore[override]
        return f"CudaTensor({self.values!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            copy = CudaTensor(self.values.detach().clone(), self.requires_grad)
            if isinstance(self, nn.Parameter):
                copy._is_param = True  # type: ignore[attr-defined]
            memo[id(self)] = copy
        found: Tensor = memo[id(self)]
        return found

    def _read(self, name: str, *args: Any) -> Any:
        log.add(name)
        return getattr(self.values, name)(*args)

    item = partialmethod(_read, "item")
    tolist = partialmethod(_read, "tolist")
    __bool__ = partialmethod(_read, "__bool__")
    __int__ = partialmethod(_read, "__int__")
    __float__ = partialmethod(_read, "__float__")
    __index__ = partialmethod(_read, "__index__")

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu() first")

    __array__ = numpy

    def new_tensor(self, content: Any, *, dtype: torch.dtype | None = None, device: Any = DEVICE) -> Tensor:
        return torch.tensor(content, dtype=dtype or self.dtype, device=device)

    def data_ptr(self) -> int:
        return self.values.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.values.untyped_storage()

    def get_device(self) -> int:
        return 0

    def record_stream(self, stream: Any) -> None:
        """Nothing: there is one stream."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        _note_waits(func, args, kwargs)
        _require_one_device(func, args, kwargs)
        host_args, host_kwargs = mapped(CudaTensor, values_of, (args, kwargs))
        if _is_cuda(host_kwargs.get("device")):
            host_kwargs["device"] = "cpu"
        if func is torch.ops.aten._conj.default:
            # A lazy one's bit is of the values alone, and nothing below the dispatcher would read it there.
            return CudaTensor(_executed(torch.ops.aten._conj_physical.default, host_args, host_kwargs))
        results = _executed(func, host_args, host_kwargs)
        return return_and_correct_aliasing(func, args, kwargs, mapped(Tensor, CudaTensor, results))


def values_of(tensor: Tensor) -> Tensor:
    return tensor.values if isinstance(tensor, CudaTensor) else tensor


def _is_cuda(device: Any) -> bool:
    return device is not None and (isinstance(device, int) or torch.device(device).type == "cuda")


@cache
def _name(func: Any) -> str:
    return str(func._schema.name)


def _require_one_device(func: Any, args: Any, kwargs: Any) -> None:
    # A number may come as a tensor without dimensions from anywhere; copies and indices are looked at before.
    strangers = [
        leaf for leaf in leaves(Tensor, (args, kwargs)) if not isinstance(leaf, CudaTensor) and leaf.dim() > 0
    ]
    if not strangers or _name(func) in ("aten::copy_", "aten::_copy_from"):
        return
    if _name(func) in INDEXING and isinstance(args[0], CudaTensor):
        return
    shapes = [(tuple(each.shape), each.dtype) for each in strangers]
    (function, line), _ = callers()
    raise DeviceMismatchError(f"{func} on cuda:0 is given CPU tensors {shapes} at {function}, line {line}")


def _note_waits(func: Any, args: Any, kwargs: Any) -> None:
    name = _name(func)
    if name in READERS:
        log.add(name)
    elif name == "aten::repeat_interleave" and func._schema.overload_name == "Tensor":
        if kwargs.get("output_size") is None:
            log.add(name)
    elif name in INDEXING:
        indices = leaves(Tensor, args[1])
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            log.add("index by a mask")
        if any(not isinstance(index, CudaTensor) for index in indices):
            log.add("index of the host")
    elif name == "aten::copy_":
        target, source = args[:2]
        is_across = isinstance(target, CudaTensor) != isinstance(source, CudaTensor)
        on_host = source if isinstance(target, CudaTensor) else target
        non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        if is_across and not (_is_pinned(on_host) and non_blocking):
            log.add("copy between host and device")


def _is_pinned(tensor: Tensor) -> bool:
    return getattr(tensor.untyped_storage(), "pinned", False)


def _pinned(tensor: Tensor) -> Tensor:
    # Views have the same storage, so they are pinned too.
    tensor.untyped_storage().pinned = True  # type: ignore[attr-defined]
    return tensor


class Tape:
    """The operations of a capture, and what memory from before it held."""

    def __init__(self) -> None:
        self.calls: list[tuple[Callable[..., Any], Any, Any, list[tuple[int, Tensor]]]] = []
        self.own: dict[int, torch.UntypedStorage] = {}
        self.before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    @property
    def num_bytes(self) -> int:
        """Memory that the operations made."""
        return sum(storage.nbytes() for storage in self.own.values())

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        written = _written(func, args, kwargs)
        for tensor in written:
            self.keep(tensor)
        frozen_args, frozen_kwargs = mapped(Tensor, Tensor.detach, (args, kwargs))
        results = func(*args, **kwargs)
        known = {_memory(leaf) for leaf in leaves(Tensor, (args, kwargs))}
        made = [
            (position, leaf.detach())
            for position, leaf in enumerate(_results(results))
            if isinstance(leaf, Tensor) and _memory(leaf) not in known
        ]
        self.own |= {_memory(tensor): tensor.untyped_storage() for _, tensor in made}
        if made or written:
            self.calls.append((func, frozen_args, frozen_kwargs, made))
        return results

    def take(self, kernel: Callable[..., None], arguments: Any) -> None:
        """A kernel that writes to some of its arguments."""
        for leaf in leaves(Tensor, arguments):
            self.keep(leaf)
        self.calls.append((kernel, arguments, {}, []))

    def keep(self, tensor: Tensor) -> None:
        """Remember what outer memory holds, which a capture does not change."""
        memory = _memory(tensor)
        if memory not in self.own and memory not in self.before:
            storage = tensor.untyped_storage()
            self.before[memory] = storage, storage.clone()  # type: ignore[no-untyped-call]

    def restore(self) -> None:
        for storage, before in self.before.values():
            storage.copy_(before)

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, made in self.calls:
            results = _results(func(*args, **kwargs))
            for position, tensor in made:
                tensor.copy_(results[position])


def _results(returned: Any) -> list[Any]:
    return [returned] if isinstance(returned, Tensor) else tree_leaves(returned)


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    arguments = func._schema.arguments
    passed = zip([argument.name for argument in arguments], args, strict=False)
    values = dict(passed) | kwargs
    return [
        leaf
        for argument in arguments
        if argument.alias_info is not None and argument.alias_info.is_write
        for leaf in leaves(Tensor, values.get(argument.name))
    ]


def _executed(func: Any, args: Any, kwargs: Any) -> Any:
    return func(*args, **kwargs) if thread.tape is None else thread.tape.run(func, args, kwargs)


class _ToDevice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return CudaTensor(tensor.detach().clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return values_of(gradient)


class _ToHost(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: CudaTensor) -> Tensor:
        return tensor.values.detach().clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return CudaTensor(gradient)


def _to_device(tensor: Tensor, *, non_blocking: bool = False) -> Tensor:
    if isinstance(tensor, CudaTensor):
        return tensor
    if not (_is_pinned(tensor) and non_blocking):
        log.add("copy to the device")
    with torch._C.DisableTorchFunction():
        return _ToDevice.apply(tensor)  # type: ignore[no-any-return, no-untyped-call]


def to_host(tensor: Tensor, *, non_blocking: bool = False) -> Tensor:
    if not isinstance(tensor, CudaTensor):
        return tensor
    if not non_blocking:
        log.add("copy to the host")
    with torch._C.DisableTorchFunction():
        copy: Tensor = _ToHost.apply(tensor)  # type: ignore[no-untyped-call]
    return _pinned(copy) if non_blocking else copy


def _moved(tensor: Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:
    """Tensor.to."""
    other = kwargs.pop("other", None)
    if args and isinstance(args[0], Tensor):
        other, args = args[0], args[1:]
    if other is not None:
        args = (other.device, other.dtype, *args)
    if len(args) > 1 and isinstance(args[-1], bool) and isinstance(args[-2], bool):
        args, copy = args[:-1], args[-1]
    device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    moved = tensor
    if device is not None:
        move = _to_device if device.type == "cuda" else to_host
        if device.type == "meta":
            return values_of(tensor).to(device, dtype)
        moved = move(tensor, non_blocking=non_blocking)
    if dtype is not None:
        moved = Tensor.to(moved, dtype)
    if memory_format is not None:
        moved = moved.contiguous(memory_format=memory_format)
    return moved.clone() if copy and moved is tensor else moved


class _Recorded(TorchDispatchMode):
    """Operators on values that no tensor of the device calls: those that make the first one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _executed(func, args, kwargs or {})


class _Backward(TorchDispatchMode):
    """The zeros that a backward pass makes in C++ for a gradient that there is none of, as of a split's half
    that nothing uses: it takes their device from a tensor that says there that it is the host's."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.zeros.default and not thread.is_asked:
            return CudaTensor(_executed(func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


class _Asked:
    """Whether Python calls torch within the context."""

    def __init__(self, is_asked: bool) -> None:
        self.is_asked = is_asked

    def __enter__(self) -> None:
        self.before, thread.is_asked = thread.is_asked, self.is_asked

    def __exit__(self, *_: object) -> None:
        thread.is_asked = self.before


class DeviceMode(TorchFunctionMode):
    """What decides about devices in C++, where a tensor of this device is one of the host."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        tensor = args[0] if args and isinstance(args[0], Tensor) else None
        if tensor is not None and name in _METHODS:
            return _METHODS[name](tensor, *args[1:], **kwargs)
        return self._created(func, name, tensor, args, kwargs)

    def _created(self, func: Any, name: str, tensor: Tensor | None, args: Any, kwargs: dict[str, Any]) -> Any:
        """What `func` returns, on the device that its arguments ask for."""
        pin = kwargs.pop("pin_memory", False)
        device = kwargs.get("device")
        if name in ("tensor", "as_tensor", "asarray"):
            source = args[0] if args else kwargs.get("data")
            if isinstance(source, CudaTensor):
                return _moved(source, device=device or DEVICE, dtype=kwargs.get("dtype"))
            if _is_cuda(device):
                log.add(f"torch.{name}(..., device=cuda)")
        if device is not None and name != "autocast":
            if _is_cuda(device):
                with torch._C.DisableTorchFunction(), _Recorded():
                    made = func(*mapped(CudaTensor, values_of, args), **(kwargs | {"device": "cpu"}))
                    return mapped(Tensor, lambda each: CudaTensor(each.detach(), each.requires_grad), made)
            args = mapped(CudaTensor, values_of, args)
        if name in ("backward", "grad") and leaves(CudaTensor, args):
            with _Asked(False), _Backward():
                return func(*args, **kwargs)
        with _Asked(True):
            results = func(*args, **kwargs)
        return _pinned(results) if pin else results


_METHODS: dict[str, Callable[..., Any]] = {
    "to": _moved,
    "cuda": lambda tensor, device=None, non_blocking=False: _to_device(tensor, non_blocking=non_blocking),
    "cpu": to_host,
    "pin_memory": lambda tensor, device=None: _pinned(tensor.clone()),
    "is_pinned": lambda tensor, device=None: _is_pinned(tensor),
}
