"""Capture and replay of pure steps in CUDA graphs. Knows nothing of diffusion.

A step is pure when all that changes between two runs lies in tensors that stay where they are. Everything
that outlives a step lies outside the pool that the graphs of a runner share, so the next replay, of this
graph or another, may overwrite the pool. One runner serves one stream of work: its replays must not overlap.

Autocast keeps the casts of weights until its outermost block ends. A step that enters its own block casts
inside the graph, anew at every replay, and stays exact when weights are updated. A block around the step
would keep casts of the warm-up's weights and freeze them, so that is refused.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lacfast.config import GraphConfig
from lacfast.runtime.cuda_graph import CudaCapture
from lacfast.runtime.fake_graph import FakeGraph

LAUNCH_BOUND = 0.7
"""Mode "auto" captures a step whose launches take the host more than this share of the device's time."""
EAGER = GraphConfig(mode="off")


@dataclass(frozen=True, eq=False)
class StaticStep:
    """A pure step with the tensors it is made of. The object itself is the key of its graphs."""

    name: str
    """What runs, and for which shapes; read in messages."""
    run: Callable[[], None]
    """One step, eagerly."""
    written: Callable[[], Sequence[Tensor]]
    """Every tensor outside the step that it writes; asked after the warm-up, which may allocate some."""
    read: Callable[[], Mapping[str, Tensor]]
    """Tensors by name whose addresses a graph freezes though their owners could move them: parameters,
    gradients, moments."""
    rounding: float = 0.0
    """How far a replay may be from the eager step, relative to a tensor's norm. 0: equal in all bits. A
    backward pass may have kernels whose sums have no fixed order."""


@dataclass
class GraphStatistics:
    """Counts of a runner's work since it was made."""

    captures: int = 0
    """Graphs captured."""
    replays: int = 0
    """Graphs launched."""
    eager_steps: int = 0
    """Steps run without a graph, warm-up included."""
    fallbacks: int = 0
    """Steps that were to be captured and run eagerly for good."""
    graph_bytes: int = 0
    """Memory that the graphs hold for intermediate tensors."""


class _Graph(Protocol):
    num_bytes: int

    def replay(self) -> None: ...

    def reset(self) -> None: ...


@dataclass
class _Program:
    """A step's state within a runner: its warm-up, its graphs, its fall-back."""

    warmup_left: int
    is_eager: bool = False
    graph: _Graph | None = None
    addresses: dict[str, int] = field(default_factory=dict)


class GraphRunner:
    """Runs steps many times: eagerly, or by graphs that it captures at first use and owns."""

    def __init__(self, config: GraphConfig = EAGER, device: torch.device | str = "cpu") -> None:
        """
        Args:
            config: which steps are captured, and how; by default none is.
            device: where the steps run.

        Raises:
            ValueError: under strict, when graphs are asked for on a device that has none.
        """
        self.config = config
        self.device = torch.device(device)
        self.statistics = GraphStatistics()
        self._programs: dict[StaticStep, _Program] = {}
        self._backend: CudaCapture | None = None
        if config.mode == "on" and self.device.type != "cuda":
            message = f"graph mode 'on' needs a CUDA device, not {self.device}; use 'auto', 'off' or 'fake'"
            if config.strict:
                raise ValueError(message)
            warnings.warn(f"{message}; steps run eagerly", RuntimeWarning, stacklevel=2)
            self.statistics.fallbacks += 1

    @property
    def captures(self) -> bool:
        """Whether steps are captured here at all; without it nothing needs to stay where it is."""
        return self.config.mode == "fake" or (self.config.mode != "off" and self.device.type == "cuda")

    def is_eager(self, step: StaticStep) -> bool:
        """Whether `step` runs eagerly for good: not launch-bound, not capturable, or no graphs here."""
        return not self.captures or (step in self._programs and self._programs[step].is_eager)

    def run(self, step: StaticStep, times: int = 1) -> None:
        """Run `step` `times` times. Warm-up, capture and the check of a new graph happen on the way.

        Raises:
            ValueError: under an autocast block, which would freeze casts of today's weights.
            OutOfMemoryError: also where the eager step fits and its graph does not; what it writes is then
                as before.
            RuntimeError: under strict, when the step cannot be captured or its replay is not the step.
        """
        if not self.captures:
            self._run_eagerly(step, times)
            return
        program = self._programs.get(step)
        if program is None:
            program = self._programs[step] = _Program(self.config.warmup_steps)
        if not program.is_eager and torch.is_autocast_enabled(self.device.type):
            raise ValueError(
                f"autocast is on around {step.name}; enter it inside the step, so that the graph casts"
            )
        for _ in range(times):
            if program.is_eager:
                self._run_eagerly(step, 1)
            elif program.warmup_left:
                self._warm_up(step, program)
            elif program.graph is not None:
                program.graph.replay()
                self.statistics.replays += 1
            else:
                self._first_use(step, program)

    def check_addresses(self, *steps: StaticStep) -> None:
        """Compare where tensors are with where the graphs of `steps` read them; once per iteration.

        Raises:
            ValueError: naming the tensor that has moved.
        """
        found: dict[Callable[[], Mapping[str, Tensor]], dict[str, int]] = {}
        for step in steps:
            program = self._programs.get(step)
            if program is None or program.graph is None:
                continue
            if step.read not in found:
                found[step.read] = _addresses(step.read())
            for name, address in program.addresses.items():
                if found[step.read].get(name) != address:
                    raise ValueError(
                        f"{name} is not where the graph of {step.name} reads it: it was replaced since. "
                        "Copy new values into the tensor that exists (lacfast.checkpoint.load_in_place, not "
                        "load_state_dict(assign=True), .to() or .data =), or close() the runner to capture "
                        "anew"
                    )

    def release(self, step: StaticStep) -> None:
        """Free the graphs of one step, whose buffers go away."""
        program = self._programs.pop(step, None)
        if program is None:
            return
        # An error within a warm-up leaves work on the side stream that nobody waits for.
        self._synchronize()
        if program.graph is not None:
            self.statistics.graph_bytes -= program.graph.num_bytes
            program.graph.reset()

    def close(self) -> None:
        """Free all graphs and their pool. A later run warms up and captures again."""
        for step in list(self._programs):
            self.release(step)
        self._backend = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _run_eagerly(self, step: StaticStep, times: int) -> None:
        for _ in range(times):
            step.run()
        self.statistics.eager_steps += times

    def _warm_up(self, step: StaticStep, program: _Program) -> None:
        program.warmup_left -= 1
        with self._side_stream():
            if program.warmup_left or self.config.mode != "auto":
                self._run_eagerly(step, 1)
                return
            host, device = self._timed(step)
        # A host that waits for a full queue of launches looks busy: the rule errs towards a graph.
        program.is_eager = host <= LAUNCH_BOUND * device

    def _timed(self, step: StaticStep) -> tuple[float, float]:
        """Seconds that the host needs to launch a step and that the device needs to run it."""
        first, last = (
            torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            for _ in range(2)
        )
        self._synchronize()
        start = time.perf_counter()
        first.record()
        self._run_eagerly(step, 1)
        last.record()
        host = time.perf_counter() - start
        last.synchronize()
        return host, first.elapsed_time(last) / 1e3

    def _first_use(self, step: StaticStep, program: _Program) -> None:
        """Take the step eagerly, capture it, and take it again by replay: all bits must agree.

        The eager run comes first, so that its activations are free before the pool holds the graph's.
        """
        written = list(step.written())
        # On the host: a slab of features may be too large for the device to hold it three times.
        before = [tensor.detach().to("cpu", copy=True) for tensor in written]
        with self._side_stream():
            self._run_eagerly(step, 1)
        expected = [tensor.detach().to("cpu", copy=True) for tensor in written]
        _restore(written, before)
        try:
            graph = self._capture(step, written)
        except torch.OutOfMemoryError:
            # For whoever makes the step smaller: it has not run, and nothing of it is kept.
            self._programs.pop(step)
            raise
        except RuntimeError as error:
            _restore(written, expected)
            self._fall_back(step, program, f"cannot be captured: {error}", error)
            return
        graph.replay()
        different = [
            index
            for index, pair in enumerate(zip(written, expected, strict=True))
            if not (_same_bits(*pair) or _near(*pair, step.rounding))
        ]
        if different:
            _restore(written, expected)
            graph.reset()
            shapes = ", ".join(f"{index} of shape {tuple(written[index].shape)}" for index in different)
            problem = (
                f"replays to other values than it computes eagerly, in its written tensors {shapes}: what "
                "changes between steps is a Python number or a new tensor, or a kernel is not deterministic"
            )
            self._fall_back(step, program, problem, None)
            return
        program.graph = graph
        program.addresses = _addresses(step.read())
        self.statistics.captures += 1
        self.statistics.replays += 1
        self.statistics.graph_bytes += graph.num_bytes

    def _capture(self, step: StaticStep, written: list[Tensor]) -> _Graph:
        if self.config.mode == "fake":
            return FakeGraph(step.run, written)
        return self._cuda().capture(step.run)

    def _fall_back(
        self, step: StaticStep, program: _Program, problem: str, cause: RuntimeError | None
    ) -> None:
        message = f"{step.name} {problem}"
        if self.config.strict:
            raise RuntimeError(message) from cause
        warnings.warn(f"{message}. It runs eagerly from here on", RuntimeWarning, stacklevel=4)
        program.is_eager = True
        self.statistics.fallbacks += 1

    def _cuda(self) -> CudaCapture:
        if self._backend is None:
            self._backend = CudaCapture(self.device)
        return self._backend

    def _side_stream(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.config.mode == "fake" else self._cuda().side_stream()

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _addresses(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in tensors.items()}


def _restore(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for tensor, value in zip(tensors, values, strict=True):
            tensor.copy_(value)


def _same_bits(tensor: Tensor, expected: Tensor) -> bool:
    # As bytes, so that NaN equals itself and -0 does not equal 0.
    ours, theirs = (
        each.detach().flatten().contiguous().view(torch.uint8)
        for each in (tensor, expected.to(tensor.device))
    )
    return torch.equal(ours, theirs)


def _near(tensor: Tensor, expected: Tensor, rounding: float) -> bool:
    if not rounding or not tensor.is_floating_point():
        return False
    theirs = expected.to(tensor.device).double()
    return bool((tensor.detach().double() - theirs).norm() <= rounding * theirs.norm())


def weights_of(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Parameters and buffers of modules "owner" as stored, by names "owner.path", for StaticStep.read."""
    return {
        name: tensor
        for owner, module in modules.items()
        for tensors in (module.named_parameters(), module.named_buffers())
        for path, whole in tensors
        for name, tensor in stored_as(f"{owner}.{path}", whole)
    }


def stored_as(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The tensor; one of a quantised kind has no address itself, so those that it is made of."""
    # torch's protocol of tensors that wrap others; it is in no type of theirs.
    flatten: Any = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        yield name, tensor
        return
    for part in flatten()[0]:
        yield from stored_as(f"{name}.{part}", getattr(tensor, part))
