"""One op on one input, done by several providers whose results are equal before anyone is timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bench.roofline import Cost
from bench.shapes import Case

Inputs = dict[str, Tensor]
Call = Callable[[Inputs], tuple[Tensor, ...]]

REFERENCE, COMPILED_REFERENCE = "reference, eager", "reference, compiled"
PEER, COMPILED_PEER = "peer's formula, eager", "peer's formula, compiled"
REFERENCES, PEERS = (REFERENCE, COMPILED_REFERENCE), (PEER, COMPILED_PEER)
OURS, OURS_DRAWN = "lacfast", "lacfast, noise drawn"
PEER_DRAWN = "peer's formula, noise drawn"
"""torch.randn and the peer's formula on it, compiled where the others are: what a peer's step really runs."""


class WrongResultError(AssertionError):
    """A provider computes something else, so its time would mean nothing."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is timed: `providers[name](inputs)`."""

    op: str
    case: Case
    dtype: torch.dtype
    inputs: Inputs
    providers: dict[str, Call]
    """In the order of the table. Every result begins with what REFERENCE returns."""
    costs: Mapping[str, Cost]
    """Provider -> cost: drawing noise moves less than reading it."""
    baseline: str
    """The provider that speed-ups refer to; see `baseline_of`."""
    tolerance: float
    """Largest error of ours, relative to the largest entry of the result."""
    peer_tolerance: float
    """The same of the peers' formulas, which lose digits where ours do not."""
    borrowed: frozenset[str] = frozenset()
    """Which providers are other projects' functions (libraries.py)."""
    absent: Mapping[str, str] = field(default_factory=dict)
    """Another project's function that cannot be timed here -> why, which is its row."""

    @property
    def num_bytes(self) -> int:
        """Size of the inputs."""
        return sum(tensor.nbytes for tensor in self.inputs.values())

    def baseline_of(self, provider: str) -> str:
        """What the provider is compared with: who draws its noise, with who draws it too."""
        return PEER_DRAWN if provider == OURS_DRAWN and PEER_DRAWN in self.providers else self.baseline

    def title(self) -> str:
        return f"{self.op}, {self.case}, {str(self.dtype).removeprefix('torch.')}"

    def cloned(self) -> Inputs:
        """The inputs at other addresses."""
        return {
            name: tensor.detach().clone().requires_grad_(tensor.requires_grad)
            for name, tensor in self.inputs.items()
        }

    def verify(self) -> None:
        """Compare every provider with the reference in float64.

        Raises:
            WrongResultError: naming the provider, the result and its error.
        """
        exact = self._exact()
        for name in self.providers:
            self._compare(name, exact)

    def checked(self) -> Workload:
        """Verified, without other projects' functions that fail here or differ: those are absent then.

        Raises:
            WrongResultError: as `verify`, for the other providers.
        """
        exact, absent = self._exact(), dict(self.absent)
        for name in self.providers:
            try:
                self._compare(name, exact)
            except Exception as error:
                if name not in self.borrowed:
                    raise
                absent[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        providers = {name: call for name, call in self.providers.items() if name not in absent}
        return replace(self, providers=providers, absent=absent)

    def _exact(self) -> tuple[Tensor, ...]:
        return self.providers[REFERENCE](_in_float64(self.inputs))

    def _compare(self, name: str, exact: tuple[Tensor, ...]) -> None:
        allowed = self.peer_tolerance if name in {*PEERS, PEER_DRAWN, *self.borrowed} else self.tolerance
        wanted = self._on_drawn_noise() if name == PEER_DRAWN else exact
        with _seeded():
            results = self.providers[name](self.inputs)
        for index, expected in enumerate(wanted):
            error = _relative_error(results[index], expected)
            # Not `error > allowed`, which NaN would pass.
            if not error <= allowed:
                raise WrongResultError(
                    f"{self.title()}: result {index} of {name!r} is off by {error:.1e} of its largest "
                    f"entry, more than {allowed:.1e}"
                )

    def _on_drawn_noise(self) -> tuple[Tensor, ...]:
        """The reference in float64 on the noise that a peer draws within `_seeded`."""
        with _seeded():
            noise = torch.randn_like(self.inputs["noise"])
        return self.providers[REFERENCE](_in_float64(self.inputs | {"noise": noise}))


@contextmanager
def _seeded() -> Iterator[None]:
    """torch's global generators at one state, and back where they were."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def _in_float64(inputs: Inputs) -> Inputs:
    return {
        name: tensor.detach().double().requires_grad_(tensor.requires_grad)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in inputs.items()
    }


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    difference = (actual.detach().double() - expected.detach()).abs().max()
    return float(difference / expected.detach().abs().max().clamp_min(1e-300))


def variants(
    names: tuple[str, str],
    function: Callable[..., Any],
    use: Callable[[Callable[..., Any]], Call],
    compiled: bool,
) -> dict[str, Call]:
    """Providers (eager, compiled) of one function: `use` says how it is called; the second if `compiled`.

    dynamic=False: each workload has one shape, and a kernel made for it is the stronger opponent.
    """
    calls = {names[0]: use(function)}
    if compiled:
        calls[names[1]] = use(torch.compile(function, fullgraph=True, dynamic=False))
    return calls
